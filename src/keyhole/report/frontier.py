"""The frontier's report: how much accuracy each defense leaves, beside what its worst attacker recovers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keyhole.experiment.frontier import Place, places
from keyhole.experiment.store import Store
from keyhole.experiment.train import Trained
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.report.intervals import Estimate
from keyhole.report.names import UNDEFENDED, defense_name
from keyhole.report.records import Images, Row
from keyhole.report.render import render_html
from keyhole.report.sent import NOTE as SENT_NOTE
from keyhole.report.sent import read_sent, sent_in_words, sent_strips, sent_table
from keyhole.report.summarize import Report, plain, summarize
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING, rated
from keyhole.report.training import (
    accuracy_in_words,
    accuracy_of,
    by_defense,
    change,
    cost,
    epsilon_in_words,
    guarantee,
    points_in_words,
    remarks,
    write_training,
)
from keyhole.report.verdict import FELL_FROM, NOT_BROKEN_UP_TO, percent
from keyhole.report.write import read_audit

NOTE = (
    "Accuracy: on held-out images after the last round, with the wider of the intervals over trainings and over these "
    "images. Change: to the trainings without a defense, paired by seed. Worst leak rate: the highest of all "
    "attackers, naive or adaptive, at all audited rounds, with that attacker's interval. Epsilon: of the whole "
    "training, an image as the unit. Bound: on what any attack can recover from the audited updates and all rounds "
    "before them."
)
HEAD = (
    "defense", "accuracy (95 %)", "change in points (95 %)", "worst leak rate (95 %)", "at", "worst attacker",
    "epsilon", "bound on any attack", "MB sent up", "client seconds a round",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A defense at one strength: what it costs and what it leaves to find."""

    defense: str
    accuracy: Estimate
    change: Estimate
    """Of the accuracy, to that without a defense, paired by seed; NaN for that one itself."""
    leak_rate: Estimate
    """Of the worst attacker at the worst round."""
    round: int | None
    """Where that was; `None` where no attack was scored."""
    attack: str
    attacker: str
    epsilon: float | None
    bound: float
    """The largest of the audited rounds; NaN where there is none."""
    bytes_up: int
    client_seconds: float
    by_round: tuple[tuple[int, Estimate], ...]
    """The worst leak rate at each audited round."""


def points(plan: TrainingPlan, done: Sequence[Trained], report: Report) -> list[Point]:
    """One for each defense, in the order of the file."""
    where = {place.setting: place for place in places(plan, defense_name)}
    found = []
    trained = by_defense(done)
    for name, runs in trained.items():
        # Of networks trained under another defense only the bare updates were attacked.
        own = [
            row
            for row in report.rows
            if row.defense == name and row.is_attack and _is_own(where[row.setting], runs, plan)
        ]
        scored = [row for row in own if row.is_scored]
        worst = max(scored, key=lambda row: row.leak_rate.value, default=None)
        rounds = sorted({where[row.setting].round for row in scored})
        each = tuple(
            (number, max((r for r in scored if where[r.setting].round == number), key=_rate).leak_rate)
            for number in rounds
        )
        sent, seconds = cost(runs)
        found.append(
            Point(
                defense=name,
                accuracy=accuracy_of(runs),
                change=change(name, trained),
                leak_rate=Estimate() if worst is None else worst.leak_rate,
                round=None if worst is None else where[worst.setting].round,
                attack="" if worst is None else worst.attack,
                attacker="" if worst is None else worst.attacker,
                epsilon=guarantee(runs),
                bound=max((row.bound for row in own if math.isfinite(row.bound)), default=math.nan),
                bytes_up=sent,
                client_seconds=seconds,
                by_round=each,
            )
        )
    return found


def _rate(row: Row) -> float:
    return row.leak_rate.value


def _is_own(place: Place, runs: Sequence[Trained], plan: TrainingPlan) -> bool:
    """Whether a setting's networks are untrained or were trained under this defense."""
    return place.defense is None or plan.defenses[place.defense] == runs[0].defense


def frontier_table(found: Sequence[Point]) -> list[Line]:
    """A row for each defense."""
    lines: list[Line] = [HEAD]
    for point in found:
        at = NOTHING if point.round is None else f"round {point.round}"
        lines.append(
            (
                point.defense, accuracy_in_words(point.accuracy), points_in_words(point.change),
                rated(point.leak_rate), at,
                f"{point.attack}, {point.attacker}" if point.attacker else NOTHING, epsilon_in_words(point.epsilon),
                f"{percent(point.bound)} %" if math.isfinite(point.bound) else NOTHING, f"{point.bytes_up / 1e6:.3g}",
                f"{point.client_seconds:.3g}",
            )
        )  # fmt: skip
    return lines


def answer(found: Sequence[Point], chance: float, size: int = 1) -> list[str]:
    """Which defenses held and what they cost, a sentence for each group; within it the most accurate first.

    Args:
        found: the defenses.
        chance: accuracy of naming one class for all held-out images.
        size: images behind each attacked update.
    """
    said = []
    idle = False
    groups: dict[str, list[Point]] = {title: [] for title, _ in GROUPS}
    for point in found:
        worst = point.leak_rate.value
        if point.defense == UNDEFENDED:
            leaks = "no attack could be scored" if math.isnan(worst) else (
                f"{percent(worst)} % of the attacked images, {'one' if size == 1 else size} behind each update, leaked "
                "to the worst attacker"
            )  # fmt: skip
            near = _near(point.accuracy, chance)
            said.append(f"Without a defense the accuracy is {accuracy_in_words(point.accuracy)}{near}, and {leaks}.")
            idle = worst <= NOT_BROKEN_UP_TO
        else:
            groups[next(title for title, holds in GROUPS if holds(worst))].append(point)
    for title, own in groups.items():
        if own:
            names = (_priced(p, chance) for p in sorted(own, key=lambda p: -p.accuracy.value))
            said.append(f"{title}: {', '.join(names)}.")
    if idle and any(groups.values()):
        said.append("As there was next to nothing to stop, this says little about the defenses.")
    return said


GROUPS: tuple[tuple[str, Callable[[float], bool]], ...] = (
    ("Not broken by the attacks tried", lambda worst: worst <= NOT_BROKEN_UP_TO),
    ("Gave way in part", lambda worst: worst < FELL_FROM),
    ("Fell", lambda worst: worst >= FELL_FROM),
    ("Could not be scored", math.isnan),
)
"""How a defense did by its worst leak rate, the first that holds; the bars are those of an audit's verdict."""


def _priced(point: Point, chance: float) -> str:
    """A defense with its accuracy."""
    return f"{point.defense} (accuracy {100 * point.accuracy.value:.1f} %{_near(point.accuracy, chance)})"


def _near(accuracy: Estimate, chance: float) -> str:
    """Said of a network that may have learned nothing."""
    low = accuracy.value if math.isnan(accuracy.low) else accuracy.low
    return f", not clearly above the {100 * chance:.1f} % of guessing one class" if low <= chance else ""


def rows_json(
    plan: TrainingPlan, done: Sequence[Trained], report: Report, found: Sequence[Point], said: Sequence[str]
) -> dict[str, Any]:
    """The report of the audit, each row with the training that its networks come from, and the points.

    ``accuracy`` is that of the training's end, ``epsilon`` that of the row's own defense over a whole training.
    """
    where = {place.setting: place for place in places(plan, defense_name)}
    runs = by_defense(done)
    whole = report.asdict()
    for row in whole["rows"]:
        place = where[row["setting"]]
        under = row["defense"] if place.defense is None else defense_name(plan.defenses[place.defense])
        row["trained_under"] = under
        row["accuracy"] = plain(asdict(accuracy_of(runs[under])))
        row["round"] = place.round
        row["epsilon"] = plain(guarantee(runs[row["defense"]]))
    given = {"answer": " ".join(said), "points": plain([asdict(p) for p in found]), "remarks": remarks(done)}
    return {**whole, "kind": "frontier", **given}


def write_frontier(plan: TrainingPlan, done: Sequence[Trained], folder: Path) -> tuple[list[Line], list[str], Path]:
    """Write ``train.json``, ``report.json`` and ``report.html``; returns the table, the answer and the page."""
    settings, outcomes = read_audit(folder / "audit")
    report = summarize(settings, outcomes)
    write_training(plan, done, folder)
    store = Store(folder)
    found = points(plan, done, report)
    sent = read_sent(folder)
    said = [
        *answer(found, done[0].chance, plan.audit.client.size if plan.audit else 1),
        *filter(None, [sent_in_words(sent)]),
    ]
    text = json.dumps({**rows_json(plan, done, report, found, said), "sent": sent}, indent=2, allow_nan=False) + "\n"
    store.write_text("report.json", text)
    reconstructions, secrets = Store(folder / "audit").images()
    images = Images(secrets, reconstructions) if reconstructions else None
    page = render_html(report, settings, outcomes, images, _section(found, said, remarks(done), sent, folder))
    return frontier_table(found), said, store.write_text("report.html", page)


def _section(
    found: Sequence[Point], said: Sequence[str], noted: Sequence[str], sent: Sequence[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """What the page's section on accuracy shows."""
    from keyhole.report.figures import leaks_by_round, trade_off

    return {
        "answer": list(said),
        "note": NOTE,
        "table": frontier_table(found),
        "remarks": list(noted),
        "sent": sent_table(sent),
        "sent_note": SENT_NOTE,
        "sent_strips": sent_strips(sent, folder),
        "trade_off": trade_off([(p.defense, p.accuracy, p.leak_rate) for p in found]),
        "by_round": leaks_by_round([(p.defense, p.by_round) for p in found]),
    }
