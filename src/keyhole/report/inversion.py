"""The report of model inversions: how well private classes can be drawn from the global network, round by round."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keyhole.core.registry import INVERSIONS
from keyhole.core.trial import Spec
from keyhole.experiment.audit import versions
from keyhole.experiment.inversion_judge import ATTACK, Inversions, Row
from keyhole.experiment.store import Store
from keyhole.experiment.train import Trained
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.report.intervals import Estimate, wilson
from keyhole.report.names import defense_name, spec_names
from keyhole.report.summarize import plain
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING, fixed, number, points, share, signed
from keyhole.report.training import accuracy_in_words, over_seeds
from keyhole.report.verdict import percent

FLOORS = ("control:untrained", "control:random_labels", "control:prior_samples")
"""Controls that show what no knowledge of the network reaches."""
CEILING = "control:private_images"
NETWORKS = 5
"""Target networks that a ranking needs: two undefended networks of one recipe can differ more than a defense does."""

HEAD = (
    "defense", "attack", "attacker", "round", "test accuracy", "recognised (95 %)", "in the top 5", "KNN distance",
    "feature distance", "FID", "diversity", "by the target", "networks", "seconds",
)  # fmt: skip
NOTE = (
    "Recognised: share of the images made that the evaluator, a network of another architecture which no attack sees, "
    "takes for the class they were made to show; interval over target networks. Distances: squared, in the evaluator's "
    "features, to the nearest private image and to the mean of the class. FID: Frechet distance to all private images "
    "in those features{pca}. Diversity: mean pixel distance between two images of a class. By the target: share that "
    "the attacked network itself recognises; far above the evaluator's, the images please that network alone. "
    "control:other_round: the images of the nearest other round, shown to this round's network; control:untrained has "
    "the test accuracy of the untrained network that was attacked; control:private_images are held-out private images."
)


@dataclass(frozen=True, eq=False)
class Cell:
    """One defense, attack, attacker and round, over its target networks."""

    defense: str
    attack: str
    attacker: str
    round: int
    n: int
    """Images of one network."""
    by_seed: dict[int, float] = field(repr=False)
    """Attack accuracy of each network."""
    right_by_seed: dict[int, float] = field(repr=False)
    """Test accuracy of each network."""
    diversity_by_seed: dict[int, float] = field(repr=False)
    attack_accuracy: Estimate = Estimate()
    top5: float = math.nan
    knn_distance: float = math.nan
    feature_distance: float = math.nan
    fid: float = math.nan
    diversity: float = math.nan
    accuracy: float = math.nan
    target_accuracy: float = math.nan
    seconds: float = math.nan
    prior_seconds: float = math.nan
    failed: str = ""

    @property
    def is_attack(self) -> bool:
        """Whether it is no control."""
        return self.attacker == ATTACK


def cells(found: Inversions) -> list[Cell]:
    """All of them, in the order of the plan, controls behind their attack."""
    names = spec_names(found.plan.invert.attacks if found.plan.invert else (), INVERSIONS)
    grouped: dict[tuple[int, Spec, int, str], list[Row]] = {}
    for row in found.rows:
        grouped.setdefault((row.defense, row.attack, row.round, row.attacker), []).append(row)
    made = []
    for (index, spec, when, attacker), rows in grouped.items():
        scored = [row for row in rows if row.scores is not None]
        made.append(
            Cell(
                defense=defense_name(found.plan.defenses[index]),
                attack=names[spec],
                attacker=attacker,
                round=when,
                n=max((row.images for row in scored), default=_images(found)),
                by_seed={row.seed: row.scores.accuracy for row in scored if row.scores},
                right_by_seed={row.seed: row.accuracy for row in scored},
                diversity_by_seed={row.seed: row.scores.diversity for row in scored if row.scores},
                attack_accuracy=over_networks(
                    [row.scores.accuracy for row in scored if row.scores],
                    # The same held-out images stand behind every network's row.
                    _counted(scored) // (len(scored) if attacker == CEILING and scored else 1),
                ),
                top5=_mean(scored, lambda row: row.scores.accuracy_top5 if row.scores else math.nan),
                knn_distance=_mean(scored, lambda row: row.scores.knn_distance if row.scores else math.nan),
                feature_distance=_mean(scored, lambda row: row.scores.feature_distance if row.scores else math.nan),
                fid=_mean(scored, lambda row: row.scores.fid if row.scores else math.nan),
                diversity=_mean(scored, lambda row: row.scores.diversity if row.scores else math.nan),
                accuracy=_mean(rows, lambda row: row.accuracy),
                target_accuracy=_mean(scored, lambda row: row.target_accuracy),
                seconds=_mean(scored, lambda row: row.seconds),
                prior_seconds=_mean(scored, lambda row: row.prior_seconds),
                failed="; ".join(sorted({row.detail for row in rows if row.scores is None})),
            )
        )
    first = {(c.defense, c.attack, c.round): place for place, c in enumerate(made) if c.is_attack}
    # Sorting is stable: controls stay as they came.
    return sorted(made, key=lambda c: first.get((c.defense, c.attack, c.round), len(made)))


def _counted(scored: Sequence[Row]) -> int:
    """Images of one attack or control, over all networks."""
    return sum(row.images for row in scored)


def over_networks(values: Sequence[float], images: int) -> Estimate:
    """The mean share over networks with the wider of its Student interval and the Wilson interval of all images.

    Networks that all agree would have no interval, as if none of ten images had proved that it is none of all. A single
    network has none: it says nothing of others.

    Args:
        values: the share of each network.
        images: different ones, of all networks together.
    """
    if not values:
        return Estimate()
    found = over_seeds(values)
    if len(values) < 2:
        return found
    low, high = max((found.low, found.high), wilson(found.value, images), key=lambda pair: pair[1] - pair[0])
    return Estimate(found.value, low, high)


def _images(found: Inversions) -> int:
    assert found.plan.invert is not None
    return found.classes * found.plan.invert.settings.samples


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return math.fsum(value(row) for row in rows) / len(rows) if rows else math.nan


def table(found: Sequence[Cell]) -> list[Line]:
    """A row for each cell."""
    lines: list[Line] = [HEAD]
    for c in found:
        lines.append(
            (
                c.defense, c.attack, c.attacker, str(c.round), share(c.accuracy),
                _recognised(c), share(c.top5), number(c.knn_distance),
                number(c.feature_distance), number(c.fid), fixed(c.diversity, 2), share(c.target_accuracy),
                str(len(c.by_seed)), number(c.seconds),
            )
        )  # fmt: skip
    return lines


def _recognised(cell: Cell) -> str:
    """The share, or why there is none."""
    return accuracy_in_words(cell.attack_accuracy) if cell.by_seed else cell.failed


def overview(found: Sequence[Cell]) -> list[Line]:
    """A row for each attack, beside the best of the controls that know nothing of the network."""
    lines: list[Line] = [
        (
            "defense", "attack", "round", "test accuracy", "recognised (95 %)", "best control", "above it",
            "diversity", "networks",
        )
    ]  # fmt: skip
    for c in found:
        if not c.is_attack:
            continue
        control = floor(found, c)
        lines.append(
            (
                c.defense, c.attack, str(c.round), share(c.accuracy), _recognised(c),
                NOTHING if control is None else share(control.attack_accuracy.value), points(lift(found, c)),
                fixed(c.diversity, 2), str(len(c.by_seed)),
            )
        )  # fmt: skip
    return lines


def floor(found: Sequence[Cell], attack: Cell) -> Cell | None:
    """The best of the controls that know nothing of the network, for one attack's cell."""
    own = [
        c for c in found
        if (c.defense, c.attack, c.round) == (attack.defense, attack.attack, attack.round)
        and c.attacker in FLOORS and c.by_seed
    ]  # fmt: skip
    # Of equals the first: the untrained network says most.
    return max(sorted(own, key=lambda c: FLOORS.index(c.attacker)), key=lambda c: c.attack_accuracy.value, default=None)


def _above(found: Sequence[Cell], attack: Cell) -> float:
    above = lift(found, attack).value
    return attack.attack_accuracy.value if math.isnan(above) else above


def lift(found: Sequence[Cell], attack: Cell) -> Estimate:
    """How far an attack is above its best control, network by network."""
    control = floor(found, attack)
    if control is None:
        return Estimate()
    above = difference([value - control.by_seed[s] for s, value in attack.by_seed.items() if s in control.by_seed])
    # In this order a missing bound stays missing.
    return Estimate(above.value, max(above.low, -1.0), min(above.high, 1.0))


def verdict(found: Sequence[Cell]) -> str:
    """The result in a few sentences."""
    attacks = [c for c in found if c.is_attack and c.by_seed]
    if not attacks:
        return "No attack came to an end; the table says why."
    said = []
    for defense in dict.fromkeys(c.defense for c in attacks):
        own = [c for c in attacks if c.defense == defense]
        worst = max(own, key=lambda c: _above(found, c))
        control = floor(found, worst)
        under = "Without a defense" if defense == "none" else f"Under {defense}"
        against = (
            "" if control is None else f", against {share(control.attack_accuracy.value)} for the best control "
            f"({control.attacker.removeprefix('control:').replace('_', ' ')})"
        )  # fmt: skip
        said.append(
            f"{under}, {accuracy_in_words(worst.attack_accuracy)} of the images that {worst.attack} made from the "
            f"global network of round {worst.round} (test accuracy {percent(worst.accuracy)} %) are recognised as the "
            f"private class they were made to show{against}."
        )
    broken = [c for c in attacks if c.failed]
    if broken:
        names = ", ".join(dict.fromkeys(c.attack for c in broken))
        said.append(f"On some networks {names} failed ({broken[0].failed.rstrip('.')}); shares are of the others.")
    networks = min(len(c.by_seed) for c in attacks)
    if networks < NETWORKS and len(attacks) > 1:
        said.append(
            f"With {networks} target network{'s' * (networks != 1)} in a cell nothing is ranked: {NETWORKS} are needed."
        )
    return " ".join(said)


def compared(found: Sequence[Cell]) -> list[Line]:
    """Variants of an attack against the first attack of the file, on the same networks: accuracy and diversity."""
    lines: list[Line] = [("defense", "round", "attack", "against", "recognised", "diversity", "networks")]
    attacks = [c for c in found if c.is_attack]
    for base in attacks:
        if base.attack != attacks[0].attack:
            continue
        for other in attacks:
            if (other.defense, other.round) != (base.defense, base.round) or other.attack == base.attack:
                continue
            seeds = sorted(other.by_seed.keys() & base.by_seed.keys())
            if not seeds:
                continue
            lines.append(
                (
                    base.defense, str(base.round), other.attack, base.attack,
                    points(difference([other.by_seed[s] - base.by_seed[s] for s in seeds])),
                    signed(difference([other.diversity_by_seed[s] - base.diversity_by_seed[s] for s in seeds])),
                    str(len(seeds)),
                )
            )  # fmt: skip
    return lines


def matched(found: Sequence[Cell]) -> list[Line]:
    """Each defense against the undefended network of the round whose test accuracy is nearest, network by network."""
    lines: list[Line] = [
        ("defense", "attack", "round", "test accuracy", "undefended, nearest", "recognised against it", "networks")
    ]
    attacks = [c for c in found if c.is_attack]
    bare = [c for c in attacks if c.defense == "none"]
    for cell in attacks:
        rivals = [c for c in bare if c.attack == cell.attack]
        if cell.defense == "none" or not rivals:
            continue
        if cell.round != max(c.round for c in attacks if c.defense == cell.defense):
            continue
        gaps, differences = [], []
        for seed, value in cell.by_seed.items():
            own = [c for c in rivals if seed in c.by_seed]
            if not own:
                continue
            nearest = min(own, key=lambda c: abs(c.right_by_seed[seed] - cell.right_by_seed[seed]))
            gaps.append(nearest.right_by_seed[seed])
            differences.append(value - nearest.by_seed[seed])
        if differences:
            lines.append(
                (
                    cell.defense, cell.attack, str(cell.round), share(cell.accuracy),
                    share(math.fsum(gaps) / len(gaps)), points(difference(differences)), str(len(differences)),
                )
            )  # fmt: skip
    return lines


def difference(values: Sequence[float]) -> Estimate:
    """The mean of paired differences with its 95 % Student interval over networks."""
    from scipy import stats

    if not values or any(math.isnan(value) for value in values):
        return Estimate()
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean)
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    # Networks that all differ by the same, as where both are saturated, do not prove that all networks do.
    return Estimate(mean, mean - half, mean + half) if half > 0 else Estimate(mean)


def as_dict(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> dict[str, Any]:
    """The content of ``report.json``."""
    plan = found.plan
    assert plan.invert is not None
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
            "attack_accuracy": {
                "value": c.attack_accuracy.value, "low": c.attack_accuracy.low, "high": c.attack_accuracy.high,
            },
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
            "name": plan.invert.evaluator.name, "accuracy": found.evaluator_accuracy,
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
    store.write_text("report.md", _markdown(found, lines, both))
    return overview(lines), verdict(lines), store.write_text("report.html", _html(found, lines, both))


def joined(lines: Sequence[Cell], updates: dict[tuple[str, int], Estimate]) -> list[Line]:
    """What an update and what the network itself reveal, round by round; empty where no update was attacked."""
    attacks = [c for c in lines if c.is_attack and c.by_seed]
    places = sorted({(c.defense, c.round) for c in attacks} | set(updates), key=lambda p: (p[0] != "none", *p))
    if not updates:
        return []
    rows: list[Line] = [
        ("defense", "round", "test accuracy", "images leaked by an update", "classes recognised from the network")
    ]
    for defense, when in places:
        own = [c for c in attacks if (c.defense, c.round) == (defense, when)]
        worst = max(own, key=lambda c: c.attack_accuracy.value, default=None)
        leak = updates.get((defense, when))
        rows.append(
            (
                defense, str(when), NOTHING if worst is None else share(worst.accuracy),
                NOTHING if leak is None else accuracy_in_words(leak),
                NOTHING if worst is None else f"{accuracy_in_words(worst.attack_accuracy)}, {worst.attack}",
            )
        )  # fmt: skip
    return rows


def update_leaks(plan: TrainingPlan, trained: Sequence[Trained], folder: Path) -> dict[tuple[str, int], Estimate]:
    """By defense and round, the worst attacker's leak rate from updates, as the audit in ``folder`` has it."""
    from keyhole.report.frontier import points as frontier_points
    from keyhole.report.summarize import summarize
    from keyhole.report.write import read_audit

    report = summarize(*read_audit(folder / "audit"))
    found = frontier_points(plan, trained, report)
    return {(point.defense, when): rate for point in found for when, rate in point.by_round}


def assumptions(found: Inversions) -> list[str]:
    """What the attacker has, and who judges."""
    plan = found.plan
    assert plan.invert is not None
    classes = "all classes" if plan.data.classes is None else f"classes {', '.join(map(str, plan.data.classes))}"
    public = "; ".join(
        f"{one.name or plan.data.name}"
        + ("" if one.classes is None else f", classes {', '.join(map(str, one.classes))}")
        + ("" if one.split is None else f", {one.split}")
        for one in plan.invert.public
    )
    origin = (
        f"{plan.federation.clients} clients, {plan.federation.strategy}"
        if plan.invert.settings.weights is None
        else "weights from a file"
    )
    top5 = " With so few classes, being among its top 5 says little." if found.evaluator_classes <= 10 else ""
    return [
        f"Private: {plan.data.name}, {classes}; target {plan.model.label}, {origin}.",
        "Attacker: a participant who follows the protocol and holds the global network of a round, its architecture "
        "and its class numbers, and no private image, no update and no other client's data.",
        f"Public images: {found.public}, without labels: {public}. They resemble the private ones, which helps the "
        "attacker.",
        f"Evaluator: {plan.invert.evaluator.name}, {found.evaluator_classes} classes, "
        f"{share(found.evaluator_accuracy)} right on held-out private images.{top5}",
        f"Images: {plan.invert.settings.samples} of each class from each of {len(plan.run.seeds)} target "
        f"network{'s' * (len(plan.run.seeds) != 1)}. The result is about classes, not about single records.",
    ]


def note(found: Inversions) -> str:
    """What the columns mean."""
    assert found.plan.invert is not None
    few = f", on their first {found.components} principal components: compare equal numbers of images only"
    return NOTE.format(pca=few if found.components else "")


def _markdown(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> str:
    def block(title: str, rows: Sequence[Line]) -> list[str]:
        if len(rows) < 2:
            return []
        body = ["| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * len(rows[0]), *rows[1:])]
        return ["", f"## {title}", "", *body]

    parts = [
        f"# {found.plan.title}", "", verdict(lines), "", *(f"- {one}" for one in assumptions(found)),
        *block("Rounds", table(lines)), "", note(found), *block("Attacks compared", compared(lines)),
        *block("At matched accuracy", matched(lines)), *block("Update and network", both),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _html(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> str:
    import jinja2

    from keyhole.report import figures
    from keyhole.report.render import environment

    env: jinja2.Environment = environment()
    attacks = [c for c in lines if c.is_attack and c.by_seed]
    curves = []
    for defense, attack in dict.fromkeys((c.defense, c.attack) for c in attacks):
        own = sorted((c for c in attacks if (c.defense, c.attack) == (defense, attack)), key=lambda c: c.round)
        name = attack if defense == "none" else f"{attack}, {defense}"
        curves.append((name, own))
    several = len({c.round for c in attacks}) > 1
    recognised = "images recognised, %"
    page: str = env.get_template("inversion.html.j2").render(
        title=found.plan.title,
        verdict=verdict(lines),
        assumptions=assumptions(found),
        note=note(found),
        overview=overview(lines),
        table=table(lines),
        compared=compared(lines),
        matched=matched(lines),
        both=both,
        by_round=figures.leaks_by_round(
            [(name, [(c.round, c.attack_accuracy) for c in own]) for name, own in curves],
            x="rounds of training", y=recognised,
        )
        if several
        else None,
        by_accuracy=figures.trade_off(
            [(f"{name}, round {c.round}", Estimate(c.accuracy), c.attack_accuracy) for name, o in curves for c in o],
            x=recognised,
        )
        if attacks
        else None,
        grids=_grids(found),
        networks=NETWORKS,
        versions=versions(),
    )  # fmt: skip
    return page


def _grids(found: Inversions) -> list[dict[str, Any]]:
    """For each defense and attack of the first seed: a grid a round, classes downwards, beside its controls."""
    from keyhole.report import figures

    if found.plan.invert is None or not found.plan.invert.settings.images:
        return []
    names = spec_names(found.plan.invert.attacks, INVERSIONS)
    seed = found.plan.run.seeds[0]
    groups = []
    for index, specs in enumerate(found.plan.defenses):
        for spec in found.plan.invert.attacks:
            shown = []
            for (i, s, when, own, attacker), images in sorted(
                found.pictures.items(), key=lambda item: (item[0][4] != ATTACK, item[0][2])
            ):
                if (i, s, own) != (index, seed, spec):
                    continue
                if attacker == ATTACK:
                    shown.append((f"round {when}", images))
                elif when == found.plan.invert.rounds[-1]:
                    shown.append((attacker, images))
            if not shown:
                continue
            if found.private is not None:
                shown.insert(0, ("private images", found.private))
            groups.append(
                {
                    "title": f"{names[spec]}, {'no defense' if not specs else defense_name(specs)}",
                    "grids": [{"name": name, "src": figures.mosaic(images.numpy())} for name, images in shown],
                }
            )
    return groups
