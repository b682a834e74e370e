"""What a model inversion is: an attack on the global network that every participant receives, not on an update.

A method is written for one trial: all private classes of one target network, searched together. The engine
(`keyhole.solve.invert`) lifts it over searches and over target networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keyhole.core.task import Task
from keyhole.core.told import Told, silent
from keyhole.core.types import Candidate, Field, Key, Tensors, Weights


@dataclass(frozen=True, eq=False)
class Target:
    """What a participant of the federation holds: the global network of a round. There is nothing else to attack with.

    The task runs as deployed: BatchNorm with its running statistics, no dropout.
    """

    task: Task
    weights: Weights

    @property
    def classes(self) -> int:
        """Number of private classes k."""
        return self.task.num_classes

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits (n, k) of pixels (n, c, h, w) in [0, 1]."""
        return self.task.logits(self.weights, self.task.bounds.from_pixels(pixels))

    def inside(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, k), and the features (n, m) that the last layer reads."""
        trace = self.task.trace(self.weights, self.task.bounds.from_pixels(pixels))
        return trace.logits, trace.features.flatten(1)

    def confidence(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Probability (n,) that the network gives each image's own label (n,)."""
        return torch.softmax(self.logits(pixels), -1).gather(1, labels[:, None])[:, 0]


class Place(NamedTuple):
    """Where an attack may keep what it trains, and whom it tells."""

    folder: Path | None = None
    """Of the cache; `None` for its usual place."""
    told: Told = silent


class Inversion(ABC):
    """One method of model inversion. No argument of any method can carry a private image or the evaluator."""

    needs: frozenset[Field] = frozenset({"weights"})
    """What it must see: the global network alone."""
    optimizer: Any
    """An optimizer of `keyhole.solve.optimizers`."""
    steps: int
    """Evaluations of the objective in one search."""
    together: int = 1
    """Images of each class that one search gives, at least 1; 0 where it finds a distribution to draw any number
    from."""
    initial: int = 1
    """Images that a start looks at."""
    final: int = 1
    """How many times more images are made than are asked for; those that the target is surest of are kept."""
    views: int = 0
    """Randomly transformed copies that the identity loss and that choice average over; 0: the image as it is."""
    per_target: bool = False
    """Whether what `prepare` trains depends on the target network."""

    @abstractmethod
    def prepare(self, target: Target, public: Tensor, key: Key, place: Place, before: Any = None) -> Any:
        """Train what the attack needs, or find it in the cache.

        Args:
            target: the network that will be attacked; must not matter unless `per_target`.
            public: images (n, c, h, w) in [0, 1], without labels and without private classes.
            key: the attacker's randomness.
            place: where to keep it, and whom to tell.
            before: what `prepare` returned for the round before, to go on from.
        """

    def infer(self, target: Target, prior: Any, public: Tensor) -> Tensors:
        """Worked out once for a target and then held fixed, such as statistics of public images."""
        return {}

    @abstractmethod
    def start(self, target: Target, prior: Any, key: Key) -> Candidate:
        """Where a search begins, for all classes."""

    @abstractmethod
    def loss(self, target: Target, prior: Any, facts: Tensors, candidate: Candidate, key: Key) -> Tensor:
        """The objective, a scalar: a sum over classes, so that a class's step does not depend on how many there are.

        ``key`` is another one at each step.
        """

    def project(self, candidate: Candidate) -> Candidate:
        """The nearest admissible candidate; identity by default."""
        return candidate

    @abstractmethod
    def images(self, prior: Any, candidate: Candidate, count: int, key: Key) -> Tensor:
        """Pixels (count, k, c, h, w) of what was found; ``count`` is `together` unless that is 0."""
