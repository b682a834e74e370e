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
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from keyhole.core.trial import Outcome, Spec, Status, Trial
from keyhole.errors import StoreError

Matrix = NDArray[np.float64]
"""Networks x images, NaN where an image was not scored on a network."""
Key = tuple[int, int]
"""One image on one network: (seed, row of the target pool)."""

LEAK_SSIM = 0.7
LEAK_MARGIN = 0.1
NEAR_SSIM = 0.9
NEAR_MSE = 1e-3
PSNR_CAP = 100.0
"""dB; where a perfect copy's infinite PSNR is cut."""
NOT_BROKEN_UP_TO = 0.05
FELL_FROM = 0.5
RESAMPLES = 2000
_Z = float(stats.norm.ppf(0.975))

WORDS = {
    "fell to naive": "fell even to an attacker who does not know {them}",
    "fell": "fell to an attacker who knows {them}",
    "partly": "gave way in part",
    "not broken": "{was} not broken by the attacks tried",
    "unscored": "could not be scored",
}
"""How the verdict speaks of a defense, from worst to best. Nothing here may promise more than was tried."""
NAMED_AT_MOST = 4
"""Defenses that the verdict names in each of its groups; it counts the others."""


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
class Estimate:
    """A number with its 95 % interval; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Spread:
    """A metric over images; ``low`` and ``high`` bound the median with 95 % confidence."""

    median: float = math.nan
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    q10: float = math.nan
    q90: float = math.nan


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


# Intervals ------------------------------------------------------------------------------------------------------------


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of ``n``; ``share * n`` need not be whole."""
    scale = 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _resampled(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Sorted present values, how often each is drawn (resamples, values) and the number drawn (resamples,)."""
    networks, images = matrix.shape
    # A fresh generator for each interval: no result depends on which rows were summarised before it.
    rng = np.random.default_rng(20240229)
    rows = rng.multinomial(networks, np.full(networks, 1 / networks), size=RESAMPLES)
    columns = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    present = np.argwhere(~np.isnan(matrix))
    present = present[np.argsort(matrix[present[:, 0], present[:, 1]], kind="stable")]
    drawn = (rows[:, present[:, 0]] * columns[:, present[:, 1]]).astype(np.float64)
    return matrix[present[:, 0], present[:, 1]], drawn, drawn.sum(1)


def bootstrap(matrix: Matrix, statistic: str = "mean") -> tuple[float, float]:
    """The 95 % percentile interval of the mean or the median, resampling images and networks independently.

    Several networks on the same images are not so many more images: resampling both sides of the matrix keeps what
    the images share, and what the networks share, together.

    Args:
        matrix: networks x images, NaN for holes.
        statistic: ``"mean"`` or ``"median"``.

    Returns:
        Lower and upper bound; NaN without values.
    """
    if not (~np.isnan(matrix)).any():
        return math.nan, math.nan
    values, drawn, total = _resampled(matrix)
    hit = total > 0  # a resample can consist of holes
    drawn, total = drawn[hit], total[hit]
    if statistic == "mean":
        found = drawn @ values / total
    else:
        below = drawn.cumsum(1) * 2
        lower = values[(below >= total[:, None]).argmax(1)]
        upper = values[(below > total[:, None]).argmax(1)]
        found = (lower + upper) / 2
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def rate(matrix: Matrix) -> Estimate:
    """A share of ones with the wider of the bootstrap and the Wilson interval.

    When all images agree, every resample does too and the bootstrap has zero width, as if 16 of 16 proved 100 %.
    Wilson with the number of distinct images is honest there; the bootstrap is where networks disagree.
    """
    if not (~np.isnan(matrix)).any():
        return Estimate()
    value = float(np.nanmean(matrix))
    images = int((~np.isnan(matrix)).any(0).sum())
    low, high = max(bootstrap(matrix), wilson(value, images), key=lambda pair: pair[1] - pair[0])
    return Estimate(value, min(low, value), max(high, value))


def mean(matrix: Matrix) -> Estimate:
    """The mean with its bootstrap interval."""
    if not (~np.isnan(matrix)).any():
        return Estimate()
    return Estimate(float(np.nanmean(matrix)), *bootstrap(matrix))


def spread(matrix: Matrix) -> Spread:
    """Median with its bootstrap interval, mean, and the 10 % and 90 % quantiles of the values that are numbers."""
    values = matrix[~np.isnan(matrix)]
    if not values.size:
        return Spread()
    low, high = bootstrap(matrix, "median")
    q10, median, q90 = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9]))
    return Spread(median, float(values.mean()), low, high, q10, q90)


# Groups of outcomes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The scores of one image, and where its reconstruction is."""

    ssim: float
    mse: float
    psnr: float
    label_accuracy: float
    identified: float
    hash: str
    position: int
    broken: bool
    """Whether SSIM or MSE is not a number."""


@dataclass(frozen=True)
class Group:
    """One attacker against one defense: the outcomes in plan order, and the scored images."""

    defense: str
    attack: str
    attacker: str
    outcomes: tuple[Outcome, ...]
    entries: dict[Key, Entry]
    controls: dict[Key, Entry]
    """The best control of each image; empty for controls themselves."""

    @property
    def cell(self) -> tuple[str, str]:
        """Defense and attack."""
        return self.defense, self.attack

    def leaks(self, key: Key) -> bool:
        """Whether an image leaked: similar enough, and more so than the best guess without the update."""
        ssim = self.entries[key].ssim
        control = self.controls.get(key)
        # The slack is for decimals such as 0.1 that have no exact binary form.
        return ssim >= LEAK_SSIM - 1e-9 and (control is None or ssim >= control.ssim + LEAK_MARGIN - 1e-9)

    def matrix(self, values: dict[Key, float]) -> Matrix:
        """Values as networks x images."""
        seeds = sorted({seed for seed, _ in values})
        rows = sorted({row for _, row in values})
        return np.array([[values.get((s, r), math.nan) for r in rows] for s in seeds]).reshape(len(seeds), len(rows))


def is_attack(attacker: str) -> bool:
    """Whether an attacker is one, rather than a control or a self-test."""
    return not attacker.startswith(("control:", "check:"))


def collect(setting: Setting, outcomes: Sequence[Outcome]) -> list[Group]:
    """The planned outcomes on the target pool, grouped by defense, attack and attacker, in plan order."""
    place = {name: i for i, name in enumerate(setting.planned)}
    targets = [o for name, o in _unique(outcomes).items() if o.trial.pool == "target" and name in place]
    targets.sort(key=lambda o: place[o.trial.hash])
    attacks = _attack_names([o.trial for o in targets])
    defenses = _defense_names({o.trial.defense for o in targets})
    members: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in targets:
        trial = outcome.trial
        members[defenses[trial.defense], attacks[trial.attack], trial.attacker].append(outcome)
    entries = {name: _entries(group) for name, group in members.items()}
    controls = _best_controls(entries)
    return [
        Group(*name, tuple(group), entries[name], controls[name[:2]] if is_attack(name[2]) else {})
        for name, group in members.items()
    ]


def _unique(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """One outcome for each trial; of two, the choice does not depend on their order."""
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        name = outcome.trial.hash
        found[name] = max(found[name], outcome, key=Outcome.to_json) if name in found else outcome
    return found


def _entries(outcomes: Iterable[Outcome]) -> dict[Key, Entry]:
    found: dict[Key, Entry] = {}
    for outcome in outcomes:
        trial = outcome.trial
        for name, values in outcome.metrics.items():
            if len(values) != len(trial.episode):
                raise StoreError(
                    f"trial {trial.hash} has {len(values)} values of '{name}' for {len(trial.episode)} images; "
                    "its line in outcomes.jsonl was changed or comes from another version: remove it and run again."
                )
        for position, row in enumerate(trial.episode):
            if "ssim" not in outcome.metrics:
                continue
            entry = _entry(outcome, position)
            # An image that is met twice on one network counts once, with its better guess; controls likewise.
            if (key := (trial.seed, row)) not in found or entry.ssim > found[key].ssim:
                found[key] = entry
    return found


def _entry(outcome: Outcome, position: int) -> Entry:
    def read(name: str) -> float:
        values = outcome.metrics.get(name)
        return float(values[position]) if values else math.nan

    ssim, mse, psnr = read("ssim"), read("mse"), read("psnr")
    return Entry(
        ssim=ssim if math.isfinite(ssim) else 0.0,
        mse=mse if math.isfinite(mse) else math.nan,
        psnr=min(psnr, PSNR_CAP) if psnr > -math.inf else math.nan,
        label_accuracy=read("label_accuracy"),
        identified=read("identified"),
        hash=outcome.trial.hash,
        position=position,
        broken=not (math.isfinite(ssim) and math.isfinite(mse)),
    )


def _best_controls(entries: dict[tuple[str, str, str], dict[Key, Entry]]) -> dict[tuple[str, str], dict[Key, Entry]]:
    best: dict[tuple[str, str], dict[Key, Entry]] = {}
    for cell in {name[:2] for name in entries}:
        found: dict[Key, Entry] = {}
        for (defense, attack, attacker), scored in entries.items():
            # The class mean needs no update, so that it is run once and stands beside every defense and attack.
            own = attacker.startswith("control:") and (defense, attack) == cell
            if not own and attacker != "control:class_mean":
                continue
            for key, entry in scored.items():
                if key not in found or entry.ssim > found[key].ssim:
                    found[key] = entry
        best[cell] = found
    return best


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "[" + ", ".join(_show(v) for v in value) + "]" if isinstance(value, tuple) else str(value)


def _name(spec: Spec, options: Iterable[str]) -> str:
    given = spec.asdict()
    inside = ", ".join(f"{k}={_show(given[k])}" for k in options if given.get(k) is not None)
    return f"{spec.name}({inside})" if inside else spec.name


def _varying(specs: Iterable[Spec]) -> list[str]:
    """Options whose values differ between specs."""
    given = [spec.asdict() for spec in specs]
    names = sorted({name for options in given for name in options})
    return [name for name in names if len({repr(options.get(name)) for options in given}) > 1]


def _defense_names(chains: set[tuple[Spec, ...]]) -> dict[tuple[Spec, ...], str]:
    """Each chain as text, with the options that differ between defenses of that name; all where none differs."""
    same: dict[str, set[Spec]] = defaultdict(set)
    for link in (link for links in chains for link in links):
        same[link.name].add(link)
    shown = {name: _varying(specs) for name, specs in same.items()}
    return {
        links: " -> ".join(_name(link, shown[link.name] or link.asdict()) for link in links) or "none"
        for links in chains
    }


def _attack_names(trials: Sequence[Trial]) -> dict[Spec, str]:
    """Each attack as text: its name, and options only where two of that name attack the same thing.

    Options that tuning chose for each defense also differ, but never within one cell: they do not split a row.
    """
    rivals: dict[tuple[Any, ...], set[Spec]] = defaultdict(set)
    for t in trials:
        rivals[t.attack.name, t.defense, t.attacker, t.seed, t.episode].add(t.attack)
    clashes: dict[str, list[set[Spec]]] = defaultdict(list)
    for (name, *_), specs in rivals.items():
        if len(specs) > 1:
            clashes[name].append(specs)
    shown = {name: _telling(groups) for name, groups in clashes.items()}
    return {t.attack: _name(t.attack, shown.get(t.attack.name, ())) for t in trials}


def _telling(groups: list[set[Spec]]) -> list[str]:
    """The options that tell rivals apart: those the user listed have the same values in every group."""
    largest = max(len(group) for group in groups)
    groups = [group for group in groups if len(group) == largest]
    varying = sorted({option for group in groups for option in _varying(group)})
    listed = [
        option
        for option in varying
        if len({frozenset(repr(spec.asdict().get(option)) for spec in group) for group in groups}) == 1
    ]
    told = all(len({_name(spec, listed) for spec in group}) == len(group) for group in groups)
    return listed if told else varying


# The report -----------------------------------------------------------------------------------------------------------


def summarize(setting: Setting, outcomes: Sequence[Outcome]) -> Report:
    """Outcomes to a report. The order of the outcomes does not matter; everything but seconds is reproducible.

    Args:
        setting: what the experiment says about itself.
        outcomes: what has been run so far; trials that are not planned are left out and counted.

    Returns:
        Rows in plan order, paired tests and the verdict.
    """
    groups = collect(setting, outcomes)
    rows = tuple(_row(setting, group) for group in groups)
    seen = _unique(outcomes)
    planned = set(setting.planned)
    tuned = sorted((o for o in seen.values() if o.trial.pool == "tune"), key=lambda o: o.trial.hash)
    done = len(planned & seen.keys())
    return Report(
        verdict=_verdict(rows, groups, done, len(planned)),
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
    )  # fmt: skip


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


# The verdict ----------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in whole percent, such as ``81``; ``<1`` for what would round to 0 but is not."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def level(rows: Iterable[Row]) -> str:
    """How a defense did against its worst attacker: a key of `WORDS`."""
    scored = [row for row in rows if row.is_attack and row.n]
    if not scored:
        return "unscored"
    if any(row.attacker == "naive" and row.leak_rate.value >= FELL_FROM for row in scored):
        return "fell to naive"
    worst = max(row.leak_rate.value for row in scored)
    return "fell" if worst >= FELL_FROM else "partly" if worst > NOT_BROKEN_UP_TO else "not broken"


def worst_row(rows: Iterable[Row]) -> Row | None:
    """The attacker with the highest leak rate, the first of equals; `None` where nothing was scored."""
    return max((row for row in rows if row.is_attack and row.n), key=lambda row: row.leak_rate.value, default=None)


def by_defense(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of attackers (not controls) by defense, in plan order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.is_attack:
            found[row.defense].append(row)
    return dict(found)


def _verdict(rows: Sequence[Row], groups: Sequence[Group], done: int, planned: int) -> str:
    prefix = "" if done == planned else f"Incomplete ({done} of {planned} trials): "
    defenses = by_defense(rows)
    undefended = worst_row(defenses.pop("none", []))
    if undefended is None and not any(worst_row(found) for found in defenses.values()):
        text = "no attack has produced a score yet, so that nothing can be said about leaks."
        return prefix + (text if prefix else text.capitalize())
    parts = [_undefended(undefended, groups)]
    if defenses:
        parts.append(_defended(defenses))
        if undefended and undefended.leak_rate.value <= NOT_BROKEN_UP_TO:
            parts.append("as there was next to nothing to stop, this says little about the defenses")
    return prefix + "; ".join(parts) + "."


def _undefended(row: Row | None, groups: Sequence[Group]) -> str:
    if row is None:
        return "The undefended case could not be scored"
    rounds = max(len(o.trial.episode) // o.trial.batch_size for group in groups for o in group.outcomes)
    rate_ = row.leak_rate
    several = row.networks > 1
    over = f"{row.n} cases" if several else f"{row.n} image{'s' * (row.n != 1)}"
    made_of = f"{row.images} image{'s' * (row.images != 1)} on {row.networks} networks; " if several else ""
    return (
        f"Undefended, the attacks tried recovered {row.leaks} of {over} "
        f"({made_of}{percent(rate_.value)} %, 95 % interval {percent(rate_.low)}-{percent(rate_.high)} %) "
        f"from {'one update' if rounds == 1 else f'{rounds} updates in a row'}"
    )


def _defended(defenses: dict[str, list[Row]]) -> str:
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for name, rows in defenses.items():
        found[level(rows)].append(f"{name}{_counted(rows)}")
    said = []
    for word, names in found.items():
        if names:
            forms = {"them": "it", "was": "was"} if len(names) == 1 else {"them": "them", "was": "were"}
            more = f", and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
            count = "" if len(defenses) == 1 else f"{len(names)} "
            said.append(f"{count}{WORDS[word].format(**forms)} ({', '.join(names[:NAMED_AT_MOST])}{more})")
    text = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return f"the one defense tried {text}" if len(defenses) == 1 else f"of {len(defenses)} defenses, {text}"


def _counted(rows: Sequence[Row]) -> str:
    worst = worst_row(rows)
    if worst is None:
        return ""
    # Withstanding someone who does not know the defense is no evidence, and the reader must see that it is all there is.
    known = any(row.attacker.startswith("adaptive:") and row.n for row in rows)
    return f": {worst.leaks} of {worst.n}" + ("" if known else ", attackers who do not know it only")
