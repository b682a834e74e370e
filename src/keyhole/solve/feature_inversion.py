"""From features back to images: a second attack, for defenses that keep what the network sees of an image."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from keyhole.core.attack import IterativeAttack, Start
from keyhole.core.belief import weights_seen
from keyhole.core.keys import normal
from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Candidate, Field, Key, Reconstruction, Seen, Tensors
from keyhole.errors import check_range
from keyhole.parts.features import blank_features, feature_distance
from keyhole.parts.penalties import smooth_total_variation
from keyhole.solve.optimizers import Optimizer, StepDecay, adam


@dataclass(frozen=True, eq=False)
class FeatureInversion(IterativeAttack):
    """Images with the features of those that a first attack found, and smooth where the features leave it open.

    ``mean_i |phi(x_i) - phi(f_i)|^2 / |phi(f_i) - phi(gray)|^2 + tv * TV(x)``, phi the input of the network's head, f
    what was found, x in the box that pixels fill.

    Args:
        tv: weight of the smoothed total variation, at least 0; 0.1 suits faces and digits alike.
        optimizer: proposes iterates.
        steps: evaluations in one start, at least 1.
        initial: where to start; what was found is no start, as its features are right already.

    Source: Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them", CVPR 2015,
    https://arxiv.org/abs/1412.0035, section 2. Differences: they divide by |phi(f)|^2, their prior has an image norm as
    well and a total variation of another power, and they descend with momentum.
    """

    tv: float = 0.1
    optimizer: Optimizer = field(default_factory=lambda: adam(0.05, StepDecay(600)))
    steps: int = 600
    restarts: int = 1
    initial: Start = "mean"

    def __post_init__(self) -> None:
        check_range("tv", self.tv, 0)
        check_range("steps", self.steps, 1)

    @property
    def needs(self) -> frozenset[Field]:
        """The weights."""
        return frozenset[Field]({"weights"})

    def infer(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensors:
        """The features of what was found, as pixels that exist."""
        found = task.bounds.clamp(seen.facts["found.inputs"])
        weights = weights_seen(seen.observations[0])
        return {"features": task.trace(weights, found).features, "blank": blank_features(task, weights, found)}

    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        """Public images as they come, or standard normal noise in the model's input space."""
        found = seen.facts["found.inputs"]
        if images is None:
            return {"inputs": normal(key, tuple(found.shape), found.dtype)}
        return {"inputs": images.repeat(found.shape[0] // images.shape[0], *(1 for _ in task.input_shape))}

    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        """The objective, and the distance of features alone."""
        features = task.trace(weights_seen(seen.observations[0]), candidate["inputs"]).features
        distance = feature_distance(features, seen.facts["features"], seen.facts["blank"]).mean()
        return distance + self.tv * smooth_total_variation(candidate["inputs"]), distance

    def project(self, task: Task, candidate: Candidate) -> Candidate:
        """Clamped to the box."""
        return {**candidate, "inputs": task.bounds.clamp(candidate["inputs"])}

    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        """The images; their labels are those of the first attack."""
        return Reconstruction(candidate["inputs"], None, score)
