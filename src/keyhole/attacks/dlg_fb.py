"""DLG-FB: begin each reconstruction at a blend of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keyhole.attacks.dlg import dlg
from keyhole.attacks.idlg import idlg
from keyhole.core.attack import IterativeAttack, SequentialAttack, Start
from keyhole.core.registry import ATTACKS
from keyhole.core.types import Reconstruction, Tensors
from keyhole.errors import ConfigError, check_range


@dataclass(frozen=True, eq=False)
class FeedbackBlending(SequentialAttack):
    """Runs ``inner`` on one update after another; its start is an exponential average of what succeeded before.

    After a success with reconstruction r: ``blend <- alpha blend + (1 - alpha) r``, the first one as it is. Failures
    leave the blend as it was. From ``warmup`` successes on the blend is the start. In a batch every place has a blend
    of its own: labels are sorted, so that a place tends to hold like images.
    """

    inner: IterativeAttack
    alpha: float
    warmup: int
    success: float
    feedback: bool
    keep_failures: bool

    @property
    def initial(self) -> Start:
        """Where the inner attack starts without feedback."""
        return self.inner.initial

    @property
    def restarts(self) -> int:
        """Starts of the inner attack; feedback enters the first."""
        return self.inner.restarts

    def begin(self, images: Tensor) -> Tensors:
        """No blend yet."""
        return {"blend": torch.zeros_like(images), "successes": images.new_zeros(())}

    def next_start(self, memory: Tensors, images: Tensor) -> Tensor:
        """The blend, once there is one."""
        return torch.where(self.carries(memory), memory["blend"], images)

    def carries(self, memory: Tensors) -> Tensor:
        """From ``warmup`` successes on, where there is feedback at all."""
        successes = memory["successes"]
        return (successes >= self.warmup) & torch.tensor(self.feedback, device=successes.device)

    def learn(self, memory: Tensors, reconstruction: Reconstruction) -> Tensors:
        """Blend a success in."""
        blend, successes, found = memory["blend"], memory["successes"], reconstruction.inputs
        counts = torch.ones_like(successes).bool() if self.keep_failures else self.matched(reconstruction)
        mixed = torch.where(successes > 0, self.alpha * blend + (1.0 - self.alpha) * found, found)
        return {"blend": torch.where(counts, mixed, blend), "successes": successes + counts}

    def matched(self, reconstruction: Reconstruction) -> Tensor:
        """Whether the distance came down to ``success``."""
        return reconstruction.score <= self.success


@ATTACKS.add(
    name="dlg_fb",
    paper="Leite, Santo, Dalmazo and Riker 2024, DLG-FB: federated learning under attack",
    arxiv="2409.17767",
)
def dlg_fb(
    *,
    base: Literal["idlg", "dlg"] = "idlg",
    feedback: bool = True,
    alpha: float = 0.5,
    warmup: int = 2,
    success: float = 1e-4,
    keep_failures: bool = False,
    start: Start = "random",
    steps: int = 300,
    tolerance: float = 1e-7,
    labels: str = "auto",
) -> FeedbackBlending:
    """DLG or iDLG on a series of updates, each started at an average of the successes before it.

    Needs a series: set ``client.series`` to the number of updates in one. The paper attacks a network drawn afresh for
    each image (``client.fresh_weights = true``); a federation's clients share one.

    Args:
        base: the attack on each update.
        feedback: ``false`` starts every update the same way: what feedback is to be compared with.
        alpha: weight of the old blend, in [0, 1].
        warmup: successes before the blend is used, at least 1.
        success: an update counts as recovered when the relative squared distance is at or below this; 1e-4 is about the
            authors' ``D <= 0.09`` at the gradient norm 28 of `lenet_zhu`.
        keep_failures: blend failures in as well; the authors' ablation without a filter.
        start: the start without a blend.
        steps: most evaluations for one update, at least 1.
        tolerance: an update is finished when the objective is at or below this.
        labels: a label rule, for ``idlg``.

    Differs from the authors' code: warm-up successes are the method's own rather than those of a parallel run with
    random starts (which are the same runs), success is relative to the update's norm, evaluations are counted rather
    than L-BFGS steps of 20 of them, and batches of several images are accepted.
    """
    if base == "dlg" and labels != "auto":
        raise ConfigError(f"labels is {labels!r}, but base 'dlg' optimises labels; leave it out, or set base = 'idlg'.")
    check_range("alpha", alpha, 0, 1)
    check_range("warmup", warmup, 1)
    check_range("success", success, 0, open_low=True)
    inner = (
        idlg(steps=steps, start=start, tolerance=tolerance, labels=labels)
        if base == "idlg"
        else dlg(steps=steps, restarts=1, start=start, tolerance=tolerance)
    )
    return FeedbackBlending(inner, alpha, warmup, success, feedback, keep_failures)
