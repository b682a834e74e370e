"""Clipping the norm of the update. Neither differential privacy nor, against scale-free attacks, a defense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.tensors import map_tensors, safe_norm
from keyhole.core.types import Tensors
from keyhole.errors import check_range


class NormMatched(Counter):
    """Compare directions: both updates are brought to norm 1, which undoes any rescaling of the whole update.

    The scale that clipping removed was the only thing it removed. (Li et al. 2022, arXiv 2203.15696, instead clip the
    simulated gradient to an estimated threshold.)
    """

    name = "norm_matched"
    truth_loss = "zero"
    scale_free = True

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """Both at norm 1."""
        return _unit(simulated), _unit(observed)


@DEFENSES.add(
    name="clip",
    paper="Kim and Park 2024, masking, clipping, pruning and noising against gradient leakage",
    arxiv="2408.08430",
    known_breaks=("cosine objectives, norm matching and the label rules idlg and bias_corrected ignore the scale",),
    facts={"stronger": "down"},
)
@dataclass(frozen=True)
class Clip(Defense):
    """Scales the whole update down to a norm: g min(1, C / |g|).

    Args:
        norm: the threshold C, above 0.
        scale: ``absolute``, or ``update``: in units of each update's own norm, so that 0.1 always leaves a tenth.
    """

    norm: float = 1.0
    scale: Literal["absolute", "update"] = "absolute"

    def __post_init__(self) -> None:
        check_range("norm", self.norm, 0, math.inf, open_low=True, open_high=True)

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """The update, no longer than the threshold."""
        norm = safe_norm(update)
        factor = norm.new_tensor(self.norm) if self.scale == "update" else self.norm / (norm + 1e-6)
        return map_tensors(lambda g: g * torch.clamp(factor, max=1.0), update)

    def counters(self) -> tuple[Counter, ...]:
        """Norm matching."""
        return (NormMatched(),)


def _unit(update: Tensors) -> Tensors:
    norm = safe_norm(update) + 1e-30
    return map_tensors(lambda g: g / norm, update)
