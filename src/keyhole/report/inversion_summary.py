"""Inversions to numbers: cells over target networks, and how far an attack is above its best control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from keyhole.core.registry import INVERSIONS
from keyhole.core.trial import Spec
from keyhole.experiment.inversion_judge import ATTACK, CEILING, Inversions, Row
from keyhole.report.intervals import Estimate, student, wider, wilson
from keyhole.report.names import defense_name, spec_names
from keyhole.report.training import over_seeds

FLOORS = ("control:untrained", "control:random_labels", "control:prior_samples")
"""Controls that show what no knowledge of the network reaches."""


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
    names = spec_names(found.inverting.attacks, INVERSIONS)
    grouped: dict[tuple[int, Spec, int, str], list[Row]] = {}
    for row in found.rows:
        grouped.setdefault((row.defense, row.attack, row.round, row.attacker), []).append(row)
    made = []
    for (index, spec, when, attacker), rows in grouped.items():
        scored = {row.seed: (row, row.scores) for row in rows if row.scores is not None}
        own, scores = [row for row, _ in scored.values()], [score for _, score in scored.values()]
        images = sum(row.images for row in own)
        made.append(
            Cell(
                defense=defense_name(found.plan.defenses[index]),
                attack=names[spec],
                attacker=attacker,
                round=when,
                n=max((row.images for row in own), default=found.classes * found.inverting.settings.samples),
                by_seed={seed: score.accuracy for seed, (_, score) in scored.items()},
                right_by_seed={seed: row.accuracy for seed, (row, _) in scored.items()},
                diversity_by_seed={seed: score.diversity for seed, (_, score) in scored.items()},
                attack_accuracy=over_networks(
                    [score.accuracy for score in scores],
                    # The same held-out images stand behind every network's row.
                    images // len(own) if attacker == CEILING and own else images,
                ),
                top5=_mean([score.accuracy_top5 for score in scores]),
                knn_distance=_mean([score.knn_distance for score in scores]),
                feature_distance=_mean([score.feature_distance for score in scores]),
                fid=_mean([score.fid for score in scores]),
                diversity=_mean([score.diversity for score in scores]),
                accuracy=_mean([row.accuracy for row in rows]),
                target_accuracy=_mean([row.target_accuracy for row in own]),
                seconds=_mean([row.seconds for row in own]),
                prior_seconds=_mean([row.prior_seconds for row in own]),
                failed="; ".join(sorted({row.detail for row in rows if row.scores is None})),
            )
        )
    first = {(c.defense, c.attack, c.round): place for place, c in enumerate(made) if c.is_attack}
    # Sorting is stable: controls stay as they came.
    return sorted(made, key=lambda c: first.get((c.defense, c.attack, c.round), len(made)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


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
    return Estimate(found.value, *wider((found.low, found.high), wilson(found.value, images)))


def floor(found: Sequence[Cell], attack: Cell) -> Cell | None:
    """The best of the controls that know nothing of the network, for one attack's cell."""
    own = [
        c for c in found
        if (c.defense, c.attack, c.round) == (attack.defense, attack.attack, attack.round)
        and c.attacker in FLOORS and c.by_seed
    ]  # fmt: skip
    # Of equals the first: the untrained network says most.
    return max(sorted(own, key=lambda c: FLOORS.index(c.attacker)), key=lambda c: c.attack_accuracy.value, default=None)


def lift(found: Sequence[Cell], attack: Cell) -> Estimate:
    """How far an attack is above its best control, network by network."""
    control = floor(found, attack)
    if control is None:
        return Estimate()
    above = student([value - control.by_seed[s] for s, value in attack.by_seed.items() if s in control.by_seed])
    # In this order a missing bound stays missing.
    return Estimate(above.value, max(above.low, -1.0), min(above.high, 1.0))
