"""The prior of reconstruction bounds, and the bound as a fact of outcomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from keyhole.core.keys import new_key, uniform
from keyhole.core.trial import Spec
from keyhole.experiment.plan import Group
from keyhole.experiment.prior import best_guess, pairwise_ssim
from keyhole.experiment.run import run_group
from keyhole.metrics.image import structural_similarity

KEY = new_key(3)


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_have_the_similarity_of_the_metric(channels: int) -> None:
    noise = uniform(KEY, (4, channels, 12, 10), torch.float64)
    images = torch.cat([noise, 0.5 + 0.1 * noise, torch.full_like(noise[:1], 0.3)])
    got = pairwise_ssim(images, images[:3])
    for j in range(3):
        wanted = structural_similarity(images, images[j].expand_as(images))
        assert torch.allclose(got[:, j], wanted, atol=1e-6)


def limit(hits: int, count: int) -> float:
    return float(stats.binomtest(hits, count, alternative="less").proportion_ci(0.95).high)


def test_unlike_images_leave_the_upper_limit_of_never() -> None:
    images = uniform(KEY, (40, 1, 12, 12))
    assert best_guess(images, torch.arange(40)) == pytest.approx(limit(0, 40))
    assert best_guess(images, torch.arange(40)) > 1 / 40
    # Of many images a part is taken, which cannot lower the limit.
    assert best_guess(uniform(KEY, (300, 1, 12, 12)), torch.arange(300)) == pytest.approx(limit(0, 256))


def test_images_of_one_kind_are_guessed_as_often_as_they_come() -> None:
    images = uniform(KEY, (40, 1, 12, 12))
    images[5:17] = images[5]
    # Each of the twelve hits the eleven others.
    assert best_guess(images, torch.arange(40)) == pytest.approx(limit(11, 39))
    assert best_guess(images[5:17], torch.arange(12)) == 1.0


def test_a_mean_may_be_the_best_guess() -> None:
    common = uniform(KEY, (1, 1, 12, 12))
    images = (common + 0.9 * (uniform(new_key(4), (30, 1, 12, 12)) - 0.5)).clamp(0, 1)
    similar = (pairwise_ssim(images, images) >= 0.7).fill_diagonal_(False)
    by_mean = int((pairwise_ssim(images.mean(0)[None], images) >= 0.7).sum())
    assert int(similar.sum(1).max()) <= 2 < 20 < by_mean
    assert best_guess(images, torch.arange(30)) == pytest.approx(limit(by_mean, 30))


def test_the_mean_of_a_class_is_judged_on_others() -> None:
    images = uniform(KEY, (20, 1, 12, 12))
    assert best_guess(images, torch.arange(20) // 2) == pytest.approx(limit(0, 20))


def test_outcomes_of_attackers_carry_the_bound_where_it_holds(make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    options = {"steps": 2}
    defense = (("dp_sgd", {"clip": 0.1, "noise_multiplier": 4.0}),)

    def bound(**fields: Any) -> float | None:
        given = {"options": options, "defense": defense, **fields}
        (outcome,) = run_group(Group((make_trial(**given),)), setup).outcomes
        assert outcome.status not in ("refused", "failed"), outcome.detail
        return outcome.facts.get("success_bound")

    def wanted(prior: float, steps: int) -> float:
        return float(stats.norm.cdf(stats.norm.ppf(prior) + steps**0.5 / 4.0))

    for attacker in ("naive", "adaptive:clipped_gradients"):
        assert bound(attacker=attacker) == pytest.approx(wanted(setup.prior, 1))
    assert bound(rounds=3) == pytest.approx(wanted(setup.prior, 3))
    assert bound(attacker="control:prior_only") is None
    assert bound(defense=(("gaussian_noise", {}),)) is None
    assert bound(defense=(*defense, ("prune", {}))) == pytest.approx(wanted(setup.prior, 1))
    # Two local steps are two noisy gradients; given labels make a guess for each class.
    rule = Spec.of("sgd", {"epochs": 2, "lr": 0.1, "batch_size": 1, "order": "fixed"})
    assert bound(rule=rule) == pytest.approx(wanted(setup.prior, 2))
    assert 4 * setup.prior > 1
    assert bound(sees=("targets", "update", "weights")) == 1.0
    # Trained here means trained on the secrets too: the weights tell of them beside the update.
    setup.facts[0] = {"accuracy": 0.9}
    assert bound() is None
    setup.facts[0] = {}
    assert 2 * setup.prior < 1
    assert bound(episode=(0, 1), batch_size=2) == pytest.approx(wanted(2 * setup.prior, 1))


def test_a_model_with_batchnorm_is_refused_in_a_sentence(make_setup: Any, make_trial: Any) -> None:
    trial = make_trial(defense=(("dp_sgd", {}),), options={"steps": 2})
    (outcome,) = run_group(Group((trial,)), make_setup(model="conv_norm", batchnorm="eval")).outcomes
    assert outcome.status == "refused"
    assert "BatchNorm" in outcome.detail
    assert "\n" not in outcome.detail
