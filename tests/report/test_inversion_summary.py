"""Cells of model inversions: their intervals, their controls, and how far they are above them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from inversion_cases import found, row
from scipy import stats

from keyhole.experiment.inversion_judge import ATTACK, Inversions
from keyhole.report.inversion_summary import Cell, cells, floor, lift


def one(inversions: Inversions, **wanted: Any) -> Cell:
    (cell,) = (c for c in cells(inversions) if all(getattr(c, name) == value for name, value in wanted.items()))
    return cell


def test_networks_that_agree_prove_no_more_than_their_images() -> None:
    cell = one(found(*(row(0.0, seed=seed) for seed in range(5))))
    # Wilson's upper bound of 0 of 20 images.
    z = stats.norm.ppf(0.975)
    assert cell.attack_accuracy.low == 0.0
    assert cell.attack_accuracy.high == pytest.approx(z**2 / (20 + z**2))


def test_a_network_that_failed_does_not_take_the_others_along() -> None:
    cell = one(found(row(None), row(0.5, seed=1), row(0.5, seed=2)))
    z = stats.norm.ppf(0.975)
    half = z / (1 + z**2 / 8) * math.sqrt(0.25 / 8 + z**2 / (4 * 64))  # Wilson's of 4 of 8 images
    assert (cell.attack_accuracy.low, cell.attack_accuracy.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert cell.failed == "it <broke>" and set(cell.by_seed) == {1, 2}


def test_held_out_images_count_once_however_many_networks_there_are() -> None:
    ceiling = {"attacker": "control:private_images"}
    cell = one(found(*(row(1.0, seed=seed, **ceiling) for seed in range(5))))
    z = stats.norm.ppf(0.975)
    assert cell.attack_accuracy.low == pytest.approx(4 / (4 + z**2))


def test_lift_is_over_the_best_control_network_by_network() -> None:
    rows = [row(value, seed=seed) for seed, value in enumerate([0.5, 0.75])]
    rows += [row(0.25, seed=seed, attacker="control:untrained") for seed in range(2)]
    rows += [row(0.25, seed=seed, attacker="control:random_labels") for seed in range(2)]
    made = cells(found(*rows))
    attack = next(c for c in made if c.attacker == ATTACK)
    best = floor(made, attack)
    assert best is not None and best.attacker == "control:untrained"  # of equals
    half = 0.125 * stats.t.ppf(0.975, 1)  # differences .25 and .5
    above = lift(made, attack)
    assert (above.value, above.low, above.high) == pytest.approx(
        (0.375, max(-1.0, 0.375 - half), min(1.0, 0.375 + half))
    )


def test_networks_are_what_an_interval_is_over() -> None:
    values = [0.5, 0.7, 0.6, 0.9, 0.8]
    cell = one(found(*(row(v, seed=s, diversity=v) for s, v in enumerate(values))))
    half = stats.sem(values) * stats.t.ppf(0.975, 4)
    assert cell.attack_accuracy.value == pytest.approx(0.7)
    assert (cell.attack_accuracy.low, cell.attack_accuracy.high) == pytest.approx((0.7 - half, min(0.7 + half, 1)))
    assert cell.by_seed == dict(enumerate(values)) and cell.diversity == pytest.approx(0.7)
    assert cell.n == 4  # of one network
    single = one(found(row(0.5)))
    assert single.attack_accuracy.value == 0.5 and math.isnan(single.attack_accuracy.low)


def test_controls_follow_their_attack() -> None:
    rows = [
        row(0.2, round=1), row(0.1, round=1, attacker="control:untrained"), row(0.6),
        row(0.3, attacker="control:prior_samples", accuracy=0.9), row(0.2, round=9, attacker="control:untrained"),
    ]  # fmt: skip
    shown = [(c.round, c.attacker) for c in cells(found(*rows[::2], *rows[1::2]))]
    assert shown == [
        (1, ATTACK), (1, "control:untrained"), (9, ATTACK), (9, "control:untrained"), (9, "control:prior_samples"),
    ]  # fmt: skip
