"""`[client]`, `[attacker]`, `[state]` and the modes: what they become, and what would not mean anything."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from keyhole.core.registry import BELIEFS, RULES
from keyhole.core.rule import LocalSGD
from keyhole.core.trial import Spec
from keyhole.errors import ConfigError
from keyhole.experiment.spec import Experiment, parse_experiment

MINIMAL: dict[str, Any] = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "attacks": [{"name": "idlg"}]}
SGD = {"rule": "sgd", "epochs": 2, "lr": 0.5, "batch_size": 2, "images": 4}


def of(**sections: Any) -> Experiment:
    return parse_experiment({**MINIMAL, **sections})


def test_a_gradient_is_the_default() -> None:
    client = of().client
    assert (client.spec, client.size) == (Spec.of("gradient"), 1)
    assert of(client={"batch_size": 4}).client.size == 4
    assert of().attacker.spec == Spec.of("exact")


def test_local_training_is_spelled_out() -> None:
    client = of(client=SGD).client
    assert client.spec == Spec.of("sgd", {"epochs": 2, "lr": 0.5, "batch_size": 2, "order": "fixed"}, 2)
    assert client.size == 4
    assert RULES.build("sgd", **client.spec.asdict()) == LocalSGD(2, 0.5, 2)
    assert of(client={"rule": "sgd", "batch_size": 4}).client.size == 4
    assert of(client={"rule": "sgd"}).client.spec == of(client={"rule": "sgd", "lr": 0.01, "epochs": 1}).client.spec


@pytest.mark.parametrize("lr", [1, 1.0])
def test_one_and_one_point_nought_are_one_rate(lr: float) -> None:
    client = of(client={**SGD, "lr": lr}).client
    assert repr(client.spec) == repr(of(client={**SGD, "lr": 1.0}).client.spec)
    belief = of(client=SGD, attacker={"belief": {"name": "sgd", "lr": lr}}).attacker
    assert repr(belief.spec) == repr(of(client=SGD, attacker={"belief": {"name": "sgd", "lr": 1.0}}).attacker.spec)


def test_a_belief_is_a_name_or_a_table() -> None:
    assert (
        of(attacker={"belief": "gradient"}).attacker.spec == of(attacker={"belief": {"name": "gradient"}}).attacker.spec
    )
    guess = of(client=SGD, attacker={"belief": {"name": "sgd", "lr": 0.1}}).attacker.spec
    assert guess == Spec.of("sgd", {"epochs": None, "lr": 0.1, "batch_size": None}, 2)
    built = BELIEFS.build(guess.name, rule=LocalSGD(2, 0.5, 2), **guess.asdict())
    assert built.rule == LocalSGD(2, 0.1, 2)


def test_shared_statistics_are_seen() -> None:
    model = {"name": "mlp", "batchnorm": "train_shared"}
    assert of(model=model).sees == ("statistics", "update", "weights")
    assert of(model={**model, "batchnorm": "train_hidden"}).sees == ("update", "weights")
    assert of(attacker={"sees": ["update", "targets"]}).sees == ("targets", "update")


@pytest.mark.parametrize(
    "sections",
    [
        {"client": SGD, "attacker": {"belief": {"name": "sgd", "lr": 0.1, "epochs": 3}}},
        {"client": {**SGD, "order": "shuffled"}, "attacker": {"belief": "order_unknown"}},
        {"client": {**SGD, "rounds": 3}, "attacker": {"belief": {"name": "straight_line"}}},
        {"client": {"series": 4, "fresh_weights": True}, "attacks": [{"name": "dlg_fb"}]},
        {"client": {"batch_size": 4, "labels": "distinct"}, "attacker": {"sees": ["weights", "update", "targets"]}},
        {"model": {"name": "mlp", "dropout": "active"}, "attacker": {"sees": ["weights", "update", "masks"]}},
        {"state": {"train": "early", "clients": 3, "lr": 0.1}, "data": {"name": "digits", "train": 100}},
    ],
)
def test_all_of_it_survives_toml(sections: dict[str, Any]) -> None:
    experiment = of(**sections)
    again = parse_experiment(tomllib.loads(experiment.to_toml()))
    assert again == experiment
    assert again.client.spec == experiment.client.spec
    assert again.attacker.spec == experiment.attacker.spec


LOCAL = 'is for local training; set client.rule = "sgd", or remove it'
TRAINING = 'is about training; set state.train = "early" or "late", or remove it'
TRAIN_MODE = {"name": "mlp", "batchnorm": "train_shared"}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"client": {"epochs": 2}}, f"client.epochs {LOCAL}"),
        ({"client": {"lr": 0.1}}, f"client.lr {LOCAL}"),
        ({"client": {"order": "fixed"}}, f"client.order {LOCAL}"),
        ({"client": {"images": 4}}, f"client.images {LOCAL}"),
        ({"client": {**SGD, "lr": 0.0}}, "client.lr: input should be greater than 0"),
        ({"client": {**SGD, "epochs": 0}}, "client.epochs: input should be greater than or equal to 1"),
        ({"client": {**SGD, "order": "random"}}, "client.order: input should be 'fixed' or 'shuffled'"),
        ({"client": {**SGD, "images": 65}}, "client.images is 65, larger than the target pool of 64"),
        ({"client": {**SGD, "images": 5}}, "not a multiple of client.images 5"),
        ({"client": {"series": 3}}, "not a multiple of client.batch_size 1 times client.series 3"),
        ({"client": {"labels": "same"}}, "client.labels: input should be 'any', 'distinct' or 'equal'"),
        ({"attacker": {"belief": "order_unknown"}}, "attacker.belief 'order_unknown'.*about local SGD"),
        ({"attacker": {"belief": "exakt"}}, "unknown belief 'exakt' in attacker.belief; did you mean 'exact'"),
        ({"attacker": {"belief": {"name": "sgd", "lrr": 0.1}}}, "unknown option 'lrr'.*did you mean 'lr'"),
        ({"attacker": {"belief": {"name": "sgd", "lr": -1.0}}}, "lr is -1.0; it must be above 0"),
        ({"attacker": {"belief": {"name": "sgd", "lr": "fast"}}}, "attacker.belief sgd.lr"),
        ({"attacker": {"belief": {"lr": 0.1}}}, "attacker.belief needs a name"),
        ({"attacker": {"belief": {"name": "sgd", "rule": "gradient"}}}, "unknown option 'rule'"),
        ({"attacker": {"belief": 3}}, "attacker.belief"),
        ({"attacker": {"sees": ["statistics"]}}, "attacker.sees"),
        ({"client": SGD, "model": TRAIN_MODE}, '"train_shared" is about one local step'),
        ({"client": SGD, "model": {"name": "mlp", "dropout": "active"}}, '"active" draws one mask a step'),
        ({"attacker": {"sees": ["masks"]}}, '"masks", which exist with model.dropout = "active" only'),
        ({"client": {"series": 2, "rounds": 2}}, "cannot both be above 1"),
        ({"client": {"fresh_weights": True}}, "fresh_weights needs client.series above 1"),
        (
            {"client": {"fresh_weights": True, "series": 2}, "state": {"train": "early"}},
            'fresh_weights needs .* state.train = "none"',
        ),
        ({"client": {"labels": "distinct"}}, '"distinct" is about updates of several images'),
        *(
            ({"state": {key: value}}, f"state.{key} {TRAINING}")
            for key, value in {"clients": 2, "rounds": 2, "epochs": 2, "lr": 0.1, "batch_size": 2, "alpha": 0.5}.items()
        ),
        ({"state": {"train": "early", "clients": 0}}, "state.clients: input should be greater than or equal to 1"),
        ({"state": {"train": "early", "alpha": 0.0}}, "state.alpha: input should be greater than or equal to 0.001"),
        ({"model": {"name": "mlp", "batchnorm": "train"}}, "model.batchnorm: input should be 'eval', 'train_shared'"),
        ({"model": {"name": "mlp", "dropout": "on"}}, "model.dropout: input should be 'off' or 'active'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refused_with_a_sentence(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        of(**sections)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "sections",
    [
        {"client": {"rule": "sgd", "batch_size": 4}, "model": TRAIN_MODE},  # one step
        {"client": {"rule": "sgd", "batch_size": 8, "images": 4}, "model": TRAIN_MODE},
        {"client": SGD, "model": {"name": "mlp", "batchnorm": "train_hidden"}},
        {"client": {"labels": "equal"}},
        {"client": {"series": 2, "fresh_weights": True}},
        {"client": {**SGD, "series": 2}},
    ],
)
def test_accepted(sections: dict[str, Any]) -> None:
    of(**sections)
