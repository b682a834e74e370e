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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
from scipy import stats

from keyhole.core.trial import Outcome, Status
from keyhole.report.groups import Group, Key, collect, is_attack, unique
from keyhole.report.intervals import Estimate, Matrix, Spread, mean, rate, spread
from keyhole.report.verdict import verdict

NEAR_SSIM = 0.9
NEAR_MSE = 1e-3


@dataclass(frozen=True)
class Setting:
    """What the experiment says about itself; filled by the runner."""

    title: str
    task: str
    state: str
    threat: str
    assumptions: tuple[str, ...]
    planned: tuple[str, ...]
    """Hashes of all planned trials, in plan order."""
    budget: tuple[str, ...]
    versions: dict[str, str]
    classes: int


@dataclass(frozen=True)
class Row:
    """One attacker against one defense. The order of the fields is the order in ``report.json``."""

    task: str
    state: str
    threat: str
    defense: str
    attack: str
    attacker: str
    n: int
    """Images scored, counted once on each network."""
    networks: int
    leak_rate: Estimate
    leak_rate_90: Estimate
    leak_rate_mse: Estimate
    psnr: Spread
    ssim: Spread
    mse: Spread
    label_accuracy: Spread
    lift: Estimate
    evaluations: int
    seconds: float
    statuses: dict[str, int]
    images: int = 0
    """Distinct images scored."""
    uncontrolled: int = 0
    """Of ``n``, how many had no control to compare with: there the threshold alone decided."""
    nan: int = 0
    """Of ``n``, how many had an SSIM or MSE that is not a number."""
    identified: Estimate | None = None
    update_norm: float = math.nan
    """Median Euclidean norm of the updates as they left the clients."""
    zeros: float = math.nan
    """Median share of entries of the update that are zero: what pruning or masking really reached."""

    @property
    def leaks(self) -> int:
        """Number of leaked images, out of ``n``."""
        return round(self.leak_rate.value * self.n) if self.n else 0

    @property
    def is_attack(self) -> bool:
        """Whether this is an attacker, rather than a control or a self-test."""
        return is_attack(self.attacker)


@dataclass(frozen=True)
class Comparison:
    """An attacker who knows the defense against one who does not, on the same images."""

    defense: str
    attack: str
    attacker: str
    against: str
    n: int
    """Distinct images in the test."""
    difference: Estimate
    """Mean difference in SSIM; above 0 where knowing the defense helps."""
    p: float
    """Wilcoxon signed-rank test on each image's mean over networks; NaN below 6 images."""


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

    def asdict(self) -> dict[str, Any]:
        """Plain values in a fixed order; missing numbers are `None`."""
        raw = asdict(self)
        for row in raw["rows"]:
            if row["identified"] is None:
                del row["identified"]
        first = ("schema", "kind", "verdict", "rows", "versions")
        return {name: _plain(raw[name]) for name in (*first, *(k for k in raw if k not in first))}

    def to_json(self) -> str:
        """The text of ``report.json``: strictly valid JSON, six significant digits."""
        return json.dumps(self.asdict(), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        # Six digits are more than any interval supports, and keep the file equal across BLAS builds.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def summarize(setting: Setting, outcomes: Sequence[Outcome]) -> Report:
    """Outcomes to a report. The order of the outcomes does not matter; everything but seconds is reproducible.

    Args:
        setting: what the experiment says about itself.
        outcomes: what has been run so far; trials that are not planned are left out and counted.

    Returns:
        Rows in plan order, paired tests and the verdict.
    """
    groups = collect(setting.planned, outcomes)
    rows = tuple(_row(setting, group) for group in groups)
    seen = unique(outcomes)
    planned = set(setting.planned)
    tuned = sorted((o for o in seen.values() if o.trial.pool == "tune"), key=lambda o: o.trial.hash)
    done = len(planned & seen.keys())
    return Report(
        verdict=verdict(rows, groups, done, len(planned)),
        rows=rows,
        versions=dict(sorted(setting.versions.items())),
        comparisons=tuple(_compare(groups)),
        complete=done == len(planned),
        done=done,
        planned=len(planned),
        unplanned=sum(o.trial.pool == "target" and name not in planned for name, o in seen.items()),
        tuning={
            "trials": len(tuned),
            "evaluations": sum(o.evaluations for o in tuned),
            "seconds": math.fsum(o.seconds for o in tuned),
        },
        title=setting.title,
    )


def _row(setting: Setting, group: Group) -> Row:
    entries = group.entries

    def column(name: str) -> Matrix:
        return group.matrix({key: getattr(entry, name) for key, entry in entries.items()})

    def share(hits: dict[Key, bool]) -> Estimate:
        return rate(group.matrix({key: float(hit) for key, hit in hits.items()}))

    above = {key: entries[key].ssim - control.ssim for key, control in group.controls.items() if key in entries}
    identified = rate(column("identified"))
    tally = Tally(outcome.status for outcome in group.outcomes)
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
        lift=mean(group.matrix(above)),
        evaluations=sum(outcome.evaluations for outcome in group.outcomes),
        seconds=math.fsum(outcome.seconds for outcome in group.outcomes),
        statuses={status: tally[status] for status in get_args(Status) if tally[status]},
        images=len({row for _, row in entries}),
        uncontrolled=sum(key not in group.controls for key in entries) if is_attack(group.attacker) else 0,
        nan=sum(entry.broken for entry in entries.values()),
        identified=None if math.isnan(identified.value) else identified,
        update_norm=_median_fact(group, "update_norm"),
        zeros=_median_fact(group, "zeros"),
    )  # fmt: skip


def _median_fact(group: Group, name: str) -> float:
    known = [outcome.facts[name] for outcome in group.outcomes if math.isfinite(outcome.facts.get(name, math.nan))]
    return statistics.median(known) if known else math.nan


def _compare(groups: Sequence[Group]) -> Iterable[Comparison]:
    naive = {group.cell: group for group in groups if group.attacker == "naive"}
    for group in groups:
        other = naive.get(group.cell)
        if other is None or not group.attacker.startswith("adaptive:"):
            continue
        both = group.entries.keys() & other.entries.keys()
        paired = group.matrix({key: group.entries[key].ssim - other.entries[key].ssim for key in both})
        each = np.nanmean(paired, axis=0) if paired.size else np.empty(0)
        yield Comparison(*group.cell, group.attacker, "naive", each.size, mean(paired), _signed_rank(each))


def _signed_rank(differences: Matrix) -> float:
    if differences.size < 6:  # five images cannot reach p < 0.05 in a two-sided test
        return math.nan
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
