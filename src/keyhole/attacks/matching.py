"""Gradient matching: find the batch whose simulated update equals the observed one.

The gradient-inversion family differs in distance, prior, optimizer and start; this file is what they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import keyhole.parts.labels  # noqa: F401  (fills the registry of label rules)
from keyhole.core.attack import IterativeAttack, Start
from keyhole.core.defense import strip_prefix
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import LABELS
from keyhole.core.task import Task
from keyhole.core.tensors import squared_norm
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Batch, Candidate, Field, Key, Reconstruction, Seen, Tensors
from keyhole.errors import Refused, check_range
from keyhole.solve.optimizers import Optimizer

Distance = Callable[[Tensors, Tensors, Tensor], Tensor]
"""Simulated update, observed update and the observed squared norm to a scalar."""
Penalty = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class GradientMatching(IterativeAttack):
    """Minimise ``sum over rounds of distance(simulated, observed) + sum of weight x penalty(inputs)`` over the inputs.

    An episode of several rounds is reconstructed as one candidate, a batch for each round.

    Args:
        distance: between the simulated and the observed update, as the threat model's counter compares them.
        optimizer: proposes iterates.
        penalties: (weight, function of inputs) pairs; weights of 0 cost nothing.
        steps: evaluations in one start, at least 1.
        restarts: number of starts, at least 1.
        initial: where to start.
        labels: a registered label rule.
        box: keep iterates where pixels lie in [0, 1].
        tolerance, patience, always_restart: see `IterativeAttack`.
    """

    distance: Distance
    optimizer: Optimizer
    penalties: tuple[tuple[float, Penalty], ...] = ()
    steps: int = 1000
    restarts: int = 1
    initial: Start = "random"
    labels: str = "auto"
    box: bool = False
    tolerance: float = 0.0
    patience: int = 0
    min_progress: float = 0.01
    always_restart: bool = False

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("restarts", self.restarts, 1)
        check_range("tolerance", self.tolerance, 0)
        for weight, _ in self.penalties:
            check_range("the weight of a penalty", weight, 0, math.inf, open_high=True)
        LABELS.card(self.labels, "attack option 'labels'")

    @property
    def needs(self) -> frozenset[Field]:
        """Weights and update, and whatever the label rule reads."""
        return frozenset[Field]({"weights", "update"}) | LABELS.card(self.labels).facts["needs"]

    def infer(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensors:
        """Labels of every round's batch, (rounds x b, k), and the squared norm of what is matched, (rounds,)."""
        size, known = threat.batch_size, strip_prefix(seen.facts, "counter.")
        # A counter that had to give up the scale leaves the rules that count by it with nothing to go by.
        unscaled = self.labels == "auto" and size > 1 and threat.counter.scale_free
        rule = LABELS.card("bias_corrected" if unscaled else self.labels).factory
        targets, squares = [], []
        for number, one in enumerate(seen.observations):
            # What the attacker makes of the update, not the update as the defense left it.
            update = threat.counter.compare(one.update, one.update, known)[1] if one.update else {}
            targets.append(rule(task, size, one._replace(update=update), fold_in(key, number)))
            squares.append(squared_norm(update))
        return {"targets": torch.cat(targets), "squares": torch.stack(squares)}

    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        """Public images as they come, or standard normal noise in the model's input space."""
        if images is not None:
            return {"inputs": images}
        targets = seen.facts["targets"]
        return {"inputs": normal(key, (targets.shape[0], *task.input_shape), targets.dtype)}

    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The objective, and the distance alone."""
        inputs, targets = candidate["inputs"], seen.facts["targets"]
        facts, unknowns = strip_prefix(seen.facts, "counter."), strip_prefix(candidate, "counter.")
        size = threat.batch_size
        share = torch.full((size,), 1.0 / size, dtype=inputs.dtype, device=inputs.device)
        distance = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        for number, observation in enumerate(seen.observations):
            if observation.weights is None or observation.update is None:
                raise Refused("gradient matching needs the weights and the update of every round.")
            rows = slice(number * size, (number + 1) * size)
            batch = Batch(inputs[rows], targets[rows], share)
            simulated = threat.simulate(task, observation.weights, batch, facts, unknowns, key)
            mine, theirs = threat.counter.compare(simulated, observation.update, facts)
            distance = distance + self.distance(mine, theirs, seen.facts["squares"][number])
        prior = sum(weight * penalty(inputs) for weight, penalty in self.penalties if weight > 0)
        return distance + prior, distance

    def project(self, task: Task, candidate: Candidate) -> Candidate:
        """Clamp to the box, where the attack has one."""
        return {**candidate, "inputs": task.bounds.clamp(candidate["inputs"])} if self.box else candidate

    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        """The inputs as they are, with the labels they were matched under."""
        return Reconstruction(candidate["inputs"], seen.facts["targets"], score)
