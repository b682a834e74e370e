"""What federated trainings came to: `train.json`, and tables of it for the terminal and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keyhole.experiment.audit import versions
from keyhole.experiment.store import Store
from keyhole.experiment.train import Trained, epsilon
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.report.intervals import Estimate, student
from keyhole.report.names import defense_name
from keyhole.report.summarize import plain
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING

HEAD = ("defense", "test accuracy (95 %)", "training loss", "epsilon", "MB sent up", "client seconds a round")


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over trainings with its 95 % Student interval, cut to [0, 1]; a single training has no interval."""
    mean, half = student(values)
    # In this order a missing bound stays missing.
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0))


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
    """Bytes that all clients sent in all rounds of a training, and mean seconds of a client's round."""
    rows = [row for run in runs for row in run.rounds[1:]]
    return sum(row.bytes_up for row in rows) // len(runs), math.fsum(row.client_seconds for row in rows) / len(rows)


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


def epsilon_in_words(value: float | None) -> str:
    """With three digits."""
    return NOTHING if value is None else "none" if math.isinf(value) else f"{value:.3g}"


def training_table(done: Sequence[Trained]) -> list[Line]:
    """A row for each defense, after the last round."""
    lines: list[Line] = [HEAD]
    for name, runs in by_defense(done).items():
        sent, seconds = cost(runs)
        loss = math.fsum(run.rounds[-1].loss for run in runs) / len(runs)
        right = over_seeds([run.accuracy for run in runs])
        lines.append(
            (name, accuracy_in_words(right), f"{loss:.3g}", epsilon_in_words(guarantee(runs)), f"{sent / 1e6:.3g}",
             f"{seconds:.3g}")
        )  # fmt: skip
    return lines


def training_json(plan: TrainingPlan, done: Sequence[Trained]) -> dict[str, Any]:
    """The content of ``train.json``: a row for each training and round, and a summary of each defense."""
    rows = [
        {"defense": defense_name(run.defense), "seed": run.seed, **asdict(row)} for run in done for row in run.rounds
    ]
    summary = []
    for name, runs in by_defense(done).items():
        sent, seconds = cost(runs)
        summary.append(
            {
                "defense": name,
                "accuracy": asdict(over_seeds([run.accuracy for run in runs])),
                "seeds": [run.accuracy for run in runs],
                "epsilon": guarantee(runs),
                "bytes_up": sent,
                "client_seconds": seconds,
                "changed": [run.changed for run in runs],
            }
        )
    found: dict[str, Any] = plain(
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
    return found


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
