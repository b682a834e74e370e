"""Random gradient masking: a random part of the update is not sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import bernoulli, fold_in
from keyhole.core.registry import DEFENSES
from keyhole.core.types import Tensors
from keyhole.defenses.survivors import Survivors
from keyhole.errors import check_range


@DEFENSES.add(
    name="random_masking",
    paper="Kim and Park 2024, random gradient masking against gradient leakage (our reading of the abstract)",
    arxiv="2408.08430",
    known_breaks=(
        "the zeros show the mask, and the survivors still outnumber the pixels: matching only them from a "
        "gray start recovers faces at a rate of one half and above",
    ),
)
@dataclass(frozen=True)
class RandomMasking(Defense):
    """Multiplies the update by a fresh mask M ~ Bernoulli(1 - rate) each round.

    The paper's body could not be read; this follows its abstract and third-party summaries. Acts on gradients or
    weight deltas, never on absolute weights.

    Args:
        rate: probability that an entry is not sent, in [0, 1).
        granularity: ``element``, or ``channel``: whole slices along the first axis of each tensor.
        rescale: multiply the survivors by 1 / (1 - rate), so that the mean over masks is the update.
        batchnorm: also mask BatchNorm's scale and shift. Running statistics are never touched.
    """

    rate: float = 0.5
    granularity: Literal["element", "channel"] = "element"
    rescale: bool = False
    batchnorm: bool = False

    def __post_init__(self) -> None:
        check_range("rate", self.rate, 0, 1, open_high=True)

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """The update with a random part set to zero."""
        key = fold_in(ctx.key, "random_masking")
        factor = 1.0 / (1.0 - self.rate) if self.rescale else 1.0
        masked = {}
        for name, value in update.items():
            if name in ctx.task.norm_params and not self.batchnorm:
                masked[name] = value
                continue
            shape = tuple(value.shape)
            if self.granularity == "channel" and shape:
                shape = (shape[0], *(1 for _ in shape[1:]))
            kept = bernoulli(fold_in(key, name), 1.0 - self.rate, shape).to(value.dtype)
            masked[name] = value * kept * factor
        return masked

    def counters(self) -> tuple[Counter, ...]:
        """Matching the survivors at the scale they had."""
        return (Survivors(1.0 / (1.0 - self.rate) if self.rescale else 1.0, spares_norms=not self.batchnorm),)
