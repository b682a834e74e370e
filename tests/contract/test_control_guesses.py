"""Controls: what they keep of an update, what they must not, and how many guesses they get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from keyhole.core.keys import fold_in, new_key, normal, permutation
from keyhole.core.types import Tensors
from keyhole.experiment.controls import class_mean, neighbours, noise_update
from keyhole.experiment.plan import Group
from keyhole.experiment.run import run_group

KEY = new_key(51)


def masked(seed: int = 0) -> Tensors:
    key = fold_in(new_key(seed), "update")
    update = {n: normal(fold_in(key, n), s, torch.float64) for n, s in {"w": (40, 50), "b": (30,), "z": (5,)}.items()}
    update["w"] = 0.01 * update["w"] * (normal(fold_in(new_key(0), "mask"), (40, 50)) > 0)
    update["z"] = update["z"] * 0
    return update


def test_noise_keeps_the_norm_and_the_zeros_of_each_tensor() -> None:
    update = masked()
    noise = noise_update(update, KEY)
    assert list(noise) == list(update)
    for name, value in update.items():
        assert noise[name].dtype == value.dtype
        assert torch.equal(noise[name] == 0, value == 0)
        assert float(noise[name].norm()) == pytest.approx(float(value.norm()), rel=1e-12)
    assert not noise["z"].any()


def test_noise_knows_nothing_of_the_updates_direction() -> None:
    update = masked()
    sent = update["w"] != 0
    mixed = {**update, "w": update["w"].clone(), "b": update["b"][permutation(KEY, 30)]}
    mixed["w"][sent] = update["w"][sent][permutation(KEY, int(sent.sum()))]
    for other in ({n: -v for n, v in update.items()}, mixed):
        for name, value in noise_update(other, KEY).items():
            assert torch.allclose(value, noise_update(update, KEY)[name], rtol=1e-10, atol=1e-14)
    angle = torch.nn.functional.cosine_similarity(
        noise_update(update, KEY)["w"].flatten(), update["w"].flatten(), dim=0
    )
    assert abs(float(angle)) < 4.5 / np.sqrt(int(sent.sum()))


def test_noise_is_its_keys() -> None:
    update = masked()
    assert torch.equal(noise_update(update, KEY)["w"], noise_update(update, KEY)["w"])
    other = noise_update(update, fold_in(KEY, 1))["w"]
    assert not torch.equal(other, noise_update(update, KEY)["w"])


def test_class_means_by_hand() -> None:
    public = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2) / 10
    labels = torch.tensor([0, 1, 0, 1, 3])
    guesses = class_mean(public, labels, torch.tensor([1, 0, 3, 2, 1]))
    assert guesses.shape == (5, 1, 2, 2)
    expected = [0.2, 0.1, 0.4, 0.2, 0.2]  # class 2 has no public image and gets the mean of all
    assert torch.allclose(guesses[:, 0, 0, 0], torch.tensor(expected))
    assert torch.equal(guesses, guesses[:, :, :1, :1].expand(5, 1, 2, 2))


def test_neighbours_get_the_next_trials_guesses() -> None:
    guesses = torch.arange(3.0)[:, None, None, None, None].expand(3, 2, 1, 4, 4)
    given = neighbours(guesses)
    assert given[:, 0, 0, 0, 0].tolist() == [1, 2, 0]
    assert given.shape == guesses.shape


def test_the_other_clients_guess_is_the_neighbours_reconstruction(make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    options = {"steps": 10, "history": 5}
    trials = tuple(make_trial("idlg", options, (i,)) for i in range(3))
    others = tuple(make_trial("idlg", options, (i,), attacker="control:other_client") for i in range(3))
    result = run_group(Group(trials, others), setup)
    assert [o.trial for o in result.outcomes] == [*trials, *others]
    for i in range(3):
        own, given = result.reconstructions[trials[(i + 1) % 3].hash], result.reconstructions[others[i].hash]
        assert torch.equal(own, given)
    for outcome in result.outcomes[3:]:
        assert outcome.evaluations == 0
        assert "label_accuracy" not in outcome.metrics


@pytest.mark.parametrize("size", [1, 2])
def test_every_control_gets_as_many_guesses_as_the_attack(size: int, make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    episodes = [tuple(range(i, i + size)) for i in range(0, 4, size)]
    for attacker in ("naive", "control:prior_only", "control:class_mean"):
        trials = tuple(
            make_trial("idlg", {"steps": 5, "history": 5}, e, batch_size=size, attacker=attacker) for e in episodes
        )
        result = run_group(Group(trials), setup)
        for trial, outcome in zip(trials, result.outcomes, strict=True):
            assert outcome.status != "failed", outcome.detail
            assert result.reconstructions[trial.hash].shape == (size, 1, 8, 8)
            assert {len(values) for values in outcome.metrics.values()} == {size}


def test_a_control_of_class_means_scores_by_hand(make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    trial = make_trial("idlg", {}, (2,), attacker="control:class_mean")
    (outcome,) = run_group(Group((trial,)), setup).outcomes
    public, target = setup.data.public, setup.data.target
    guess = public.images[public.labels == target.labels[2]].mean(0)
    assert outcome.metrics["mse"][0] == pytest.approx(float((guess - target.images[2]).square().mean()), rel=1e-9)


def test_the_prior_alone_finds_nothing_where_the_attack_finds_all(make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    options = {"steps": 200, "history": 40}
    scores = {}
    for attacker in ("naive", "control:prior_only"):
        trials = tuple(make_trial("idlg", options, (i,), attacker=attacker) for i in range(2))
        scores[attacker] = [o.metrics["mse"][0] for o in run_group(Group(trials), setup).outcomes]
    assert max(scores["naive"]) < 1e-3
    assert min(scores["control:prior_only"]) > 0.02


def test_batch_statistics_alone_are_a_leak_as_no_control_has_them(
    dropping: None, make_setup: Any, make_trial: Any
) -> None:
    """Clients send no update at all. The other client's guess is of its own statistics."""
    setup = make_setup(model="wide_norm", batchnorm="train_shared")
    options = {"steps": 200, "restarts": 1, "tv": 0.0, "statistics": 1.0, "labels": "given"}
    given = {"defense": (("dropping", {}),), "sees": ("statistics", "targets", "update", "weights")}
    trials = tuple(make_trial("inverting_gradients", options, (i,), **given) for i in range(2))
    noise, others = (
        tuple(replace(trial, attacker=f"control:{name}") for trial in trials) for name in ("prior_only", "other_client")
    )
    found, blind = run_group(Group(trials, others), setup), run_group(Group(noise), setup)
    assert {outcome.status for outcome in (*found.outcomes, *blind.outcomes)} == {"budget"}
    ssim = [outcome.metrics["ssim"][0] for outcome in (*found.outcomes, *blind.outcomes)]
    assert min(ssim[:2]) > 0.9
    assert max(ssim[2:]) < 0.3
    for i in range(2):
        neighbour = setup.data.target.images[1 - i].float()
        assert float((found.reconstructions[others[i].hash][0] - neighbour).square().mean()) < 0.01
