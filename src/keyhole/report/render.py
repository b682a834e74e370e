"""A report as one HTML page, as Markdown, and as rows for a table in the terminal.

The page is one file without scripts or outside resources, so that it can be mailed and archived. jinja2 and matplotlib
are imported when a page is asked for: the terminal's table and the Markdown need neither.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keyhole.core.trial import Outcome
from keyhole.errors import KeyholeError
from keyhole.report.groups import LEAK_MARGIN, LEAK_SSIM, Group, collect, is_attack
from keyhole.report.intervals import Estimate, Spread
from keyhole.report.summarize import NEAR_MSE, NEAR_SSIM, Comparison, Report, Row, Setting
from keyhole.report.verdict import FELL_FROM, NOT_BROKEN_UP_TO, beyond_controls, by_defense, level, percent, worst_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOTHING = "–"
"""Shown where there is no number."""
PICTURES = 8
"""Images in a strip."""
_LEVELS = {
    "fell to naive": "fell, even to naive",
    "fell": "fell to adaptive",
    "partly": "gave way in part",
    "not broken": "not broken by the attacks tried",
    "unscored": "could not be scored",
}
_TABLE = ("defense", "attack", "attacker", "n", "leak rate (95 %)", "SSIM", "PSNR (dB)", "labels right")
_TESTS = ("defense", "attack", "attacker", "against", "images", "difference in SSIM (95 %)", "p")
_SPENT = ("defense", "attack", "attacker", "trials by status", "evaluations", "seconds")


class Images(NamedTuple):
    """Pictures that the run stored, if it stored any."""

    secrets: dict[int, NDArray[np.floating]] | None
    """By row of the target pool: (c, h, w) in [0, 1]; `None` where secrets were not stored."""
    reconstructions: dict[str, NDArray[np.floating]]
    """By trial hash: (b, c, h, w) in [0, 1], in the order of the episode."""


# Numbers as text ------------------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else NOTHING


def _fixed(value: float, places: int) -> str:
    return f"{value:.{places}f}" if math.isfinite(value) else NOTHING


def _rate(estimate: Estimate) -> str:
    if not math.isfinite(estimate.value):
        return NOTHING
    return f"{percent(estimate.value)} % ({percent(estimate.low)}-{percent(estimate.high)})"


def _signed(estimate: Estimate) -> str:
    if not math.isfinite(estimate.value):
        return NOTHING
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _spread(spread: Spread, places: int) -> str:
    if not math.isfinite(spread.median):
        return NOTHING
    return f"{spread.median:.{places}f} ({spread.q10:.{places}f} to {spread.q90:.{places}f})"


def _spread_small(spread: Spread) -> str:
    if not math.isfinite(spread.median):
        return NOTHING
    return f"{spread.median:.1e} ({spread.q10:.1e} to {spread.q90:.1e})"


def _share(value: float) -> str:
    return f"{percent(value)} %" if math.isfinite(value) else NOTHING


def _p_value(p: float) -> str:
    if not math.isfinite(p):
        return "too few images"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _statuses(row: Row) -> str:
    return ", ".join(f"{count} {status}" for status, count in row.statuses.items())


# Terminal and Markdown ------------------------------------------------------------------------------------------------


def render_table(report: Report) -> list[tuple[str, ...]]:
    """Strings for the command line to lay out: the head, then a row for each attacker.

    Returns:
        Defense, attack, attacker, n, leak rate with interval, median SSIM, median PSNR, mean label accuracy.
    """
    rows = [
        (
            row.defense,
            row.attack,
            row.attacker,
            str(row.n),
            _rate(row.leak_rate),
            _fixed(row.ssim.median, 2),
            _fixed(row.psnr.median, 1),
            _share(row.label_accuracy.mean),
        )
        for row in report.rows
    ]
    return [_TABLE, *rows]


def render_verdict(report: Report) -> list[tuple[str, ...]]:
    """The head and one row of strings for each defense: leaks under the naive and the worst adaptive attacker.

    Returns:
        Defense, attack, naive, adaptive, best control: each as a rate with its interval.
    """
    rows: list[tuple[str, ...]] = [("defense", "attack", "naive", "adaptive, worst", "controls, most")]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        cells.setdefault((row.defense, row.attack), []).append(row)
    for (defense, attack), own in cells.items():
        kinds = ([r for r in own if r.n and r.attacker.startswith(kind)] for kind in ("naive", "adaptive:", "control:"))
        worst = (max(some, key=lambda row: row.leak_rate.value, default=None) for some in kinds)
        rows.append((defense, attack, *(_rate(row.leak_rate) if row else NOTHING for row in worst)))
    return rows


def render_markdown(report: Report) -> str:
    """The report without pictures, for a pull request or a wiki."""
    parts = [f"# Keyhole: {_escaped(report.title)}" if report.title else "# Keyhole", f"**{_escaped(report.verdict)}**"]
    if report.rows:
        first = report.rows[0]
        parts.append(f"{_escaped(first.task)}; {_escaped(first.state)}. Threat: {_escaped(first.threat)}.")
        parts.append("## Leaks\n\n" + _markdown_table(_TABLE, render_table(report)[1:]))
        parts.append(_LEAK_NOTE)
    if report.comparisons:
        tests = _markdown_table(_TESTS, map(_comparison, report.comparisons))
        parts.append(f"## Does knowing the defense help?\n\n{tests}")
    if report.rows:
        parts.append("## Budget\n\n" + _markdown_table(_SPENT, map(_spent, report.rows)))
    if report.versions:
        listed = "\n".join(f"- {_escaped(name)} {_escaped(version)}" for name, version in report.versions.items())
        parts.append(f"## Versions\n\n{listed}")
    return "\n\n".join(parts) + "\n"


_LEAK_NOTE = (
    f"A leak: SSIM of at least {LEAK_SSIM:g}, and at least {LEAK_MARGIN:g} above the best guess without the update. "
    "SSIM and PSNR are medians. Controls have no control of their own: the threshold alone counts for them."
)


def _comparison(test: Comparison) -> tuple[str, ...]:
    names = (test.defense, test.attack, test.attacker, test.against)
    return (*names, str(test.n), _signed(test.difference), _p_value(test.p))


def _spent(row: Row) -> tuple[str, ...]:
    return (*_names(row), _statuses(row), f"{row.evaluations:,}", f"{row.seconds:,.1f}")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, without markup or raw HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# HTML -----------------------------------------------------------------------------------------------------------------


def render_html(report: Report, setting: Setting, outcomes: Sequence[Outcome], images: Images | None) -> str:
    """The whole report as one page.

    Args:
        report: what `summarize` made of the outcomes.
        setting: the same setting.
        outcomes: the same outcomes, for curves, histories and pictures.
        images: pictures that the run stored; `None` where it stored none.

    Returns:
        HTML that refers to no other file.
    """
    try:
        import jinja2

        from keyhole.report import figures
    except ImportError as error:
        raise KeyholeError(
            f"the HTML report needs {error.name}; install it with `pip install keyhole[report]`."
        ) from error
    groups = collect(setting.planned, outcomes)
    cells: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        cells.setdefault(group.cell, []).append(group)
    class_mean = [group for group in groups if group.attacker == "control:class_mean"]
    attacked = {cell: found for cell, found in cells.items() if any(is_attack(g.attacker) for g in found)}
    panels = []
    for cell, found in attacked.items():
        shared = [group for group in class_mean if group not in found]
        attackers = [group for group in found if is_attack(group.attacker)]
        panels.append(
            {
                "title": _cell_title(cell, attacked),
                "curve": figures.leak_curve([*found, *shared]) if any(group.entries for group in found) else None,
                "history": figures.loss_history(attackers),
                "strip": _strip(found, images, figures.picture) if images is not None else None,
            }
        )
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"breakable": _breakable, "stacked": _stacked}
    return env.get_template("report.html.j2").render(
        report=report,
        setting=setting,
        meaning=_meaning(report),
        grid=_grid(report),
        panels=panels,
        stored=images is not None,
        secrets_stored=images is not None and images.secrets is not None,
        metrics=_metrics(report),
        notes=_notes(report),
        comparisons=[_comparison(test) for test in report.comparisons],
        budget=[_spent(row) for row in report.rows],
        troubles=_troubles(groups),
        leak_note=_LEAK_NOTE,
        constants={
            "ssim": LEAK_SSIM,
            "margin": LEAK_MARGIN,
            "near": NEAR_SSIM,
            "mse": NEAR_MSE,
            "low": percent(NOT_BROKEN_UP_TO),
            "high": percent(FELL_FROM),
            "pictures": PICTURES,
        },
    )


def _breakable(text: str) -> str:
    """A name that a narrow column may break before its options, rather than anywhere."""
    from markupsafe import Markup, escape

    return escape(text).replace("(", Markup("(<wbr>"))


def _stacked(text: str) -> str:
    """A number with what stands in brackets behind it on a line of its own."""
    from markupsafe import Markup

    value, _, rest = text.partition(" (")
    return Markup("{}<br><small>{}</small>").format(value, rest.rstrip(")")) if rest else value


def _names(row: Row) -> tuple[str, str, str]:
    return row.defense, row.attack, row.attacker


def _cell_title(cell: tuple[str, str], cells: Iterable[tuple[str, str]]) -> str:
    defense = "No defense" if cell[0] == "none" else cell[0]
    return f"{defense}, attack {cell[1]}" if len({attack for _, attack in cells}) > 1 else defense


def _meaning(report: Report) -> list[str]:
    """Two or three sentences on what to make of the verdict."""
    defenses = by_defense(report.rows)
    undefended = worst_row(defenses.pop("none", []))
    said = []
    if undefended is not None:
        share = undefended.leak_rate.value
        if share >= FELL_FROM:
            said.append("Assume that whoever receives an undefended update can see the private images behind it.")
        elif share > NOT_BROKEN_UP_TO:
            said.append("Whoever receives an undefended update can see some of the private images behind it.")
        elif beyond_controls(undefended):
            said.append(
                "Reconstructions from undefended updates stay below the leak threshold, but resemble the private "
                "images more than any guess without the update does: look at the pictures. A stronger attack may "
                "recover them."
            )
        else:
            said.append("The attacks tried found next to nothing in undefended updates; a stronger attack still might.")
    found = {level(rows) for rows in defenses.values()}
    if "fell" in found:
        said.append("A defense that fell to an attacker who knows it hides images only from those who do not.")
    if "not broken" in found:
        said.append("“Not broken” is about these attacks, this budget and this data: another attack may still succeed.")
    if len(said) < 3 and (scored := [row for row in report.rows if row.is_attack and row.n]):
        most = max(scored, key=lambda row: row.n)
        networks = "one network" if most.networks == 1 else f"{most.networks} networks"
        said.append(f"The results rest on {most.images} images and {networks}; the intervals say how far that goes.")
    return said


def _grid(report: Report) -> dict[str, Any]:
    """The table of defenses against attackers: its head, and its lines of coloured cells."""
    columns = {"naive": "Naive", "adaptive": "Adaptive", "control:prior_only": "Control: prior only"}
    columns |= {"control:other_client": "Control: other client", "control:class_mean": "Control: class mean"}
    cells: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in report.rows:
        if row.is_attack:
            cells.setdefault((row.defense, row.attack), {})
    shared = [row for row in report.rows if row.attacker == "control:class_mean"]
    for cell, found in cells.items():
        for row in report.rows:
            if (row.defense, row.attack) == cell:
                kind = "adaptive" if row.attacker.startswith("adaptive:") else row.attacker
                found.setdefault(kind, []).append(row)
        if shared:
            found["control:class_mean"] = shared
    used = [kind for kind in columns if any(kind in found for found in cells.values())]
    by_name = by_defense(report.rows)
    lines = [
        {
            "defense": cell[0],
            "attack": cell[1],
            "level": "" if cell[0] == "none" else _LEVELS[level(by_name[cell[0]])],
            "cells": [[_block(row) for row in found.get(kind, [])] for kind in used],
        }
        for cell, found in cells.items()
    ]
    return {"head": [columns[kind] for kind in used], "lines": lines}


def _block(row: Row) -> dict[str, str]:
    rate = row.leak_rate
    if not row.n:
        return {"rate": "not scored", "count": _statuses(row), "interval": "", "name": "", "color": "#ffffff"}
    return {
        "rate": f"{percent(rate.value)} %",
        "count": f"{row.leaks} of {row.n}",
        "interval": f"{percent(rate.low)}-{percent(rate.high)} %",
        "name": row.attacker.partition(":")[2] if row.attacker.startswith("adaptive:") else "",
        "color": _color(rate.value),
    }


def _color(share: float) -> str:
    """From gray at 0 to red at 1. Never green: a low rate is no promise. Dark text stays readable on all of them."""
    low, high = (238, 241, 244), (240, 128, 108)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def _strip(found: Sequence[Group], images: Images, picture: Any) -> dict[str, Any] | None:
    """Pictures of one cell: a line each for secret, naive, adaptive and best control."""
    naive = next((group for group in found if group.attacker == "naive"), None)
    adaptive = max(
        (group for group in found if group.attacker.startswith("adaptive:") and group.entries),
        key=lambda group: (sum(map(group.leaks, group.entries)), sum(e.ssim for e in group.entries.values())),
        default=None,
    )
    chooser = adaptive or naive
    if chooser is None or not chooser.entries:
        return None
    ranked = sorted(chooser.entries, key=lambda key: (chooser.entries[key].ssim, key))
    count = min(PICTURES, len(ranked))
    # From the worst to the best at even distances: a strip of the best alone would show what rarely happens.
    keys = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]

    def item(group: Group, key: tuple[int, int], entries: dict[tuple[int, int], Any], mark: bool) -> dict[str, Any]:
        entry = entries.get(key)
        stored = images.reconstructions.get(entry.hash) if entry else None
        leak = mark and entry is not None and group.leaks(key)
        return {
            "src": _source(stored[entry.position], picture) if entry and stored is not None else None,
            "text": NOTHING if entry is None else f"{entry.ssim:.2f}{' leak' if leak else ''}",
            "leak": leak,
        }

    lines = []
    if images.secrets is not None:
        secrets = [images.secrets.get(row) for _, row in keys]
        drawn = [_source(secret, picture) if secret is not None else None for secret in secrets]
        lines.append({"name": "Secret", "items": [{"src": src, "text": "", "leak": False} for src in drawn]})
    for name, group in (("Naive", naive), (_spoken(adaptive.attacker) if adaptive else "", adaptive)):
        if group is not None:
            lines.append({"name": name, "items": [item(group, key, group.entries, True) for key in keys]})
    if chooser.controls:
        lines.append({"name": "Best control", "items": [item(chooser, k, chooser.controls, False) for k in keys]})
    several = len({seed for seed, _ in chooser.entries}) > 1
    heads = [f"image {row}, seed {seed}" if several else f"image {row}" for seed, row in keys]
    return {"heads": heads, "lines": lines, "by": chooser.attacker, "of": len(ranked)}


def _spoken(attacker: str) -> str:
    """``adaptive:x`` as ``Adaptive: x``, which can break between words."""
    return attacker.capitalize().replace(":", ": ")


def _source(image: NDArray[np.floating], picture: Any) -> str | None:
    return picture(image) if image.ndim == 3 else None  # other data has no picture


def _metrics(report: Report) -> dict[str, Any]:
    head = ["Defense", "Attack", "Attacker", "n", "Networks"]
    head += [
        "Leak rate",
        f"SSIM ≥ {NEAR_SSIM:g}",
        f"MSE < {NEAR_MSE:g}",
        "SSIM",
        "PSNR (dB)",
        "MSE",
        "Labels right",
        "Lift in SSIM",
        "Update norm",
        "Zeros in update",
    ]
    identified = any(row.identified for row in report.rows)
    lines = []
    for row in report.rows:
        line = [*_names(row), str(row.n), str(row.networks)]
        line += [_rate(row.leak_rate), _rate(row.leak_rate_90), _rate(row.leak_rate_mse)]
        line += [_spread(row.ssim, 2), _spread(row.psnr, 1), _spread_small(row.mse), _share(row.label_accuracy.mean)]
        line += [_signed(row.lift), _number(row.update_norm), _share(row.zeros)]
        line += [*([_rate(row.identified or Estimate())] if identified else [])]
        lines.append(line)
    return {"head": head + ["Identified"] * identified, "lines": lines}


def _notes(report: Report) -> list[str]:
    notes = []
    if broken := sum(row.nan for row in report.rows):
        notes.append(f"Reconstructions with a score that is not a number: {broken}. They count as no leak.")
    if missing := sum(row.uncontrolled for row in report.rows):
        notes.append(
            f"Scores without a control to compare with: {missing}. There SSIM of {LEAK_SSIM:g} alone makes a leak."
        )
    if report.unplanned:
        notes.append(f"Stored outcomes that belong to no planned trial: {report.unplanned}. They were left out.")
    return notes


def _troubles(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Trials that ended without an answer, and why: status, attacker, count and reason."""
    tally = Tally(
        (outcome.status, group.defense, group.attack, group.attacker, outcome.detail)
        for group in groups
        for outcome in group.outcomes
        if outcome.status in ("refused", "failed", "diverged")
    )
    return [(*names, str(count), detail or NOTHING) for (*names, detail), count in tally.items()]
