"""Laplace noise on the update. By itself this is not differential privacy: nothing bounds the update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import struve, y0, y1
from torch import Tensor

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, uniform
from keyhole.core.registry import DEFENSES
from keyhole.core.tensors import map_tensors, rms, size
from keyhole.core.types import Key, Tensors
from keyhole.errors import check_range
from keyhole.parts.distances import RelativeL1

CORNER = 0.5
"""Radius of the likelihood's rounded corner in units of b: small beside the noise, and not too sharp for L-BFGS."""

FREE_CORNER = 0.05
"""The same in units of the update's root mean square, for chains whose clipping hides how large b is beside it."""


class Likelihood(Counter):
    """Match by the likelihood of the noise, which for Laplace noise is the sum of absolute differences.

    Of many draws about one value its minimum, the median, has half the variance of the mean that least squares finds.
    The weight of the prior depends on the scale of the noise: give the attack a ``tune`` grid. Balunovic et al. 2022
    (arXiv 2111.04706) treat the general case.

    The law of the loss at the truth holds for one round. With fresh masks before this noise in a chain the median over
    rounds is not the update: it leans to zero where entries were dropped.
    """

    name = "likelihood"
    truth_loss = "law"

    def __init__(self, b: float, scale: Literal["absolute", "rms"]) -> None:
        self.b, self.scale = b, scale
        # In units of the rms the clean one is not seen; the noisy one exceeds it by a known factor.
        self._known = b if scale == "absolute" else b / math.sqrt(1.0 + 2.0 * b**2)
        self._distance = RelativeL1(CORNER * self._known, scale)
        self.distance = self._distance
        self.free_distance = RelativeL1(FREE_CORNER, "rms")

    def combine(self, updates: Tensors) -> Tensors:
        """The median over rounds, an entry's likeliest value under this noise; midway between two for even numbers."""
        return map_tensors(_median, updates)

    def expected_truth_loss(self, observed: Tensors) -> tuple[float, float]:
        """Mean and standard deviation of the distance at the truth, from the moments of a rounded absolute value."""
        if self.b == 0:
            return 0.0, 0.0
        unit = rms(observed)
        b = self._known if self.scale == "rms" else self._known / float(unit)
        m = moments(float(self._distance.radius(unit)) / b)
        variance = m.variance
        if self.scale == "rms":
            # The noise also moves the rms by which everything is divided.
            rise = 1.0 + 2.0 * self.b**2
            variance += m.pull**2 * (2.0 * self.b**2 + 5.0 * self.b**4) / rise**2
            variance -= m.pull * m.covariance * self.b**2 / rise
        return b * m.mean, b * math.sqrt(variance / size(observed))


@dataclass(frozen=True)
class Moments:
    """Of ``f(t) = sqrt(t^2 + w^2) - w`` where t has the Laplace law of scale 1."""

    mean: float
    variance: float
    covariance: float
    """Of f and t^2."""
    pull: float
    """Mean of ``t^2 / sqrt(t^2 + w^2)``: how much f falls when t is divided by a little more than 1."""


def moments(w: float) -> Moments:
    """The moments for a corner of radius w, above 0.

    With ``s = sqrt(t^2 + w^2)`` and |t| exponential, ``E s = pi w / 2 (H1(w) - Y1(w))`` and ``E 1/s = pi / 2 (H0(w) -
    Y0(w))`` in Struve and Bessel functions (https://dlmf.nist.gov/11.5.E2); the rest follows by parts.
    """
    if w > 300:  # f is t^2 / 2w here, and the differences below lose their digits
        return Moments(1.0 / w, 5.0 / w**2, 10.0 / w, 2.0 / w)
    s = math.pi * w / 2.0 * float(struve(1, w) - y1(w))
    inverse = math.pi / 2.0 * float(struve(0, w) - y0(w))
    square_times_s = (6.0 - w**2) * s - 3.0 * w**2 * inverse + w**3
    return Moments(s - w, 2.0 + w**2 - s**2, square_times_s - 2.0 * s, s - w**2 * inverse)


@DEFENSES.add(
    name="laplace_noise",
    paper="Zhu, Liu and Han 2019, Deep Leakage from Gradients, section 5",
    arxiv="1906.08935",
    known_breaks=(
        "noise far below the gradient's own scale is ignored by plain matching; up to about a tenth of it, "
        "matching by absolute differences with a tuned smoothness prior recovers faces",
    ),
)
@dataclass(frozen=True)
class LaplaceNoise(Defense):
    """Adds independent Laplace noise of density exp(-|x| / b) / 2b to every entry of the update.

    Args:
        b: the scale, at least 0; the standard deviation is b times the square root of 2.
        scale: ``absolute``, or ``rms``: in units of the update's own root mean square.

    Not differential privacy: the update's sensitivity is not bounded.
    """

    b: float = 0.01
    scale: Literal["absolute", "rms"] = "absolute"

    def __post_init__(self) -> None:
        check_range("b", self.b, 0, math.inf, open_high=True)

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """The update plus noise, fresh each round."""
        unit = rms(update) if self.scale == "rms" else 1.0
        key = fold_in(ctx.key, "laplace_noise")
        return {
            name: value + self.b * unit * laplace(fold_in(key, name), tuple(value.shape), value.dtype)
            for name, value in update.items()
        }

    def counters(self) -> tuple[Counter, ...]:
        """Likelihood matching with a prior tuned for this noise."""
        return (Likelihood(self.b, self.scale),)


def _median(rounds: Tensor) -> Tensor:
    ordered, count = rounds.sort(0).values, rounds.shape[0]
    return 0.5 * (ordered[(count - 1) // 2] + ordered[count // 2])


def laplace(key: Key, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws from the Laplace law of scale 1 by its inverse distribution function, computed in float64."""
    halves = 2.0 * uniform(key, shape, torch.float64)
    # Each half of the unit interval is one sign; its fraction is below 1, so the logarithm stays finite.
    negative = halves < 1.0
    magnitude = -torch.log1p(-torch.where(negative, halves, halves - 1.0))
    return torch.where(negative, -magnitude, magnitude).to(dtype)
