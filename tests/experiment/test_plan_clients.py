"""Plans under local training, series and rounds: episodes, the self-test, and how images come together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from keyhole.core.keys import integers, new_key
from keyhole.core.trial import Spec, Trial
from keyhole.errors import ConfigError
from keyhole.experiment.plan import Group, choose, compose, plan, plan_tuning
from keyhole.experiment.setup import Setup, prepare
from keyhole.experiment.spec import Experiment, load_experiment, parse_experiment

LOCAL = ["client.rule=sgd", "client.epochs=2", "client.lr=0.1", "client.images=2", "client.batch_size=1"]


@pytest.fixture(scope="module")
def setup() -> Setup:
    return prepare(load_experiment("quick"), torch.device("cpu"))


def groups(setup: Setup, *overrides: str) -> list[Group]:
    """What an audit like `quick` plans. Names of data and networks are the same under all clients."""
    experiment = load_experiment("quick", overrides)
    return plan(experiment, setup, choose(experiment, setup, []))


def trials(setup: Setup, *overrides: str) -> list[Trial]:
    return [trial for group in groups(setup, *overrides) for trial in (*group.trials, *group.others)]


@pytest.mark.parametrize(
    ("overrides", "checked"),
    [
        ([], {"none", "random_masking"}),
        (["client.batch_size=2"], {"none", "random_masking"}),
        (LOCAL, {"none", "random_masking"}),
        ([*LOCAL, "client.order=shuffled"], set()),
        # One step for all images, in whatever order.
        ([*LOCAL, "client.order=shuffled", "client.batch_size=2"], {"none", "random_masking"}),
        (["client.series=2"], {"none", "random_masking"}),
        (["client.rounds=2"], {"none", "random_masking"}),
        (["attacks.0={name='dlg'}"], {"none", "random_masking"}),
        (["attacks.0={name='inverting_gradients'}"], {"none", "random_masking"}),
        (["attacks.0={name='dlg_fb'}", "client.series=2"], set()),
        (["attacks.0={name='labels_only'}"], set()),
        (["defenses.0.chain.0={name='gaussian_noise', std=0.1}"], {"none"}),
        (["defenses.0.chain=[{name='random_masking'}, {name='gaussian_noise', std=0.1}]"], {"none"}),
        (["defenses.0.chain=[{name='random_masking'}, {name='clip', norm=1.0}]"], {"none", "random_masking+clip"}),
        ([*LOCAL, "attacker.belief=gradient"], {"none", "random_masking"}),
    ],
)
def test_the_self_test_is_planned_where_nothing_unknown_is_left(
    overrides: list[str], checked: set[str], setup: Setup
) -> None:
    found = {
        "+".join(spec.name for spec in trial.defense) or "none"
        for trial in trials(setup, *overrides)
        if trial.attacker == "check:truth"
    }
    assert found == checked


def test_the_self_test_knows_the_client_and_its_labels(setup: Setup) -> None:
    """It is about this code, not about what an attacker believes or how many starts it has."""
    planned = trials(setup, *LOCAL, "attacker.belief={name='sgd', lr=0.5}", "attacks.0.tv=0.1", "attacks.0.restarts=3")
    for trial in planned:
        chosen = trial.attack.asdict()
        if trial.attacker == "check:truth":
            assert trial.belief == Spec.of("exact")
            assert (chosen["restarts"], chosen["tv"]) == (1, 0.0)
        else:
            assert trial.belief.asdict()["lr"] == 0.5
            assert (chosen["labels"], chosen["restarts"], chosen["tv"]) == ("auto", 3, 0.1)
        assert trial.rule == Spec.of("sgd", {"epochs": 2, "lr": 0.1, "batch_size": 1, "order": "fixed"}, 2)


def test_rounds_under_active_dropout_are_refused_or_not_tested(setup: Setup, make_bench: Any) -> None:
    dropped = replace(setup, task=make_bench("conv_drop", dropout="active").task)
    try:
        planned = trials(dropped, "client.rounds=2", "model.dropout=active")
    except ConfigError:
        return
    assert "check:truth" not in {trial.attacker for trial in planned}


def episodes(setup: Setup, *overrides: str) -> list[tuple[int, ...]]:
    return [t.episode for t in trials(setup, *overrides) if t.attacker == "naive" and not t.defense]


def test_an_episode_is_a_batch_or_a_series_of_them(setup: Setup) -> None:
    assert episodes(setup) == [(0,), (1,), (2,), (3,)]
    assert episodes(setup, "client.batch_size=2") == [(0, 1), (2, 3)]
    assert episodes(setup, *LOCAL) == [(0, 1), (2, 3)]
    assert episodes(setup, "client.series=2") == [(0, 1), (2, 3)]
    assert episodes(setup, "client.series=2", "client.batch_size=2") == [(0, 1, 2, 3)]
    assert episodes(setup, "client.rounds=3") == [(0,), (1,), (2,), (3,)]


def test_a_trial_says_how_its_updates_come_about(setup: Setup) -> None:
    def kind(*overrides: str) -> set[tuple[int, int, bool]]:
        return {(t.batch_size, t.rounds, t.fresh) for t in trials(setup, *overrides)}

    assert kind() == {(1, 1, False)}
    assert kind("client.rounds=3") == {(1, 3, False)}
    assert kind("client.series=2", "client.fresh_weights=true") == {(1, 1, True)}
    assert kind(*LOCAL) == {(2, 1, False)}
    hashes = [
        {t.hash for t in trials(setup, *overrides) if t.attacker != "check:truth"}
        for overrides in (
            [],
            ["client.rounds=3"],
            ["client.series=2"],
            ["client.series=2", "client.fresh_weights=true"],
            ["client.batch_size=2"],
            LOCAL,
            [*LOCAL, "attacker.belief=gradient"],
            ["attacker.sees=['weights', 'update', 'targets']"],
        )
    ]
    # Class means do not look at the update, but even they belong to one client; only self-tests are about the code.
    assert len(set().union(*hashes)) == sum(len(own) for own in hashes)


def test_tuning_takes_one_update_at_a_time(setup: Setup) -> None:
    for overrides, expected in (
        (["client.series=4"], [(0,), (1,), (2,), (3,)]),
        ([*LOCAL], [(0, 1), (2, 3)]),
        ([*LOCAL, "client.images=3", "run.samples=3"], [(0, 1, 2)]),
    ):
        experiment = load_experiment("quick", [*overrides, "attacks.0.tune={tv=[0.0]}"])
        planned = [t for g in plan_tuning(experiment, setup) for t in g.trials if not t.defense]
        assert [t.episode for t in planned] == expected


# How images come together


def asked(labels: str, size: int, samples: int, **client: Any) -> Experiment:
    return parse_experiment(
        {
            "data": {"name": "digits", "target": 200},
            "model": {"name": "mlp"},
            "attacks": [{"name": "idlg"}],
            "client": {"labels": labels, "batch_size": size, **client},
            "run": {"samples": samples},
        }
    )


POOL = integers(new_key(5), 10, (200,)).tolist()


@pytest.mark.parametrize(("size", "samples"), [(2, 20), (4, 32), (4, 60), (8, 64), (3, 27)])
def test_equal_and_distinct_deal_the_same_images(size: int, samples: int) -> None:
    equal, distinct = (compose(POOL, asked(kind, size, samples)) for kind in ("equal", "distinct"))
    assert len(equal) == samples
    assert len(set(equal)) == samples, "an image is dealt once"
    assert sorted(equal) == sorted(distinct)
    for start in range(0, samples, size):
        classes = [[POOL[row] for row in rows[start : start + size]] for rows in (equal, distinct)]
        assert len(set(classes[0])) == 1
        assert len(set(classes[1])) == size
    assert compose(POOL, asked("any", size, samples)) == list(range(samples))


def test_all_classes_take_part_before_one_takes_part_twice() -> None:
    rows = compose(POOL, asked("equal", 4, 80))
    classes = [POOL[row] for row in rows[::4]]
    assert classes == [*range(10), *range(10)]
    labels = [0] * 12 + [1] * 4
    assert [labels[row] for row in compose(labels, asked("equal", 4, 12))[::4]] == [0, 1, 0]


def test_a_series_is_dealt_batch_by_batch() -> None:
    assert compose(POOL, asked("distinct", 4, 32, series=2)) == compose(POOL, asked("distinct", 4, 32))


@pytest.mark.parametrize(
    ("labels", "kind", "size", "samples", "words"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], "equal", 4, 4, '"equal" with 1 batches of 4 needs more images of one class'),
        ([0] * 8 + [1] * 8, "distinct", 4, 16, '"distinct" cannot deal 16 images into batches of 4'),
        ([0, 1, 2, 3], "distinct", 2, 4, '"distinct" with 2 batches of 2 needs more images of one class'),
    ],
)
def test_a_pool_that_does_not_do_is_refused(labels: list[int], kind: str, size: int, samples: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(labels, asked(kind, size, samples))


def test_composed_images_are_those_of_the_trials(setup: Setup) -> None:
    """Eight digits with at least one pair: the plan deals what `compose` says."""
    labels = setup.data.target.labels.tolist()
    if max(Counter(labels).values()) < 2:
        pytest.fail(f"the pool of `quick` has no two images of one class: {labels}")
    overrides = ["client.labels=equal", "client.batch_size=2", "run.samples=2"]
    (episode,) = episodes(setup, *overrides)
    assert episode == tuple(compose(labels, load_experiment("quick", overrides)))
    assert labels[episode[0]] == labels[episode[1]]
