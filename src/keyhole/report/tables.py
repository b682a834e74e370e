"""Tables as rows of strings, head first, for the terminal, Markdown and the page alike.

A table has a column for the setting only where there are several, and columns for what few audits record only where
they say something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from keyhole.report.groups import LEAK_MARGIN, LEAK_SSIM
from keyhole.report.intervals import Estimate
from keyhole.report.records import Row
from keyhole.report.sentence import labels_alone
from keyhole.report.summarize import Report
from keyhole.report.text import NOTHING, fixed, rated, share

Line = tuple[str, ...]
LEVELS = {
    "fell to naive": "fell, even to naive",
    "fell": "fell to adaptive",
    "partly": "gave way in part",
    "not broken": "not broken by the attacks tried",
    "unscored": "could not be scored",
}
"""The levels of `keyhole.report.verdict.WORDS`, for a table."""

LEAK_NOTE = (
    f"A leak: SSIM of at least {LEAK_SSIM:g}, and at least {LEAK_MARGIN:g} above the best guess without the update. "
    "SSIM and PSNR are medians. Controls have no control of their own: the threshold alone counts for them."
)
LABELS_NOTE = "Labels right: the overlap of recovered and true labels, with its interval over batches and networks."
SOLVED_NOTE = "Solved: updates that the attack itself, by its own score, counts as matched; the picture may be wrong."


def placed(report: Report, setting: str, line: Iterable[str]) -> Line:
    """A line with its setting in front, where there are several."""
    return (setting, *line) if report.several else tuple(line)


def shows_success(report: Report) -> bool:
    """Whether the attacks' own count of successes says something: on a series, or where some updates are not solved."""
    known = [row.success.value for row in report.rows if row.success is not None]
    return bool(known) and (any(row.series > 1 for row in report.rows) or not (min(known) == max(known) in (0.0, 1.0)))


def names(row: Row) -> tuple[str, str, str]:
    """Defense, attack and attacker."""
    return row.defense, row.attack, row.attacker


def leak_table(report: Report) -> list[Line]:
    """A row for each attacker.

    Returns:
        Setting where there are several, defense, attack, attacker, n, leak rate with interval, median SSIM, median
        PSNR, label overlap, and the share of updates solved where that says something. Where attacks recover labels
        alone, the overlap has its interval and what is about images is left out.
    """
    alone, solved = labels_alone(report.rows), shows_success(report)
    head = ["defense", "attack", "attacker", "n", *([] if alone else ["leak rate (95 %)", "SSIM", "PSNR (dB)"])]
    head += ["labels right (95 %)" if alone else "labels right", *(["solved (95 %)"] if solved else [])]
    lines = [placed(report, "setting", head)]
    for row in report.rows:
        pictured = leaks_of(row) is not None
        similar = [fixed(row.ssim.median, 2), fixed(row.psnr.median, 1)] if pictured else [NOTHING] * 2
        line = [*names(row), str(row.n), *([] if alone else [rated(leaks_of(row)), *similar])]
        line += [rated(row.labels) if alone else share(row.label_accuracy.mean)]
        lines.append(placed(report, row.setting, [*line, *([rated(row.success)] if solved else [])]))
    return lines


def leaks_of(row: Row) -> Estimate | None:
    """The leak rate, of a row whose images mean something."""
    return None if row.labels_only and row.attacker != "control:class_mean" else row.leak_rate


def labels_of(row: Row) -> Estimate | None:
    """The label overlap."""
    return row.labels


def success_of(row: Row) -> Estimate | None:
    """The share of updates that an attacker solved by its own score."""
    return row.success if row.is_attack else None


def highest(rows: Iterable[Row], pick: Callable[[Row], Estimate | None]) -> Row | None:
    """The row with the highest of an estimate, the first of equals; `None` where no row has one."""
    found = [(value.value, row) for row in rows if (value := pick(row)) is not None and math.isfinite(value.value)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _highest(rows: Iterable[Row], pick: Callable[[Row], Estimate | None]) -> str:
    row = highest(rows, pick)
    return rated(pick(row)) if row else NOTHING


def _cell(rows: Sequence[Row], alone: bool) -> str:
    """The highest leak rate; of attacks on labels the overlap, marked where other cells are about images."""
    if not any(row.is_attack and row.labels_only for row in rows):
        return _highest(rows, leaks_of)
    found = _highest(rows, labels_of)
    return found if alone or found == NOTHING else f"labels {found}"


def verdict_table(report: Report) -> list[Line]:
    """A row for each defense: leaks under the naive and the worst adaptive attacker, and by the best control.

    For attacks that recover labels, the overlap stands in place of leaks; where there are no others, there are no
    controls.

    Returns:
        Setting where there are several, defense, attack, naive, adaptive, controls, and the share of updates solved by
        any attacker where that says something.
    """
    alone, solved = labels_alone(report.rows), shows_success(report)
    kinds = {"naive": "naive", "adaptive:": "adaptive, worst", "control:": "controls, most"}
    if alone:
        kinds = {"naive": "labels right, naive", "adaptive:": "labels right, adaptive, worst"}
    lines = [placed(report, "setting", ["defense", "attack", *kinds.values(), *(["solved, most"] if solved else [])])]
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in report.rows:
        if row.is_attack or (not alone and not row.attacker.startswith("check:")):
            cells.setdefault((row.setting, row.defense, row.attack), []).append(row)
    for (setting, *cell), own in cells.items():
        worst = [_cell([row for row in own if row.attacker.startswith(kind)], alone) for kind in kinds]
        lines.append(placed(report, setting, [*cell, *worst, *([_highest(own, success_of)] if solved else [])]))
    return lines


def overview_table(report: Report) -> list[Line]:
    """A row for each setting: the undefended case under its worst attacker, and the defense that did worst."""
    alone = labels_alone(report.rows)
    pick = labels_of if alone else leaks_of
    counts = ("labels right (95 %)",) if alone else ("leaks, undefended (95 %)", "SSIM", "labels right (95 %)")
    lines: list[Line] = [("setting", "task", "state", "threat", *counts, "worst defended")]
    for name in report.settings:
        own = [row for row in report.rows if row.setting == name]
        attacks = [row for row in own if row.is_attack]
        bare = [row for row in attacks if row.defense == "none"]
        about = (own[0].task, own[0].state, own[0].threat) if own else (NOTHING,) * 3
        worst, guarded = highest(bare, pick), highest((row for row in attacks if row.defense != "none"), pick)
        similar = () if alone else (_highest(bare, pick), fixed(worst.ssim.median, 2) if worst else NOTHING)
        last = f"{guarded.defense}: {rated(pick(guarded))}" if guarded else NOTHING
        lines.append((name, *about, *similar, _highest(bare, labels_of), last))
    return lines
