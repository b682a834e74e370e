"""The other reading of MID: logits that depend little on the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.types import Batch, Trace
from keyhole.defenses.knows_loss import KnowsLoss
from keyhole.errors import check_range
from keyhole.parts.dependence import MEASURES, gaussian


@DEFENSES.add(
    name="mid_unilateral",
    paper="Wang, Zhang and Jia 2021 (MID), as the code of FedInverse and the text of BiDO (2022) take it",
    arxiv="2009.05241",
    known_breaks=(
        "logits must depend on the image to be of any use: on a face recogniser accuracy stays at 85 % up to weight "
        "5 and is 0.15 % at 20 (Peng et al. 2022, arXiv 2206.05483, introduction)",
        "one term for a whole batch: of updates of fewer images than its least batch it protects nothing, and whoever "
        "knows it matches its gradient exactly",
    ),
)
@dataclass(frozen=True)
class MIDUnilateral(Defense):
    """Punishes the dependence between images and logits: ``L + weight d(X, logits)``.

    X are the images in pixels and d a measure of `parts.dependence`, COCO or normalised HSIC, with Gaussian kernels,
    over the examples of a step's batch, which count alike. A batch below ``smallest`` has no such term, which the
    record says. The variational bottleneck is `mid`.

    Args:
        weight: at least 0.
        measure: ``coco``, or ``hsic``, which is the normalised one.
        sigma: width of the kernels for each entry of a row, above 0; 0 takes the median heuristic.
        smallest: examples of a batch from which on the term is added, at least 2.

    Source: public code of FedInverse, which names this MID; the weight is that at which BiDO's introduction reports
    that accuracy still holds. Differs from it: linear systems are solved in float64, and X are pixels in [0, 1].
    """

    weight: float = 5.0
    measure: Literal["coco", "hsic"] = "coco"
    sigma: float = 5.0
    smallest: int = 4

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0, math.inf, open_high=True)
        check_range("sigma", self.sigma, 0, math.inf, open_high=True)
        check_range("smallest", self.smallest, 2)

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """The loss with the dependence term."""
        if self.weight == 0:
            return loss
        if batch.inputs.shape[0] < self.smallest:
            ctx.note("no dependence term", loss.new_ones(()))
            return loss
        pixels, kernel = batch.inputs * ctx.task.bounds.std + ctx.task.bounds.mean, gaussian(self.sigma)
        dependence = MEASURES[self.measure](trace.logits, pixels, kernel, kernel)
        ctx.note("dependence on images", dependence)
        return loss + self.weight * dependence

    def counters(self) -> tuple[Counter, ...]:
        """Matching the gradient of the whole objective."""
        return (KnowsLoss(self),)

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Says so where no batch was large enough."""
        if notes.get("no dependence term"):
            return f"MID added nothing: a step had fewer than {self.smallest} images."
        return ""
