"""Quantisation: the update's entries are rounded to few levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, uniform
from keyhole.core.registry import DEFENSES
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Tensors
from keyhole.errors import check_range
from keyhole.parts.distances import relative_l2_by_tensor

INSIDE = 0.1
"""What `Centred` makes of a difference inside the interval."""

_NEAR = 1e-3
"""How near to a level, in units of their distance, a mean over rounds counts as that level."""


class Interval(Counter):
    """Ask only that each simulated entry could have been rounded to the observed one.

    An entry in the interval that its level stands for costs nothing, any other its distance from it. A tensor's largest
    entry is sent as it is, which makes the levels known. It also brings the two scales together, so that factors from
    before the rounding (clipping, a rescaled mask) do no harm. A mask after the rounding may hide the largest entry;
    then the intervals are wrong, and the loss at the truth is not zero.

    Over rounds random rounding shows both levels around an entry, and what is left is the interval between them.

    Args:
        levels: number of levels from 0 to the largest entry.
        random: whether entries are rounded to one of the two levels around them rather than to the nearest.
    """

    name = "interval"
    last = True
    truth_loss: Literal["zero", "law", "none"] = "zero"
    inside = 0.0

    def __init__(self, levels: int, *, random: bool) -> None:
        self.levels, self.random = levels, random
        # An error is as large as the distance between levels, of which every tensor has its own.
        self.distance = relative_l2_by_tensor

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """The observed update moved by what of the simulated one lies outside, at the scale of the simulated one."""
        return map_tensors(self._moved, simulated, observed), observed

    def _moved(self, simulated: Tensor, observed: Tensor) -> Tensor:
        largest = observed.abs().amax()
        own = torch.where(observed != 0, simulated, 0.0).abs().amax()
        scaled = simulated * _ratio(largest, own)
        low, high = self._interval(observed, largest)
        nearest = torch.minimum(torch.maximum(scaled, low), high)
        moved = observed + (scaled - nearest) + self.inside * (nearest - observed)
        return moved * _ratio(own, largest)

    def _interval(self, observed: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        place = observed * (self.levels - 1) / torch.where(largest > 0, largest, 1.0)
        low, high = place - 0.5, place + 0.5
        if self.random:
            low, high = (place + _NEAR).floor(), (place - _NEAR).ceil()
            low, high = torch.where(low == high, low - 1.0, low), torch.where(low == high, high + 1.0, high)
        step = largest / (self.levels - 1)
        return torch.maximum(low * step, -largest), torch.minimum(high * step, largest)


class Centred(Interval):
    """As `Interval`, with a weak pull to the observed entry inside it.

    Where the prior alone would choose among all updates that fit, the pull prefers what lies in the middle. For
    rounding to the nearest level, where all of the interval is as likely.
    """

    name = "centred"
    truth_loss = "none"
    inside = INSIDE


class LeastSquares(Counter):
    """Take the rounding for noise, as large in each tensor as the distance between its levels.

    Random rounding is right on average, so that the mean over rounds comes nearer. An entry is more likely close to the
    level it was sent as than far from it, which intervals make nothing of.
    """

    name = "least_squares"

    def __init__(self) -> None:
        self.distance = relative_l2_by_tensor


class Signs(Counter):
    """Ask only that each simulated entry has the observed sign, and each tensor the observed mean magnitude.

    An entry of the wrong sign costs its size. The mean magnitude brings the two scales together, as the largest entry
    does for `Interval`, with the same exception: a mask after the rounding takes its share from the mean.
    """

    name = "signs"
    last = True
    truth_loss = "zero"

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """The observed update moved by what of the simulated one has the wrong sign, at the scale of the latter."""
        return map_tensors(self._moved, simulated, observed), observed

    @staticmethod
    def _moved(simulated: Tensor, observed: Tensor) -> Tensor:
        sign = observed.sign()
        # Every entry that was sent has the mean magnitude; the mean was taken over those that were zero as well.
        size, own = observed.abs().amax(), (simulated * sign).abs().mean()
        scaled = simulated * _ratio(size, own)
        wrong = torch.where(sign == 0, scaled, sign * torch.clamp(scaled * sign, max=0.0))
        return (observed + wrong) * _ratio(own, size)


@DEFENSES.add(
    name="quantize",
    paper="Alistarh et al. 2017, QSGD; Bernstein et al. 2018, signSGD",
    arxiv="1610.02132",
    known_breaks=("made to save traffic, not to hide anything: every entry still says between which levels it lay",),
    facts={"stronger": "down"},
)
@dataclass(frozen=True)
class Quantize(Defense):
    """Rounds every entry to one of few levels between 0 and its tensor's largest.

    With m the largest magnitude of a tensor and L levels, ``sign(g) m / (L - 1) round(|g| (L - 1) / m)``.

    Args:
        levels: L, at least 2; plays no part for ``sign``.
        mode: ``uniform`` rounds to the nearest level, ``qsgd`` at random to one of the two around it, so that the mean
            is right (QSGD with the largest magnitude in place of the norm), ``sign`` sends signs and one mean magnitude
            a tensor.
    """

    levels: int = 16
    mode: Literal["uniform", "qsgd", "sign"] = "uniform"

    def __post_init__(self) -> None:
        check_range("levels", self.levels, 2)

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """The update, rounded."""
        key = fold_in(ctx.key, "quantize")
        return {name: self._rounded(value, fold_in(key, name)) for name, value in update.items()}

    def _rounded(self, value: Tensor, key: Tensor) -> Tensor:
        if self.mode == "sign":
            return value.sign() * value.abs().mean()
        largest = value.abs().amax()
        place = value.abs() / torch.where(largest > 0, largest, 1.0) * (self.levels - 1)
        if self.mode == "uniform":
            level = place.round()
        else:
            level = (place + uniform(key, tuple(value.shape), value.dtype)).floor().clamp(max=self.levels - 1)
        return value.sign() * largest * (level / (self.levels - 1))

    def counters(self) -> tuple[Counter, ...]:
        """Matching up to the rounding."""
        if self.mode == "sign":
            return (Signs(),)
        if self.mode == "qsgd":
            return Interval(self.levels, random=True), LeastSquares()
        return Interval(self.levels, random=False), Centred(self.levels, random=False)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of two sizes, and 1 where there is nothing to divide by."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 1.0)
