"""The audit file: what is accepted, what is refused, and with which sentence."""

from __future__ import annotations

import tomllib

import pytest

from keyhole.core.trial import Spec
from keyhole.errors import ConfigError, UnknownName
from keyhole.experiment.spec import load_experiment, load_study, parse_experiment, parse_study, presets

MINIMAL = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "attacks": [{"name": "idlg"}]}


def with_(**sections: object) -> dict[str, object]:
    return {**MINIMAL, **sections}


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_survive_toml(name: str) -> None:
    study = load_study(name)
    again = parse_study(tomllib.loads(study.to_toml()))
    assert again == study
    assert again.to_toml() == study.to_toml()


def test_undefended_is_always_run_and_once() -> None:
    assert parse_experiment(with_()).defenses == ((),)
    assert parse_experiment(with_(defenses=[{"chain": []}])).defenses == ((),)


def test_a_list_means_one_cell_each() -> None:
    chain = [{"name": "random_masking", "rate": [0.3, 0.5]}, {"name": "clip", "norm": [1.0, 2.0]}]
    cells = parse_experiment(with_(defenses=[{"chain": chain}])).defenses[1:]
    assert [(a.asdict()["rate"], b.asdict()["norm"]) for a, b in cells] == [
        (0.3, 1.0),
        (0.3, 2.0),
        (0.5, 1.0),
        (0.5, 2.0),
    ]


def test_defaults_are_filled_in_so_that_equal_means_equal() -> None:
    plain = parse_experiment(with_(defenses=[{"chain": [{"name": "clip", "norm": 1}]}]))
    spelled = parse_experiment(with_(defenses=[{"chain": [{"name": "clip", "norm": 1.0, "scale": "absolute"}]}]))
    assert plain == spelled
    assert isinstance(plain.defenses[1][0], Spec)


def test_attacker_labels_reach_attacks_that_name_none() -> None:
    entries = [{"name": "idlg"}, {"name": "idlg", "labels": "random"}]
    experiment = parse_experiment(with_(attacker={"labels": "geng"}, attacks=entries))
    assert [e.spec.asdict()["labels"] for e in experiment.attacks] == ["geng", "random"]


def test_overrides_reach_every_depth() -> None:
    overrides = ["run.samples=4", "attacks.0.steps=7", "defenses.0.chain.0.rate=0.25", "data.seed=3", "model.name=mlp"]
    experiment = load_experiment("quick", overrides)
    assert experiment.run.samples == 4
    assert experiment.attacks[0].spec.asdict()["steps"] == 7
    assert experiment.defenses[1][0].asdict()["rate"] == 0.25
    assert (experiment.data.seed, experiment.model.name) == (3, "mlp")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (with_(dat={}), "unknown key 'dat' in the audit file; did you mean 'data'"),
        (with_(run={"sampels": 1}), r"unknown key 'sampels' in \[run\]; did you mean 'samples'"),
        (with_(attacks=[{"name": "idgl"}]), "unknown attack 'idgl'.*did you mean 'idlg'"),
        (with_(attacks=[{"name": "idlg", "stepz": 1}]), "unknown option 'stepz'.*did you mean 'steps'"),
        (with_(attacks=[{"name": "idlg", "steps": "many"}]), "steps: input should be a valid integer"),
        (with_(attacks=[{"name": "idlg", "steps": 0}]), "steps is 0; it must be at least 1"),
        (
            with_(attacks=[{"name": "idlg", "start": "grey"}]),
            "start: .* 'random', 'gray', 'mean' or 'class_mean'",
        ),
        (with_(attacks=[{"name": "idlg", "tv": -1.0}]), "weight of a penalty is -1.0; it must be at least 0"),
        (with_(attacks=[{"name": "idlg", "labels": "ilgr"}]), "unknown label rule 'ilgr'.*did you mean 'ilrg'"),
        (with_(attacks=[{"name": "idlg", "tune": {"tw": [0.0]}}]), "unknown option 'tw'"),
        (with_(attacks=[{"name": "idlg", "tune": {"tv": 0.0}}]), "tune must be a table of lists"),
        (with_(attacks=[]), "names no attack"),
        (with_(attacks="idlg"), r"must be written as \[\[attacks\]\]"),
        (with_(defenses=[{"chain": [{"name": "clipp"}]}]), "unknown defense 'clipp'.*did you mean 'clip'"),
        (with_(defenses=[{"chain": [{"name": "prune", "rate": 1.0}]}]), "rate is 1.0; it must be .* below 1"),
        (with_(defenses=[{"chian": []}]), "unknown key 'chian'.*did you mean 'chain'"),
        (with_(run={"budget": -1}), "run.budget: input should be greater than or equal to 0"),
        (with_(run={"seeds": [1, 1]}), "repeats a seed"),
        (with_(run={"seeds": []}), "run.seeds"),
        (with_(run={"samples": 99}), "larger than the target pool of 64"),
        (with_(client={"batch_size": 65}), "larger than the target pool of 64"),
        (with_(client={"batch_size": 3}), "not a multiple"),
        (with_(client={"rule": "fedprox"}), "client.rule: input should be 'gradient' or 'sgd'"),
        (with_(title="../elsewhere"), "title is '../elsewhere'"),
        (with_(defenses=[{"chain": [{"name": "clip", "norm": []}]}]), "gives 'norm' an empty list"),
        (
            with_(data={"name": "digits", "tune": 0}, attacks=[{"name": "idlg", "tune": {"tv": [0.0]}}]),
            "data.tune is 0",
        ),
        (with_(attacks=[{"name": "idlg", "tv": float("inf")}]), "must be at least 0 and below inf"),
        (with_(attacker={"sees": ["weight"]}), "attacker.sees"),
        (with_(model={}), "either a name or a factory"),
        (with_(model={"name": "convent"}), "unknown model 'convent'.*did you mean 'convnet'"),
        (with_(model={"name": "convnet", "widht": 4}), "unknown key 'widht'.*did you mean 'width'"),
        (with_(model={"factory": "no_colon"}), "package.module:function"),
        (with_(data=3), r"\[data\] must be a table"),
        ({"model": {"name": "mlp"}}, r"no \[data\] section"),
    ],
)
def test_refused_with_a_sentence(raw: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_experiment(raw)


def test_unclosed_toml_and_missing_file(tmp_path: object) -> None:
    path = tmp_path / "a.toml"  # type: ignore[operator]
    path.write_text("[data\nname = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_experiment(str(path))
    with pytest.raises(ConfigError, match="there is no file"):
        load_experiment("missing.toml")
    with pytest.raises(UnknownName, match="did you mean 'faces'"):
        load_experiment("facse")


@pytest.mark.parametrize("override", ["run.samples", "=3", "attacks.9.steps=1", "title.deep.er=1"])
def test_bad_override(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_experiment("quick", [override])
