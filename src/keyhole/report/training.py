"""What federated trainings came to: `train.json`, and tables of it for the terminal and Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keyhole.experiment.audit import versions
from keyhole.experiment.store import Store
from keyhole.experiment.train import Trained, epsilon
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.report.intervals import Estimate, share_difference, student, wider, wilson
from keyhole.report.names import UNDEFENDED, defense_name
from keyhole.report.summarize import plain
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING

HEAD = (
    "defense", "test accuracy (95 %)", "change in points (95 %)", "training loss", "epsilon", "MB sent up",
    "client seconds a round",
)  # fmt: skip


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean accuracy over trainings with its 95 % Student interval, cut to [0, 1]."""
    found = student(values)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))  # NaN stays NaN


def accuracy_of(runs: Sequence[Trained]) -> Estimate:
    """The mean test accuracy of a defense's trainings with the wider of two 95 % intervals.

    One is Student's over trainings, the other Wilson's for the held-out images, which all trainings share. A single
    training has the second one alone, which speaks of that network.
    """
    found = over_seeds([run.accuracy for run in runs])
    return Estimate(found.value, *wider((found.low, found.high), wilson(found.value, len(runs[0].right))))


def change(name: str, trained: Mapping[str, Sequence[Trained]]) -> Estimate:
    """Accuracy under a defense less that without any; NaN where there is none to compare with.

    Paired by seed and by held-out image: federations of one seed begin with the same network and clients, and all are
    asked about the same images. The interval is the wider of Student's over trainings and `share_difference`'s, which
    knows how few images there are; a single training has the latter alone, which speaks of that network.
    """
    if name == UNDEFENDED:
        return Estimate()
    plain = {run.seed: run for run in trained.get(UNDEFENDED, ())}
    pairs = [(run, plain[run.seed]) for run in trained[name] if run.seed in plain]
    if not pairs:
        return Estimate()
    over_trainings = student([run.accuracy - bare.accuracy for run, bare in pairs])
    over_images = share_difference(np.array([np.subtract(run.right, bare.right, dtype=float) for run, bare in pairs]))
    low, high = wider(*((found.low, found.high) for found in (over_trainings, over_images)))
    return Estimate(over_trainings.value, max(low, -1.0), min(high, 1.0))


def by_defense(done: Sequence[Trained]) -> dict[str, list[Trained]]:
    """The trainings of each defense, by its name."""
    found: dict[str, list[Trained]] = {}
    for run in done:
        found.setdefault(defense_name(run.defense), []).append(run)
    return found


def guarantee(runs: Sequence[Trained]) -> float | None:
    """Epsilon of the whole training, of the worst seed."""
    spent = [epsilon(run.defense, run.seen * run.rounds[-1].round) for run in runs]
    return max((value for value in spent if value is not None), default=None)


def cost(runs: Sequence[Trained]) -> tuple[int, float]:
    """Bytes that all clients sent in all rounds of a training, and seconds of a client's round.

    The median over rounds: a process does some things once, in the first round of its first training.
    """
    rows = [row for run in runs for row in run.rounds[1:]]
    return sum(row.bytes_up for row in rows) // len(runs), statistics.median(row.client_seconds for row in rows)


def remarks(done: Sequence[Trained]) -> list[str]:
    """Sentences on defenses that did nothing."""
    said = []
    for name, runs in by_defense(done).items():
        untouched = [run for run in runs if run.changed == 0]
        if untouched:
            seeds = ", ".join(str(run.seed) for run in untouched)
            said.append(
                f"{name} changed nothing: in round 1 the update of every client equals its undefended one (seed "
                f"{seeds})."
            )
        elif any(run.changed < 1 for run in runs):
            least = min(run.changed for run in runs)
            said.append(f"{name} changed the first update of {100 * least:.0f} % of the clients only.")
    return said


def accuracy_in_words(value: Estimate) -> str:
    """In percent, with the interval where there is one."""
    text = f"{100 * value.value:.1f} %"
    return text if math.isnan(value.low) else f"{text} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def points_in_words(value: Estimate) -> str:
    """A difference of accuracies in points, with the interval where there is one."""
    if math.isnan(value.value):
        return NOTHING
    text = f"{100 * value.value:+.1f}"
    return text if math.isnan(value.low) else f"{text} ({100 * value.low:+.1f} to {100 * value.high:+.1f})"


def epsilon_in_words(value: float | None) -> str:
    """With three digits."""
    return NOTHING if value is None else "none" if math.isinf(value) else f"{value:.3g}"


def training_table(done: Sequence[Trained]) -> list[Line]:
    """A row for each defense, after the last round."""
    lines: list[Line] = [HEAD]
    found = by_defense(done)
    for name, runs in found.items():
        sent, seconds = cost(runs)
        loss = math.fsum(run.rounds[-1].loss for run in runs) / len(runs)
        lines.append(
            (name, accuracy_in_words(accuracy_of(runs)), points_in_words(change(name, found)), f"{loss:.3g}",
             epsilon_in_words(guarantee(runs)), f"{sent / 1e6:.3g}", f"{seconds:.3g}")
        )  # fmt: skip
    return lines


def training_json(plan: TrainingPlan, done: Sequence[Trained]) -> dict[str, Any]:
    """The content of ``train.json``: a row for each training and round, and a summary of each defense."""
    rows = [
        {"defense": defense_name(run.defense), "seed": run.seed, **asdict(row)} for run in done for row in run.rounds
    ]
    summary = []
    found = by_defense(done)
    for name, runs in found.items():
        sent, seconds = cost(runs)
        summary.append(
            {
                "defense": name,
                "accuracy": asdict(accuracy_of(runs)),
                "change": asdict(change(name, found)),
                "seeds": [run.accuracy for run in runs],
                "epsilon": guarantee(runs),
                "bytes_up": sent,
                "client_seconds": seconds,
                "changed": [run.changed for run in runs],
            }
        )
    whole: dict[str, Any] = plain(
        {
            "schema": 1,
            "kind": "training",
            "title": plan.title,
            "rounds": plan.federation.rounds,
            "summary": summary,
            "remarks": remarks(done),
            "rows": rows,
            "versions": versions(),
        }
    )
    return whole


def write_training(plan: TrainingPlan, done: Sequence[Trained], folder: Path) -> list[Line]:
    """Write ``train.json`` and ``train.md`` into the folder of the trainings; returns the table."""
    store = Store(folder)
    table = training_table(done)
    store.write_text("train.json", json.dumps(training_json(plan, done), indent=1, allow_nan=False) + "\n")
    store.write_text("train.md", _markdown(plan, table, remarks(done)))
    return table


def _markdown(plan: TrainingPlan, table: Sequence[Line], said: Sequence[str]) -> str:
    lines = [
        f"# {plan.title}",
        "",
        f"{plan.data.name} / {plan.model.label}: {plan.federation.clients} clients, {plan.federation.rounds} rounds of "
        f"{plan.federation.strategy}; seeds {', '.join(map(str, plan.run.seeds))}. Accuracy is on {plan.data.test} "
        "held-out images.",
        "",
        *(f"| {' | '.join(line)} |" for line in table[:1]),
        "|" + "---|" * len(HEAD),
        *(f"| {' | '.join(line)} |" for line in table[1:]),
        "",
        *said,
    ]
    return "\n".join(lines).rstrip() + "\n"
