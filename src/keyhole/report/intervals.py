"""Estimates with 95 % intervals that resample images and networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Matrix = NDArray[np.float64]
"""Networks x images, NaN where an image was not scored on a network."""

RESAMPLES = 2000
_Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Spread:
    """A metric over images; ``low`` and ``high`` bound the median with 95 % confidence."""

    median: float = math.nan
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    q10: float = math.nan
    q90: float = math.nan


def student(values: Sequence[float]) -> Estimate:
    """The mean over trainings, or of paired differences between them, with its 95 % Student interval.

    One training has no interval. Nor have several that agree exactly, as where all of them are saturated: they do not
    prove that every training would. NaN without values, or where one of them is NaN.
    """
    if not values or any(math.isnan(value) for value in values):
        return Estimate()
    mean = math.fsum(values) / len(values)
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else 0.0
    return Estimate(mean, mean - half, mean + half) if half > 0 else Estimate(mean)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of ``n``; ``share * n`` need not be whole."""
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def wider(*intervals: tuple[float, float]) -> tuple[float, float]:
    """The widest of some intervals, the first of equals; NaN is none."""
    return max((pair for pair in intervals if not math.isnan(pair[0])), key=lambda pair: pair[1] - pair[0])


def _resampled(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Sorted present values, how often each is drawn (resamples, values) and the number drawn (resamples,)."""
    networks, images = matrix.shape
    # A fresh generator for each interval: no result depends on which rows were summarised before it.
    rng = np.random.default_rng(20240229)
    rows = rng.multinomial(networks, np.full(networks, 1 / networks), size=RESAMPLES)
    columns = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    present = np.argwhere(~np.isnan(matrix))
    present = present[np.argsort(matrix[present[:, 0], present[:, 1]], kind="stable")]
    drawn = (rows[:, present[:, 0]] * columns[:, present[:, 1]]).astype(np.float64)
    return matrix[present[:, 0], present[:, 1]], drawn, drawn.sum(1)


def bootstrap(matrix: Matrix, statistic: str = "mean") -> tuple[float, float]:
    """The 95 % percentile interval of the mean or the median, resampling images and networks independently.

    Several networks on the same images are not so many more images: resampling both sides of the matrix keeps what
    the images share, and what the networks share, together.

    Args:
        matrix: networks x images, NaN for holes.
        statistic: ``"mean"`` or ``"median"``.

    Returns:
        Lower and upper bound; NaN without values.
    """
    if not (~np.isnan(matrix)).any():
        return math.nan, math.nan
    values, drawn, total = _resampled(matrix)
    hit = total > 0  # a resample can consist of holes
    drawn, total = drawn[hit], total[hit]
    if statistic == "mean":
        found = drawn @ values / total
    else:
        below = drawn.cumsum(1) * 2
        lower = values[(below >= total[:, None]).argmax(1)]
        upper = values[(below > total[:, None]).argmax(1)]
        found = (lower + upper) / 2
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def rate(matrix: Matrix) -> Estimate:
    """A share of ones with the wider of the bootstrap and the Wilson interval.

    When all images agree, every resample does too and the bootstrap has zero width, as if 16 of 16 proved 100 %.
    Wilson with the number of distinct images is honest there; the bootstrap is where networks disagree.
    """
    if not (~np.isnan(matrix)).any():
        return Estimate()
    value = float(np.nanmean(matrix))
    images = int((~np.isnan(matrix)).any(0).sum())
    low, high = wider(bootstrap(matrix), wilson(value, images))
    return Estimate(value, min(low, value), max(high, value))


def mean(matrix: Matrix) -> Estimate:
    """The mean with its bootstrap interval."""
    if not (~np.isnan(matrix)).any():
        return Estimate()
    return Estimate(float(np.nanmean(matrix)), *bootstrap(matrix))


def spread(matrix: Matrix) -> Spread:
    """Median with its bootstrap interval, mean, and the 10 % and 90 % quantiles of the values that are numbers."""
    values = matrix[~np.isnan(matrix)]
    if not values.size:
        return Spread()
    low, high = bootstrap(matrix, "median")
    q10, median, q90 = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    return Spread(median, float(values.mean()), low, high, q10, q90)


def overlap(matrix: Matrix) -> Estimate:
    """The mean of values in [0, 1], such as a batch's share of right labels.

    Shares of ones, and values that all agree, get the interval of `rate`: resampling them would show no width, and no
    values in [0, 1] of that mean vary more than ones and zeros do, so that Wilson's interval is wide enough.
    """
    found = mean(matrix)
    values = matrix[~np.isnan(matrix)]
    return rate(matrix) if np.isin(values, (0.0, 1.0)).all() or found.low == found.high else found


def share_difference(matrix: Matrix) -> Estimate:
    """The mean of paired differences of ones and zeros, with the wider of two 95 % intervals.

    One is the bootstrap's; it has no width where no pair differs. The other is that of Bonett and Price, "Adjusted Wald
    Confidence Interval for a Difference of Binomial Proportions Based on Paired Data", 2012, which adds one pair of
    each discordant kind: with p = (n_up + 1) / (n + 2) and q = (n_down + 1) / (n + 2), p - q and its variance
    (p + q - (p - q)^2) / (n + 2). Here n is the number of distinct images.

    Args:
        matrix: networks x images with -1, 0 or 1, NaN for holes.
    """
    if not (~np.isnan(matrix)).any():
        return Estimate()
    images = int((~np.isnan(matrix)).any(0).sum())
    present = matrix[~np.isnan(matrix)]
    value = float(present.mean())
    up, down = ((float((present == side).mean()) * images + 1) / (images + 2) for side in (1.0, -1.0))
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    adjusted = max(-1.0, up - down - half), min(1.0, up - down + half)
    low, high = wider(bootstrap(matrix), adjusted)
    return Estimate(value, min(low, value), max(high, value))


def overlap_difference(matrix: Matrix) -> Estimate:
    """The mean of paired differences of values in [0, 1], such as shares of right labels.

    Where all differences agree, resampling shows no width; there (d + 1) / 2, which lies in [0, 1], gets Wilson's
    interval as in `overlap`.
    """
    found = mean(matrix)
    if found.low != found.high:
        return found
    low, high = wilson((found.value + 1) / 2, int((~np.isnan(matrix)).any(0).sum()))
    return Estimate(found.value, 2 * low - 1, 2 * high - 1)
