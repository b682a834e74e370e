"""The report of model inversions: how well private classes can be drawn from the global network, round by round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keyhole.experiment.audit import versions
from keyhole.experiment.inversion_judge import Inversions
from keyhole.experiment.store import Store
from keyhole.experiment.train import Trained
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.report.frontier import points
from keyhole.report.intervals import Estimate
from keyhole.report.inversion_render import render_html, render_markdown
from keyhole.report.inversion_sentences import assumptions, verdict
from keyhole.report.inversion_summary import Cell, cells, lift
from keyhole.report.inversion_tables import compared, joined, matched, overview
from keyhole.report.summarize import plain, summarize
from keyhole.report.tables import Line
from keyhole.report.write import read_audit


def write_inversions(
    found: Inversions, folder: Path, updates: dict[tuple[str, int], Estimate] | None = None
) -> tuple[list[Line], str, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``; returns the overview, the verdict and the page's path.

    Args:
        found: what was run.
        folder: the output folder.
        updates: by defense and round, the worst attacker's leak rate from updates, where an audit ran too.
    """
    lines = cells(found)
    both = joined(lines, updates or {})
    store = Store(folder)
    store.write_text("report.json", json.dumps(as_dict(found, lines, both), indent=1, allow_nan=False) + "\n")
    store.write_text("report.md", render_markdown(found, lines, both))
    return overview(lines), verdict(lines), store.write_text("report.html", render_html(found, lines, both))


def update_leaks(plan: TrainingPlan, trained: Sequence[Trained], folder: Path) -> dict[tuple[str, int], Estimate]:
    """By defense and round, the worst attacker's leak rate from updates, as the audit in ``folder`` has it."""
    report = summarize(*read_audit(folder / "audit"))
    found = points(plan, trained, report)
    return {(point.defense, when): rate for point in found for when, rate in point.by_round}


def as_dict(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> dict[str, Any]:
    """The content of ``report.json``."""
    plan = found.plan
    classes = "" if plan.data.classes is None else f" {list(plan.data.classes)}"
    rows = [
        {
            "task": f"{plan.data.name}{classes} / {plan.model.label}",
            "state": "untrained" if c.round == 0 else f"round {c.round}",
            "defense": c.defense,
            "attack": c.attack,
            "attacker": c.attacker,
            "round": c.round,
            "n": c.n,
            "networks": len(c.by_seed),
            "attack_accuracy": asdict(c.attack_accuracy),
            "attack_accuracy_top5": c.top5,
            "knn_distance": c.knn_distance,
            "feature_distance": c.feature_distance,
            "fid": c.fid,
            "diversity": c.diversity,
            "lift": asdict(lift(lines, c)) if c.is_attack else None,
            "accuracy": c.accuracy,
            "target_accuracy": c.target_accuracy,
            "seconds": c.seconds,
            "prior_seconds": c.prior_seconds,
            "seeds": {str(seed): value for seed, value in sorted(c.by_seed.items())},
            "diversity_seeds": {str(seed): value for seed, value in sorted(c.diversity_by_seed.items())},
            "failed": c.failed,
        }
        for c in lines
    ]  # fmt: skip
    return {
        "schema": 1,
        "kind": "model",
        "title": plan.title,
        "verdict": verdict(lines),
        "assumptions": assumptions(found),
        "evaluator": {
            "name": found.inverting.evaluator.name, "accuracy": found.evaluator_accuracy,
            "classes": found.evaluator_classes,
        },
        "public_images": found.public,
        "rows": plain(rows),
        "compared": _records(compared(lines)),
        "matched": _records(matched(lines)),
        "both": _records(both),
        "versions": versions(),
    }  # fmt: skip


def _records(table: Sequence[Line]) -> list[dict[str, str]]:
    """Rows of a table by the names of its columns, as the page words them."""
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]] if table else []
