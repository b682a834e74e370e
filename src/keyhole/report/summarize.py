"""Outcomes to numbers: leak rates with intervals, one row for each defense, attack and attacker, and a verdict.

What counts as a leak of an image (one image on one network): SSIM of at least 0.7, and at least 0.1 above the best
control's SSIM for that image. Controls guess without the update: the attack on noise (``prior_only``), on another
client's update (``other_client``), and the class mean. A control, and the self-test ``check:truth``, have no better
control to beat, so that for them SSIM of at least 0.7 is enough.

Outcomes without scores (refused, failed) are in ``statuses`` and in the budget, not in the rates. A score that is not a
number counts as no leak and is counted in ``nan``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
from scipy import stats

from keyhole.core.trial import Outcome, Status
from keyhole.report.comparisons import Comparison, compare
from keyhole.report.groups import Group, Key, collect, matrix, unique
from keyhole.report.intervals import Estimate, Matrix, Spread, mean, overlap, rate, spread
from keyhole.report.layers import Layers, advice, layers_left_out
from keyhole.report.records import Row, Setting, is_attack
from keyhole.report.sentence import verdict
from keyhole.report.strengths import Strength, weakest_held

__all__ = ["Report", "Row", "Setting", "summarize"]

NEAR_SSIM = 0.9
NEAR_MSE = 1e-3


@dataclass(frozen=True)
class Report:
    """Everything the report says in numbers."""

    verdict: str
    rows: tuple[Row, ...]
    versions: dict[str, str]
    comparisons: tuple[Comparison, ...]
    complete: bool
    done: int
    planned: int
    unplanned: int = 0
    """Outcomes on targets that belong to no planned trial, and were left out."""
    tuning: dict[str, float] = field(default_factory=dict)
    """Trials, evaluations and seconds spent on the tuning pool."""
    title: str = ""
    schema: int = 1
    kind: str = "update"
    settings: tuple[str, ...] = ("",)
    """Names of the settings, in the order of the audit file; one empty name for a lone one."""
    strengths: tuple[Strength, ...] = ()
    layers: tuple[Layers, ...] = ()
    advice: dict[str, str] = field(default_factory=dict)
    """By setting, what ``layers`` says about which layers to leave out."""

    @property
    def several(self) -> bool:
        """Whether rows of several settings must be told apart."""
        return len(self.settings) > 1

    def asdict(self) -> dict[str, Any]:
        """Plain values in a fixed order; missing numbers are `None`."""
        raw = asdict(self)
        for row in raw["rows"]:
            for name in ("identified", "identified_by_features"):
                if row[name] is None:
                    del row[name]
        first = ("schema", "kind", "verdict", "rows", "versions")
        return {name: plain(raw[name]) for name in (*first, *(k for k in raw if k not in first))}

    def to_json(self) -> str:
        """The text of ``report.json``: strictly valid JSON, six significant digits."""
        return json.dumps(self.asdict(), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Values as JSON knows them: six digits, and `None` for a missing number."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        # Six digits are more than any interval supports, and keep the file equal across BLAS builds.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def summarize(settings: Sequence[Setting] | Setting, outcomes: Sequence[Outcome]) -> Report:
    """Outcomes to a report. The order of the outcomes does not matter; everything but seconds is reproducible.

    Args:
        settings: what the experiment says about itself; one setting stands for a sequence of one.
        outcomes: what has been run so far; trials that are not planned are left out and counted.

    Returns:
        Rows in plan order, paired tests, tables and the verdict.
    """
    settings = [settings] if isinstance(settings, Setting) else list(settings)
    by_name = {setting.name: setting for setting in settings}
    groups = collect(settings, outcomes)
    rows = tuple(_row(by_name[group.setting], group) for group in groups)
    seen = unique(outcomes)
    planned = {name for setting in settings for name in setting.planned}
    tuned = sorted((o for o in seen.values() if o.trial.pool == "tune"), key=lambda o: o.trial.hash)
    done = len(planned & seen.keys())
    layers = layers_left_out(rows, groups)
    return Report(
        verdict=verdict(rows, groups, list(by_name), done, len(planned)),
        rows=rows,
        versions=dict(sorted((name, v) for setting in settings for name, v in setting.versions.items())),
        comparisons=compare(groups, settings),
        complete=done == len(planned),
        done=done,
        planned=len(planned),
        unplanned=sum(o.trial.pool == "target" and name not in planned for name, o in seen.items()),
        tuning={
            "trials": len(tuned),
            "evaluations": sum(o.evaluations for o in tuned),
            "seconds": math.fsum(o.seconds for o in tuned),
        },
        title=settings[0].title,
        settings=tuple(by_name),
        strengths=weakest_held(groups),
        layers=layers,
        advice=advice(layers, rows),
    )


def _row(setting: Setting, group: Group) -> Row:
    entries = group.entries

    def column(name: str) -> Matrix:
        return matrix({key: getattr(entry, name) for key, entry in entries.items()})

    def share(hits: dict[Key, bool]) -> Estimate:
        return rate(matrix({key: float(hit) for key, hit in hits.items()}))

    above = {key: entries[key].ssim - control.ssim for key, control in group.controls.items() if key in entries}
    identified, by_features = rate(column("identified")), rate(column("identified_by_features"))
    certified = _certified(group)
    success = rate(matrix(group.by_update("matched")))
    evaluations = group.by_update("evaluations").values()
    tally = Tally(outcome.status for outcome in group.outcomes)
    trials = [outcome.trial for outcome in group.outcomes]
    return Row(
        setting.task, setting.state, setting.threat, group.defense, group.attack, group.attacker,
        n=len(entries),
        networks=len({seed for seed, _ in entries}),
        leak_rate=share({key: group.leaks(key) for key in entries}),
        leak_rate_90=share({key: entry.ssim >= NEAR_SSIM for key, entry in entries.items()}),
        leak_rate_mse=share({key: entry.mse < NEAR_MSE for key, entry in entries.items()}),
        psnr=spread(column("psnr")),
        ssim=spread(column("ssim")),
        mse=spread(column("mse")),
        label_accuracy=spread(column("label_accuracy")),
        lift=mean(matrix(above)),
        evaluations=sum(outcome.evaluations for outcome in group.outcomes),
        seconds=math.fsum(outcome.seconds for outcome in group.outcomes),
        statuses={status: tally[status] for status in get_args(Status) if tally[status]},
        images=len({row for _, row in entries}),
        uncontrolled=sum(key not in group.controls for key in entries) if is_attack(group.attacker) else 0,
        nan=sum(entry.broken for entry in entries.values()),
        identified=None if math.isnan(identified.value) else identified,
        identified_by_features=None if math.isnan(by_features.value) else by_features,
        update_norm=_median_fact(group, "update_norm"),
        zeros=_median_fact(group, "zeros"),
        setting=setting.name,
        success=None if math.isnan(success.value) else success,
        evaluations_per_image=math.fsum(evaluations) / len(evaluations) if evaluations else math.nan,
        labels=overlap(matrix(group.by_update("label_accuracy"))),
        label_chance=label_chance(setting.classes, max(trial.batch_size for trial in trials)),
        series=max(len(trial.episode) // trial.batch_size for trial in trials),
        notes=_notes(group),
        certified=spread(matrix(certified)),
        below_certificate=share({key: entries[key].mse < value for key, value in certified.items() if key in entries}),
        remarks=dict(Tally(o.detail for o in group.outcomes if o.detail and o.metrics and o.status != "diverged")),
        client_seconds=statistics.median([o.client_seconds for o in group.outcomes if o.metrics] or [math.nan]),
        prior=_largest_fact(group, "success_prior"),
        bound=_largest_fact(group, "success_bound"),
    )  # fmt: skip


def _notes(group: Group) -> dict[str, Spread]:
    """Each note over networks and images, or over networks and updates where it is one number for an update."""
    names = dict.fromkeys(name for outcome in group.outcomes for name in outcome.notes)
    found: dict[str, Spread] = {}
    for name in names:
        values: dict[tuple[int, Any], float] = {}
        for outcome in group.outcomes:
            trial, own = outcome.trial, outcome.notes.get(name, [])
            keys = trial.episode if len(own) == len(trial.episode) else range(len(own))
            values.update({(trial.seed, (trial.episode, key)): value for key, value in zip(keys, own, strict=True)})
        found[name] = spread(matrix(values))
    return found


def _certified(group: Group) -> dict[Key, float]:
    """The certificate of each image, where the update is one gradient: over several steps there is none."""
    found: dict[Key, float] = {}
    for outcome in group.outcomes:
        trial, own = outcome.trial, outcome.notes.get("certified_mse", [])
        if trial.rule.name == "gradient" and len(own) == len(trial.episode):
            found.update({(trial.seed, row): value for row, value in zip(trial.episode, own, strict=True)})
    return found


def _largest_fact(group: Group, name: str) -> float:
    return max([outcome.facts[name] for outcome in group.outcomes if name in outcome.facts], default=math.nan)


def _median_fact(group: Group, name: str) -> float:
    known = [outcome.facts[name] for outcome in group.outcomes if math.isfinite(outcome.facts.get(name, math.nan))]
    return statistics.median(known) if known else math.nan


def label_chance(classes: int, size: int) -> float:
    """The expected overlap of two batches of labels, each drawn evenly and independently.

    The overlap is sum_c min(m_c, n_c) / size with counts m and n, of which each is binomial; as
    E min(m, n) = sum_(k >= 1) P(m >= k) P(n >= k), it is (classes / size) sum_k P(Bin(size, 1 / classes) >= k)^2.

    Args:
        classes: number of classes; 0 where it is not known.
        size: labels in a batch.
    """
    if classes < 1:
        return math.nan
    tails = stats.binom.sf(np.arange(size), size, 1 / classes)  # P(n > k) for k = 0, 1, ...
    return float(classes / size * (tails**2).sum())
