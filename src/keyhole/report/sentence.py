"""The verdict as a whole: for one setting, for several, and for audits of labels alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from keyhole.report.groups import Group
from keyhole.report.records import Row
from keyhole.report.verdict import (
    NAMED_AT_MOST,
    NOT_BROKEN_UP_TO,
    beyond_in_words,
    by_defense,
    defended,
    listed,
    percent,
    trouble,
    updates_in_words,
    worst_row,
)


def verdict(rows: Sequence[Row], groups: Sequence[Group], settings: Sequence[str], done: int, planned: int) -> str:
    """The sentence a reader takes away: undefended, then each defense under its worst attacker.

    Args:
        rows: of all attackers.
        groups: those that the rows were made of.
        settings: names of all settings, in order.
        done: trials with an outcome.
        planned: trials planned.
    """
    prefix = "" if done == planned else f"Incomplete ({done} of {planned} trials): "
    if labels_alone(rows):
        parts = _labels(rows, groups, settings)
    else:
        parts = _alone(rows, groups) if len(settings) == 1 else _several(rows, groups, settings)
    if not parts:
        text = f"no attack has produced a score{' yet' if prefix else ''}, so that nothing can be said about leaks"
        parts = [text if prefix else text.capitalize()]
    return prefix + "; ".join([*parts, *trouble(groups)]) + "."


def labels_alone(rows: Iterable[Row]) -> bool:
    """Whether every attack recovers labels and no image: then the report is about labels."""
    attacks = [row for row in rows if row.is_attack]
    return bool(attacks) and all(row.labels_only for row in attacks)


def _alone(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    defenses = by_defense(rows)
    undefended = worst_row(defenses.pop("none", []))
    if undefended is None and not any(worst_row(found) for found in defenses.values()):
        return []
    parts = [_undefended(undefended, groups)]
    if defenses:
        parts.append(defended(defenses))
        if undefended and undefended.leak_rate.value <= NOT_BROKEN_UP_TO:
            parts.append("as there was next to nothing to stop, this says little about the defenses")
    return parts


def _undefended(row: Row | None, groups: Sequence[Group]) -> str:
    if row is None:
        return "The undefended case could not be scored"
    rate_ = row.leak_rate
    several = row.networks > 1
    over = f"{row.n} cases" if several else f"{row.n} image{'s' * (row.n != 1)}"
    made_of = f"{row.images} image{'s' * (row.images != 1)} on {row.networks} networks; " if several else ""
    return (
        f"Undefended, the attacks tried recovered {row.leaks} of {over} "
        f"({made_of}{percent(rate_.value)} %, 95 % interval {percent(rate_.low)}-{percent(rate_.high)} %) "
        f"from {updates_in_words(groups)}{beyond_in_words(row)}"
    )


def _several(rows: Sequence[Row], groups: Sequence[Group], settings: Sequence[str]) -> list[str]:
    worst = {name: worst_row(r for r in rows if (r.setting, r.defense) == (name, "none")) for name in settings}
    scored = [row for row in worst.values() if row is not None]
    defenses = by_defense(rows)
    defenses.pop("none", None)
    if not scored and not any(worst_row(found) for found in defenses.values()):
        return []
    updates = {name: updates_in_words(g for g in groups if g.setting == name) for name in settings}
    same = len(set(updates.values())) == 1
    # Where not all can be named, those that leaked most are: a long audit must not hide its worst case.
    named = sorted(scored, key=lambda row: -row.leak_rate.value)[:NAMED_AT_MOST]
    named = [row for row in scored if row in named]
    items = [_item(row, "" if same else f" from {updates[row.setting]}", row is named[0]) for row in named]
    if rest := [row for row in scored if row not in named]:
        items.append(
            f"at most {percent(max(row.leak_rate.value for row in rest))} % in each of {len(rest)} more settings"
        )
    said = f"Undefended, the attacks tried recovered {listed(items)}" if items else "No undefended case could be scored"
    said += f", from {next(iter(updates.values()))} each" if same and items else ""
    parts = [said]
    if items and (missing := [name for name, row in worst.items() if row is None]):
        parts.append(f"the undefended case could not be scored in {_quoted(missing)}")
    if defenses:
        parts.append(defended(defenses, len(settings)))
        nothing = [row.setting for row in scored if row.leak_rate.value <= NOT_BROKEN_UP_TO]
        if nothing:
            where = "" if len(nothing) == len(scored) else f"in {_quoted(nothing)} "
            parts.append(f"as {where}there was next to nothing to stop, that says little about the defenses")
    return parts


def _item(row: Row, source: str, first: bool) -> str:
    unit = "" if not first else " cases" if row.networks > 1 else " images"
    rate_ = row.leak_rate
    interval = f"{'95 % interval ' if first else ''}{percent(rate_.low)}-{percent(rate_.high)} %"
    return (
        f"{row.leaks} of {row.n}{unit} in “{row.setting}” ({percent(rate_.value)} %, {interval}){source}"
        f"{beyond_in_words(row)}"
    )


def _quoted(names: Sequence[str]) -> str:
    shown = [f"“{name}”" for name in names[:NAMED_AT_MOST]]
    more = [f"{len(names) - NAMED_AT_MOST} more"] if len(names) > NAMED_AT_MOST else []
    return listed([*shown, *more])


def _labels(rows: Sequence[Row], groups: Sequence[Group], settings: Sequence[str]) -> list[str]:
    """An audit whose attacks recover labels and no image."""
    several = len(settings) > 1
    scored = [row for row in rows if row.is_attack and math.isfinite(row.labels.value)]
    bare = list(_most_labels((row.setting, row) for row in scored if row.defense == "none").values())
    defenses = _most_labels((row.defense, row) for row in scored if row.defense != "none")
    if not scored:
        return []
    named = sorted(bare, key=lambda row: -row.labels.value)[:NAMED_AT_MOST]
    items = [_labels_of(row, several, row is named[0]) for row in bare if row in named]
    if len(bare) > len(named):
        items.append(f"no more in each of {len(bare) - len(named)} other settings")
    updates = {updates_in_words(g for g in groups if g.setting == name) for name in settings}
    source = f" from {updates.pop()}" if len(updates) == 1 else ""
    said = f"Undefended, labels: {listed(items)}{source}" if items else "The undefended case could not be scored"
    parts = [f"{said}; no attack on images was tried"]
    if defenses:
        hit = [f"{r.labels_right} of {r.n} under {name}" for name, r in list(defenses.items())[:NAMED_AT_MOST]]
        more = [f"{len(defenses) - NAMED_AT_MOST} more defenses were tried"] * (len(defenses) > NAMED_AT_MOST)
        where = " in each defense's worst setting" if several else ""
        parts.append(
            "; ".join([f"with a defense, labels{where}: {listed(hit)} recovered by the worst attacker", *more])
        )
    return parts


def _most_labels(rows: Iterable[tuple[str, Row]]) -> dict[str, Row]:
    """The row with the highest label overlap under each name, the first of equals; names in order."""
    found: dict[str, Row] = {}
    for name, row in rows:
        if name not in found or row.labels.value > found[name].labels.value:
            found[name] = row
    return found


def _labels_of(row: Row, several: bool, first: bool) -> str:
    where = f" in “{row.setting}”" if several else ""
    found = row.labels
    interval = f"{'95 % interval ' if first else ''}{percent(found.low)}-{percent(found.high)} %"
    chance = f"; evenly drawn guesses: {percent(row.label_chance)} %" if math.isfinite(row.label_chance) else ""
    return f"{row.labels_right} of {row.n} recovered{where} ({percent(found.value)} %, {interval}{chance})"
