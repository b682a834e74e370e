"""What trainings came to: means over seeds, and what a defense costs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from keyhole.core.trial import Spec
from keyhole.experiment.train import AfterTraining, Trained
from keyhole.report.training import by_defense, change, over_seeds, points_in_words


def test_the_mean_over_seeds_has_a_student_interval_within_its_range() -> None:
    found = over_seeds([0.90, 0.92, 0.97])
    # By hand: mean 0.93, standard error 0.0208167, t(0.975, 2) = 4.302653.
    assert found.value == pytest.approx(0.93)
    assert found.low == pytest.approx(0.93 - 4.302653 * 0.0208167, abs=1e-5)
    assert found.high == 1.0
    assert math.isnan(over_seeds([0.5]).low)


def ended(accuracy: float, seed: int, *defense: Spec) -> Trained:
    """A training that ended with this accuracy."""
    return Trained(defense, seed, Path(), [AfterTraining(round=1, accuracy=accuracy)])


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
