"""Gradient matching: find the batch whose simulated update equals the observed one.

The gradient-inversion family differs in distance, prior, optimizer and start; this file is what they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keyhole.attacks.recovery import compared_update, read_labels
from keyhole.core.attack import IterativeAttack, Start
from keyhole.core.belief import weights_seen
from keyhole.core.defense import strip_prefix
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import LABELS
from keyhole.core.task import Task
from keyhole.core.tensors import squared_norm
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Batch, Candidate, Distance, Field, Key, Reconstruction, Seen, Tensors
from keyhole.errors import Refused, check_range
from keyhole.solve.optimizers import Optimizer

Penalty = Callable[[Tensor], Tensor]

OPTIMISED = "optimised"
"""In place of a label rule: labels are unknowns beside the images."""


@dataclass(frozen=True, eq=False)
class GradientMatching(IterativeAttack):
    """Minimise ``distance(simulated, observed) + sum of weight x penalty(inputs)`` over the inputs of one update.

    Args:
        distance: between the simulated and the observed update, as the threat model's counter compares them; a
            counter that knows the noise's likelihood replaces it.
        optimizer: proposes iterates.
        penalties: (weight, function of inputs) pairs; weights of 0 cost nothing.
        steps: evaluations in one start, at least 1.
        restarts: number of starts, at least 1.
        initial: where to start.
        labels: a registered label rule, or ``optimised``: a soft label of each image joins the unknowns.
        statistics: weight of the distance between simulated and seen BatchNorm statistics, where they are seen.
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
    statistics: float = 0.0
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
        check_range("statistics", self.statistics, 0)
        if self.labels != OPTIMISED:
            LABELS.card(self.labels, "attack option 'labels'")

    @property
    def needs(self) -> frozenset[Field]:
        """Weights and update, and whatever the label rule reads."""
        read = frozenset[Field]() if self.labels == OPTIMISED else LABELS.card(self.labels).facts["needs"]
        return frozenset[Field]({"weights", "update"}) | read

    def infer(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensors:
        """The squared norm of what is matched, and labels (b, k) where a rule finds them."""
        # One guess of the client's randomness for the whole trial: an order drawn anew at every evaluation would keep
        # whichever draw happened to fit.
        facts = {"square": squared_norm(compared_update(threat, seen)), "client": fold_in(key, "client")}
        if self.labels == OPTIMISED:
            return facts
        targets = read_labels(self.labels, task, threat, seen, key)
        # A belief with several guesses for each image has as many guesses for each label.
        return {**facts, "targets": targets.repeat(threat.belief.copies, 1)}

    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        """Public images as they come, or standard normal noise in the model's input space; so are free labels."""
        like = seen.facts["square"]
        if images is not None:
            inputs = images.repeat(threat.guesses // images.shape[0], *(1 for _ in task.input_shape))
        else:
            inputs = normal(key, (threat.guesses, *task.input_shape), like.dtype)
        candidate = {"inputs": inputs, **threat.unknowns(task, inputs, fold_in(key, "unknowns"))}
        if self.labels == OPTIMISED:
            candidate["labels"] = normal(fold_in(key, "labels"), (threat.guesses, task.num_classes), like.dtype)
        return candidate

    def _targets(self, threat: ThreatModel, seen: Seen, candidate: Candidate) -> Tensor:
        if self.labels == OPTIMISED:
            return torch.softmax(candidate["labels"], -1)
        return threat.belief.relabel(seen.facts["targets"], strip_prefix(candidate, "belief."))

    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The objective, and the distance alone."""
        inputs, (observation,) = candidate["inputs"], seen.observations
        if observation.update is None:
            raise Refused("gradient matching needs the update, which this attacker does not see.")
        size = threat.guesses
        share = torch.full((size,), 1.0 / size, dtype=inputs.dtype, device=inputs.device)
        batch = Batch(inputs, self._targets(threat, seen, candidate), share)
        facts = strip_prefix(seen.facts, "counter.")
        simulated = threat.simulate(task, observation, batch, facts, candidate, seen.facts["client"])
        mine, theirs = threat.counter.compare(simulated, observation.update, facts)
        distance = (threat.counter.distance or self.distance)(mine, theirs, seen.facts["square"])
        prior = sum(weight * penalty(inputs) for weight, penalty in self.penalties if weight > 0)
        prior = prior + threat.belief.penalty(inputs)
        if self.statistics > 0 and observation.statistics:
            own = task.trace(weights_seen(observation), inputs, masks=observation.masks).statistics
            prior = prior + self.statistics * _statistics_distance(own, observation.statistics)
        return distance + prior, distance

    def project(self, task: Task, candidate: Candidate) -> Candidate:
        """Clamp to the box, where the attack has one."""
        return {**candidate, "inputs": task.bounds.clamp(candidate["inputs"])} if self.box else candidate

    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        """The inputs as they are, with the labels they were matched under."""
        inputs = threat.belief.merge(candidate["inputs"])
        return Reconstruction(inputs, self._targets(threat, seen, candidate)[: inputs.shape[0]], score)

    def at_truth(self) -> GradientMatching:
        """With the labels given: a label of its own choice would pull it off the truth."""
        return replace(self, labels="given")


def _statistics_distance(own: Tensors, seen: Tensors) -> Tensor:
    """Mean over layers and channels of the squared distance of means and deviations, in units of the seen variance.

    The prior of Yin et al. 2021 (GradInversion, arXiv 2104.07586, equation 12), with each layer at its own scale.
    """
    layers = [name.removesuffix(".mean") for name in seen if name.endswith(".mean")]
    terms = []
    for layer in layers:
        variance = seen[f"{layer}.var"] + 1e-6
        means = (own[f"{layer}.mean"] - seen[f"{layer}.mean"]).square() / variance
        deviations = ((own[f"{layer}.var"] + 1e-6).sqrt() / variance.sqrt() - 1.0).square()
        terms.append((means + deviations).mean())
    return torch.stack(terms).mean()
