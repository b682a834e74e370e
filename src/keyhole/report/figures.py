"""Pictures and curves of the report, each as a data URI so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from keyhole.report.groups import LEAK_SSIM, Group
from keyhole.report.intervals import Estimate
from keyhole.report.records import is_attack

LARGEST = 160
"""Pixels; larger pictures are embedded reduced, because the page shows no more."""
THIN_LINES = 24
"""Single loss histories drawn for one attacker."""

_ADAPTIVE = ("#c8501e", "#a23b8f", "#8a6d00", "#7a3b1e")
_DASHES = {"control:prior_only": (0, (5, 2)), "control:other_client": (0, (1.5, 1.5))}
_OTHER_DASH = (0, (7, 2, 1.5, 2))
_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#333a42",
    "xtick.color": "#333a42",
    "ytick.color": "#333a42",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    # Without a fixed salt the ids inside an SVG, and with them the whole page, would differ from run to run.
    "svg.hashsalt": "keyhole",
}

_BELOW: Any = {"loc": "outside lower center", "ncols": 2, "handlelength": 2.6}
"""Where the legend of a panel is."""

_WIDE = (7.6, 3.8)
"""Inches, with room for a legend of many defenses beside the axes."""


def picture(image: NDArray[np.floating]) -> str:
    """A PNG of one image.

    Args:
        image: (c, h, w) in [0, 1]; anything but three channels is shown as its first channel. NaN becomes black.

    Returns:
        A data URI.
    """
    return _png(image, LARGEST)


def mosaic(images: NDArray[np.floating], scale: int = 2) -> str:
    """A PNG of many images, a row for each class.

    Args:
        images: (k, n, c, h, w) in [0, 1].
        scale: times that each pixel is enlarged.

    Returns:
        A data URI.
    """
    rows, columns, channels, height, width = images.shape
    sheet = np.ones((channels, rows * (height + 1) - 1, columns * (width + 1) - 1))
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + 1), column * (width + 1)
            sheet[:, top : top + height, left : left + width] = images[row, column]
    return _png(sheet.repeat(scale, 1).repeat(scale, 2))


def _png(image: NDArray[np.floating], largest: int | None = None) -> str:
    pixels = np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    drawn = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
    if largest is not None and max(drawn.size) > largest:
        drawn.thumbnail((largest, largest))
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return _uri("image/png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _axes(size: tuple[float, float] = (3.9, 3.0)) -> tuple[Figure, Axes]:
    # A figure for each panel, rather than subplots, so that the page can arrange them for its width. No pyplot: it
    # keeps every figure alive and would choose a backend for the whole process.
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e4e8ec", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, axes: Axes, **legend: Any) -> str:
    if axes.get_legend_handles_labels()[1]:
        figure.legend(**legend)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", buffer)


def _colors(groups: Sequence[Group]) -> dict[str, str]:
    """Blue for naive, warm colours for adaptive attackers, gray for controls."""
    adaptive = [group.attacker for group in groups if group.attacker.startswith("adaptive:")]
    warm = {name: _ADAPTIVE[i % len(_ADAPTIVE)] for i, name in enumerate(adaptive)}
    return {"naive": "#1f5fa8", **warm}


def leak_curve(groups: Sequence[Group]) -> str:
    """Share of images at or above each SSIM, one line for each attacker of a cell; controls are dashed.

    Args:
        groups: the attackers and controls of one cell.

    Returns:
        A data URI with an SVG.
    """
    thresholds = np.linspace(0, 1, 201)
    colors = _colors(groups)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        axes.axvline(LEAK_SSIM, color="#8a94a0", linewidth=0.9)
        axes.annotate(f"{LEAK_SSIM:g}", (LEAK_SSIM, 1.0), (2, 2), textcoords="offset points", color="#59636e")
        for group in groups:
            if not group.entries or group.attacker.startswith("check:"):
                continue
            ssim = np.array([entry.ssim for entry in group.entries.values()])
            share = (ssim[None, :] >= thresholds[:, None]).mean(1)
            attack = is_attack(group.attacker)
            axes.plot(
                thresholds,
                share,
                label=group.attacker,
                color=colors.get(group.attacker, "#6b747d"),
                linewidth=1.8 if attack else 1.2,
                linestyle="-" if attack else _DASHES.get(group.attacker, _OTHER_DASH),
            )
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="SSIM threshold", ylabel="share of images at or above")
        return _finish(figure, axes, **_BELOW)


def loss_history(groups: Sequence[Group]) -> str | None:
    """Best objective so far against evaluations: thin lines for single trials, a thick one for their median.

    Args:
        groups: the attackers of one cell.

    Returns:
        A data URI with an SVG; `None` where no history has a finite value.
    """
    colors = _colors(groups)
    smallest = np.inf
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for group in groups:
            grid, values = _histories(group)
            if not grid.size:
                continue
            color = colors.get(group.attacker, "#6b747d")
            step = max(1, -(-len(values) // THIN_LINES))
            for line in values[::step]:
                axes.plot(grid, line, color=color, linewidth=0.5, alpha=0.35)
            # A single evaluation makes no line.
            dot = "o" if grid.size == 1 else None
            axes.plot(grid, np.nanmedian(values, axis=0), marker=dot, color=color, linewidth=2, label=group.attacker)
            smallest = min(smallest, float(np.nanmin(values)))
        if not np.isfinite(smallest):
            return None
        # A cosine distance can come out at or below zero; a log axis would silently drop it.
        axes.set_yscale("log" if smallest > 0 else "symlog", **({} if smallest > 0 else {"linthresh": 1e-6}))
        axes.set(xlabel="evaluations of the objective", ylabel="best objective so far")
        return _finish(figure, axes, **_BELOW)


def _histories(group: Group) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A grid of evaluations, and each trial's best value so far on it: held after its end, NaN before its start."""
    lines = [np.array([p for p in o.history if np.isfinite(p[1])], dtype=np.float64) for o in group.outcomes]
    lines = [line[np.argsort(line[:, 0], kind="stable")] for line in lines if len(line)]
    if not lines:
        return np.empty(0), np.empty((0, 0))
    grid = np.unique(np.linspace(min(line[0, 0] for line in lines), max(line[-1, 0] for line in lines), 120))
    values = np.full((len(lines), grid.size), np.nan)
    for held, line in zip(values, lines, strict=True):
        last = np.searchsorted(line[:, 0], grid, side="right") - 1
        held[last >= 0] = line[last[last >= 0], 1]
    return grid, values


def _look(number: int) -> dict[str, Any]:
    """A colour and a marker for the ``number``-th defense: colours alone do not tell more than ten apart."""
    return {"color": f"C{number % 10}", "marker": "osD^vPX*<>"[(number + number // 10) % 10]}


def trade_off(
    points: Sequence[tuple[str, Estimate, Estimate]], x: str = "images leaked to the worst attacker, %"
) -> str:
    """Accuracy against the worst attacker's leak rate, one point with its intervals and its number for each defense.

    Args:
        points: name, accuracy and leak rate of each defense; those without a leak rate are left out.
        x: what the leak rate is.

    Returns:
        A data URI with an SVG.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        for number, (name, accuracy, leak) in enumerate(points):
            if not np.isfinite(leak.value):
                continue
            across, up = 100 * leak.value, 100 * accuracy.value
            bars = [_arms(leak), _arms(accuracy)]
            axes.errorbar(
                across, up, xerr=bars[0], yerr=bars[1], linestyle="", markersize=6, elinewidth=0.7,
                label=f"{number + 1}: {name}", **_look(number),
            )  # fmt: skip
            axes.annotate(str(number + 1), (across, up), (5, 4), textcoords="offset points", color="#333a42")
        axes.set(xlim=(-3, 103), xlabel=x, ylabel="test accuracy, %")
        return _finish(figure, axes, loc="outside right upper")


def _arms(value: Estimate) -> list[list[float]] | None:
    """How far an interval reaches below and above its value, in percent."""
    if not (np.isfinite(value.low) and np.isfinite(value.high)):
        return None
    return [[100 * max(0.0, value.value - value.low)], [100 * max(0.0, value.high - value.value)]]


def leaks_by_round(
    lines: Sequence[tuple[str, Sequence[tuple[int, Estimate]]]],
    x: str = "rounds of training before the update",
    y: str = "images leaked, %",
) -> str:
    """The worst attacker's leak rate at each audited round, a line for each defense; ``x`` and ``y`` name the axes.

    Lines lie a little beside each other, as those of several defenses may coincide.

    Returns:
        A data URI with an SVG.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        apart = 0.008 * max((n for _, each in lines for n, _ in each), default=0)
        for number, (name, each) in enumerate(lines):
            if each:
                aside = apart * (number - (len(lines) - 1) / 2)
                rounds, rates = zip(*((n + aside, 100 * rate.value) for n, rate in each), strict=True)
                axes.plot(rounds, rates, label=f"{number + 1}: {name}", linewidth=1.4, markersize=5, **_look(number))
        axes.set_xticks(sorted({n for _, each in lines for n, _ in each}))
        axes.set(ylim=(-3, 103), xlabel=x, ylabel=y)
        return _finish(figure, axes, loc="outside right upper")
