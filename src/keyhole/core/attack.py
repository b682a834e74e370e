"""What an attack is. Two families: closed forms, and iterative attacks whose loop the engine owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor

from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Candidate, Field, Key, Reconstruction, Seen, Tensors

Start = Literal["random", "gray", "mean", "class_mean"]
"""Where an iterative attack begins: noise, mid-gray, the mean of the public images, or that of each label's class, for
attackers who are given the labels."""


class Attack(ABC):
    """One method, written for one trial. No argument of any method can carry the truth."""

    pictures: bool = True
    """Whether its answer is images, rather than labels alone."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Field]:
        """What it must see; a threat model that hides it makes the trial ``refused``."""

    def infer(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensors:
        """Worked out once and then held fixed, such as labels; the counter's facts are already in ``seen``."""
        return {}


class DirectAttack(Attack):
    """A closed form."""

    @abstractmethod
    def reconstruct(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Reconstruction:
        """From what was seen to images."""


class IterativeAttack(Attack):
    """An optimisation. The attack says where to start and what to minimise; the engine does the rest."""

    optimizer: Any
    """An optimizer of `keyhole.solve.optimizers`."""
    steps: int
    """Evaluations of the objective in one start."""
    restarts: int
    """Number of starts, at least 1."""
    initial: Start
    """Which public start the runner fills in."""

    tolerance: float = 0.0
    """A start has converged when its objective is at or below this; 0 switches the rule off."""
    patience: int = 0
    """A start has stalled when its objective fell by less than ``min_progress`` over so many evaluations; 0: never."""
    min_progress: float = 0.01
    always_restart: bool = False
    """Run every start and keep the best score, rather than only after a start that failed."""

    @abstractmethod
    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        """The first candidate. ``images`` (r, *shape) are public start images; `None` asks for random ones."""

    @abstractmethod
    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The objective to minimise, and the score that selects between starts (without priors); two scalars."""

    def project(self, task: Task, candidate: Candidate) -> Candidate:
        """The nearest admissible candidate; identity by default."""
        return candidate

    @abstractmethod
    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        """The candidate as images in the model's input space."""

    def at_truth(self) -> IterativeAttack:
        """The same attack, told everything but the images: the self-test starts it at the true ones."""
        return self


class SequentialAttack(Attack):
    """An attack on a series of updates that carries something over from one to the next.

    The engine runs ``inner`` on each update in turn; ``memory`` is data of one trial, and lifts like everything else.
    """

    inner: IterativeAttack
    """What is run on each update."""

    @property
    def needs(self) -> frozenset[Field]:
        """That of the inner attack."""
        return self.inner.needs

    @abstractmethod
    def begin(self, images: Tensor) -> Tensors:
        """The memory before the first update. ``images`` (b, *shape) have the shape of one batch."""

    @abstractmethod
    def next_start(self, memory: Tensors, images: Tensor) -> Tensor:
        """Start images (b, *shape) for the next update; ``images`` is what it would start from without a memory."""

    @abstractmethod
    def learn(self, memory: Tensors, reconstruction: Reconstruction) -> Tensors:
        """The memory after an update was worked on."""

    @abstractmethod
    def carries(self, memory: Tensors) -> Tensor:
        """Whether `next_start` gives something else than what it is given, a boolean scalar."""

    @abstractmethod
    def matched(self, reconstruction: Reconstruction) -> Tensor:
        """Whether the attacker counts the reconstruction as a success, a boolean scalar; by its own score only."""
