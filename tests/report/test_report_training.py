"""What trainings came to: means over seeds, and what a defense costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from keyhole.core.trial import Spec
from keyhole.experiment.train import AfterTraining, Trained
from keyhole.report.training import accuracy_of, by_defense, change, cost, over_seeds, points_in_words


def test_the_mean_over_seeds_has_a_student_interval_within_its_range() -> None:
    found = over_seeds([0.90, 0.92, 0.97])
    # By hand: mean 0.93, standard error 0.0208167, t(0.975, 2) = 4.302653.
    assert found.value == pytest.approx(0.93)
    assert found.low == pytest.approx(0.93 - 4.302653 * 0.0208167, abs=1e-5)
    assert found.high == 1.0
    assert math.isnan(over_seeds([0.5]).low)


def ended(accuracy: float, seed: int, *defense: Spec) -> Trained:
    """A training that ended with this accuracy on 400 images, of which it gets the first ones right."""
    right = tuple(image < round(400 * accuracy) for image in range(400))
    return Trained(defense, seed, Path(), [AfterTraining(round=1, accuracy=accuracy)], right=right)


def test_what_a_defense_costs_is_paired_by_seed() -> None:
    spec = Spec("prune", (("rate", 0.5),))
    plain = [ended(0.9, 0), ended(0.6, 1), ended(0.8, 2)]
    defended = [ended(0.85, 0, spec), ended(0.56, 1, spec), ended(0.77, 2, spec), ended(0.2, 7, spec)]  # 7 has no pair
    trained = by_defense([*plain, *defended])
    name = "prune(rate=0.5)"
    found = change(name, trained)
    wanted = stats.ttest_rel([0.85, 0.56, 0.77], [0.9, 0.6, 0.8]).confidence_interval(0.95)
    assert found.value == pytest.approx(-0.04)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert math.isnan(change("none", trained).value)
    assert math.isnan(change(name, {name: defended}).value)
    assert points_in_words(found).startswith("-4.0 (-6.5 to -1.5)")


def test_a_change_is_no_surer_than_its_images() -> None:
    """Three trainings that agree, and one alone: what is left is that 16 of 400 images came out the other way."""
    spec = Spec("prune", (("rate", 0.5),))
    for seeds in (1, 3):
        runs = [run for seed in range(seeds) for run in (ended(0.9, seed), ended(0.86, seed, spec))]
        found = change("prune(rate=0.5)", by_defense(runs))
        # Bonett and Price 2012 by hand: 0 + 1 and 16 + 1 discordant pairs of 402.
        up, down = 1 / 402, 17 / 402
        half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 402)
        assert found.value == pytest.approx(-0.04)
        assert found.low <= up - down - half + 1e-9 and found.high - found.low >= 2 * half - 1e-9
        assert found.high < 0


def test_an_accuracy_is_no_surer_than_its_images_and_its_trainings() -> None:
    test = stats.binomtest(360, 400)  # 90 % of the images
    wilson = test.proportion_ci(0.95, method="wilson")
    for runs in ([ended(0.9, 0)], [ended(0.9, 0), ended(0.9025, 1), ended(0.8975, 2)], [ended(0.9, 0), ended(0.9, 1)]):
        found = accuracy_of(runs)
        assert (found.value, found.low, found.high) == pytest.approx((0.9, wilson.low, wilson.high))
    apart = [ended(0.8, 0), ended(0.9, 1), ended(0.85, 2)]
    assert accuracy_of(apart) == over_seeds([0.8, 0.9, 0.85])


def test_what_a_process_does_once_is_no_cost_of_a_defense() -> None:
    rows = [AfterTraining(round=n, accuracy=0.9, bytes_up=100, client_seconds=s) for n, s in enumerate((0, 9, 1, 1))]
    assert cost([Trained((), 0, Path(), rows)]) == (300, 1.0)
