"""Sentences around the tables: what to make of the verdict, what the numbers leave out, and what went wrong."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Iterable, Sequence

from keyhole.report.groups import LEAK_SSIM, Group
from keyhole.report.records import Row, Setting
from keyhole.report.sentence import labels_alone
from keyhole.report.summarize import Report
from keyhole.report.tables import Line, highest, labels_of
from keyhole.report.text import NOTHING
from keyhole.report.verdict import FELL_FROM, NOT_BROKEN_UP_TO, beyond_controls, by_defense, level, percent, worst_row


def meaning(report: Report) -> list[str]:
    """Two to four sentences on what to make of the verdict; the last one says on how much it rests."""
    if labels_alone(report.rows):
        return _of_labels(report)
    defenses = by_defense(report.rows)
    undefended = worst_row(defenses.pop("none", []))
    said = []
    if undefended is not None:
        said.append(_of_leaks(undefended, f" (in “{undefended.setting}”, the worst setting)" * report.several))
    found = {level(rows) for rows in defenses.values()}
    if "fell" in found:
        said.append("A defense that fell to an attacker who knows it hides images only from those who do not.")
    if "not broken" in found:
        said.append("“Not broken” is about these attacks, this budget and this data: another attack may still succeed.")
    if scored := [row for row in report.rows if row.is_scored]:
        said.append(_rests_on(scored, report.several))
    return said


def _of_leaks(undefended: Row, where: str) -> str:
    share = undefended.leak_rate.value
    if share >= FELL_FROM:
        return f"Assume that whoever receives an undefended update{where} can see the private images behind it."
    if share > NOT_BROKEN_UP_TO:
        return f"Whoever receives an undefended update{where} can see some of the private images behind it."
    if beyond_controls(undefended):
        return (
            f"Reconstructions from undefended updates{where} stay below the leak threshold, but resemble the private "
            "images more than any guess without the update does: look at the pictures. A stronger attack may "
            "recover them."
        )
    return f"The attacks tried found next to nothing in undefended updates{where}; a stronger attack still might."


def _of_labels(report: Report) -> list[str]:
    bare = highest((row for row in report.rows if row.is_attack and row.defense == "none"), labels_of)
    said = ["Labels say which classes of images a client holds, and how many; no attack on images was tried here."]
    if bare is not None and bare.labels.low > bare.label_chance:
        said.append(
            "Whoever receives an undefended update can tell more about its labels than evenly drawn guesses do."
        )
    return said


def _rests_on(scored: Sequence[Row], several: bool) -> str:
    most = max(scored, key=lambda row: row.n)
    networks = "one network" if most.networks == 1 else f"{most.networks} networks"
    at_most = "at most " if several else ""
    return f"The results rest on {at_most}{most.images} images and {networks}; the intervals say how far that goes."


def notes(report: Report) -> list[str]:
    """What stands above the table of all metrics: odd scores and outcomes, and how many labels are right by chance."""
    said = []
    chances = {row.setting: row.label_chance for row in report.rows if math.isfinite(row.labels.value)}
    chances = {setting: chance for setting, chance in chances.items() if math.isfinite(chance)}
    if chances:
        each = sorted(set(chances.values()))
        about = f"{percent(each[0])} %" if len(each) == 1 else f"{percent(each[0])} to {percent(each[-1])} %"
        said.append(
            f"Labels drawn evenly at random would be right about {about} of the time, in batches of such labels."
        )
    if broken := sum(row.nan for row in report.rows):
        said.append(f"Reconstructions with a score that is not a number: {broken}. They count as no leak.")
    if missing := sum(row.uncontrolled for row in report.rows if not row.labels_only):
        said.append(
            f"Scores without a control to compare with: {missing}. There SSIM of {LEAK_SSIM:g} alone makes a leak."
        )
    if report.unplanned:
        said.append(f"Stored outcomes that belong to no planned trial: {report.unplanned}. They were left out.")
    return said


def troubles(groups: Sequence[Group], several: bool) -> list[Line]:
    """Trials that ended without an answer, and why: setting (of several), status, attacker, count, reason."""
    tally = Tally(
        (*((group.setting,) if several else ()), outcome.status, group.defense, group.attack, group.attacker, detail)
        for group in groups
        for outcome in group.outcomes
        if outcome.status in ("refused", "failed", "diverged")
        for detail in (outcome.detail,)
    )
    head = ("status", "defense", "attack", "attacker", "trials", "reason")
    lines: list[Line] = [("setting", *head) if several else head]
    return [*lines, *((*names, str(count), detail or NOTHING) for (*names, detail), count in tally.items())]


def shared_sentences(settings: Sequence[Setting], own: Iterable[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Sentences that all settings have, once, and for each setting those that are left.

    Args:
        settings: all of them.
        own: the sentences of each, in the same order.
    """
    each = [list(sentences) for sentences in own]
    common = [said for said in each[0] if all(said in sentences for sentences in each)] if len(settings) > 1 else []
    return common, [[said for said in sentences if said not in common] for sentences in each]
