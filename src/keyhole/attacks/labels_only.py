"""Label leakage by itself: read the batch's labels off its update, and reconstruct no image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keyhole.attacks.recovery import read_labels
from keyhole.core.attack import DirectAttack
from keyhole.core.registry import ATTACKS, LABELS
from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Field, Key, Reconstruction, Seen, Tensors

GRAY = 0.5
"""Pixel of every image that this attack answers with."""


@ATTACKS.add(
    name="labels_only",
    paper="Wainakh et al. 2022, User-Level Label Leakage from Gradients in Federated Learning",
    arxiv="2105.09369",
)
@dataclass(frozen=True, eq=False, kw_only=True)
class LabelsOnly(DirectAttack):
    """Labels from the head's gradient, and mid-gray images: what an update says about classes alone.

    Runs one label rule on the update as the threat model's counter corrects it, divided by what the attacker
    believes the update to be a multiple of. The images are all mid-gray, so that no image leaks; what counts is the
    overlap of the labels with the true ones.

    Args:
        labels: a label rule; ``auto`` reads one label from the bias gradient, more by iLRG. ``given`` answers with
            what the threat model hands over.

    Source: the question, and the score by overlap, are those of Wainakh et al., PETS 2022,
    https://arxiv.org/abs/2105.09369; each rule's own card names its paper. Differs from their code: any rule can be
    run, on any defended update, and `llg` is theirs without auxiliary data.
    """

    labels: str = "auto"
    pictures = False

    def __post_init__(self) -> None:
        LABELS.card(self.labels, "attack option 'labels'")

    @property
    def needs(self) -> frozenset[Field]:
        """What the label rule reads, and nothing else."""
        return LABELS.card(self.labels).facts["needs"]

    def infer(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensors:
        """Labels of the batch, (b, k)."""
        return {"targets": read_labels(self.labels, task, threat, seen, key)}

    def reconstruct(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Reconstruction:
        """The labels beside mid-gray images, (b, *shape); score 0, as nothing was compared."""
        targets: Tensor = seen.facts["targets"]
        gray = targets.new_full((targets.shape[0], *task.input_shape), GRAY)
        return Reconstruction(task.bounds.from_pixels(gray), targets, targets.new_zeros(()))
