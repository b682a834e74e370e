"""Numbers as text, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math

from keyhole.report.intervals import Estimate, Spread
from keyhole.report.verdict import percent

NOTHING = "–"
"""Shown where there is no number."""


def number(value: float, digits: int = 3) -> str:
    """So many significant digits."""
    return f"{value:.{digits}g}" if math.isfinite(value) else NOTHING


def fixed(value: float, places: int) -> str:
    """So many decimals."""
    return f"{value:.{places}f}" if math.isfinite(value) else NOTHING


def share(value: float) -> str:
    """A share without an interval, such as ``81 %``."""
    return f"{percent(value)} %" if math.isfinite(value) else NOTHING


def rated(estimate: Estimate | None) -> str:
    """A share with its interval, such as ``81 % (57-93)``."""
    if estimate is None or not math.isfinite(estimate.value):
        return NOTHING
    return f"{percent(estimate.value)} % ({percent(estimate.low)}-{percent(estimate.high)})"


def signed(estimate: Estimate, places: int = 2) -> str:
    """A difference with its interval where it has one, such as ``+0.50 (+0.41 to +0.58)``."""
    if not math.isfinite(estimate.value):
        return NOTHING
    value, low, high = (_zeroed(f"{v:+,.{places}f}") for v in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} ({low} to {high})"


def _zeroed(text: str) -> str:
    """A zero has no sign: -0.00 would look like a decrease."""
    return text if text.strip("+-0.,") else text.lstrip("+-")


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, such as ``+12 pp (+3 to +20)``."""
    if not math.isfinite(estimate.value):
        return NOTHING
    scaled = Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
    value, *interval = signed(scaled, 0).split(" ", 1)
    return " ".join([value, "pp", *interval])


def spread_out(spread: Spread, places: int) -> str:
    """Median and the middle 80 %."""
    if not math.isfinite(spread.median):
        return NOTHING
    return f"{spread.median:.{places}f} ({spread.q10:.{places}f} to {spread.q90:.{places}f})"


def spread_small(spread: Spread) -> str:
    """As `spread_out`, for numbers such as 3.1e-05."""
    if not math.isfinite(spread.median):
        return NOTHING
    return f"{spread.median:.1e} ({spread.q10:.1e} to {spread.q90:.1e})"


def p_value(p: float) -> str:
    """A p value, or why there is none."""
    if not math.isfinite(p):
        return "too few images"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
