"""Settings: several experiments of one audit file, each the rest of the file with some keys changed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from keyhole.errors import ConfigError, UnknownName
from keyhole.experiment.spec import Study, load_experiment, load_study, parse_experiment, parse_study

BASE: dict[str, Any] = {
    "title": "several",
    "data": {"name": "digits", "target": 32, "seed": 3},
    "model": {"name": "mlp"},
    "attacks": [{"name": "idlg", "steps": 50}],
    "defenses": [{"chain": [{"name": "clip", "norm": 1.0}]}],
    "run": {"samples": 8, "seeds": [0, 1]},
}


def study(*settings: dict[str, Any], **changes: Any) -> Study:
    return parse_study({**BASE, **changes, "settings": list(settings)})


def test_a_file_without_settings_is_one_experiment() -> None:
    one = parse_study(BASE)
    assert one == Study.of(parse_experiment(BASE))
    assert (one.title, len(one.experiments), one.experiments[0].setting) == ("several", 1, "")
    assert parse_study({**BASE, "settings": []}) == one


def test_each_setting_is_the_file_with_some_keys_changed() -> None:
    both = study({"name": "plain"}, {"name": "four", "client": {"batch_size": 4}, "data": {"seed": 5}})
    plain, four = both.experiments
    assert plain.model_copy(update={"setting": ""}) == parse_experiment(BASE)
    expected = {**BASE, "client": {"batch_size": 4}, "data": {"name": "digits", "target": 32, "seed": 5}}
    assert four.model_copy(update={"setting": ""}) == parse_experiment(expected)
    assert [e.setting for e in both.experiments] == ["plain", "four"]


def test_tables_are_merged_and_lists_replaced() -> None:
    one, two = study(
        {"name": "one", "run": {"seeds": [7]}},
        {"name": "two", "attacks": [{"name": "dlg"}], "defenses": []},
    ).experiments
    assert (one.run.seeds, one.run.samples) == ([7], 8)
    assert one.attacks == parse_experiment(BASE).attacks
    assert [entry.spec.name for entry in two.attacks] == ["dlg"]
    assert two.defenses == ((),)


def test_the_file_itself_is_left_as_it_was() -> None:
    base = {**BASE, "client": {"batch_size": 1}}
    study({"name": "a", "client": {"batch_size": 2}}, {"name": "b"}, **base)
    assert base["client"] == {"batch_size": 1}
    first, second = study({"name": "a", "client": {"batch_size": 2}}, {"name": "b"}, **base).experiments
    assert (first.client.batch_size, second.client.batch_size) == (2, 1)


def test_a_setting_may_bring_what_the_file_leaves_out() -> None:
    bare = {k: v for k, v in BASE.items() if k != "model"}
    first, second = parse_study(
        {**bare, "settings": [{"name": "a", "model": {"name": "mlp"}}, {"name": "b", "model": {"name": "lenet_zhu"}}]}
    ).experiments
    assert (first.model.name, second.model.name) == ("mlp", "lenet_zhu")
    with pytest.raises(ConfigError, match=r"setting 'b': the audit file has no \[model\] section"):
        parse_study({**bare, "settings": [{"name": "a", "model": {"name": "mlp"}}, {"name": "b"}]})


MANY = (
    {"name": "plain"},
    {"name": "steps, twice", "against": "plain", "client": {"rule": "sgd", "epochs": 2, "images": 2}},
    {
        "name": "a guess",
        "against": "steps, twice",
        "client": {"rule": "sgd"},
        "attacker": {"belief": {"name": "sgd", "lr": 0.5}},
        "attacks": [{"name": "idlg", "tune": {"tv": [0.0, 0.1]}}],
    },
    {"name": "0.5", "client": {"series": 2, "fresh_weights": True}, "data": {"mean": [0.5], "std": [1.0]}},
)


@pytest.mark.parametrize("settings", [(), MANY[:1], MANY[:2], MANY])
def test_a_study_survives_toml(settings: tuple[dict[str, Any], ...]) -> None:
    one = parse_study({**BASE, "settings": list(settings)})
    again = parse_study(tomllib.loads(one.to_toml()))
    assert again == one
    assert again.to_toml() == one.to_toml()
    assert [e.against for e in again.experiments] == [s.get("against", "") for s in settings] or not settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([{}], r"\[\[settings\]\] number 1 needs a name of its own"),
        ([{"name": "a"}, {"name": "  "}], r"number 2 needs a name of its own"),
        ([{"name": "a"}, {"name": 4}], r"number 2 needs a name of its own"),
        ([{"name": "a"}, {"name": "b"}, {"name": "a"}], r"number 1 needs a name of its own"),
        ([{"name": "a", "against": "a"}], "unknown setting 'a' in .*number 1 against"),
        ([{"name": "plain"}, {"name": "b", "against": "plian"}], "unknown setting 'plian'.*did you mean 'plain'"),
        ([{"name": "a"}, {"name": "b", "clinet": {}}], "setting 'b': unknown key 'clinet'.*did you mean 'client'"),
        ([{"name": "a"}, {"name": "b", "run": {"samples": 99}}], "setting 'b': run.samples is 99, larger than"),
        ([{"name": "a", "attacks": [{"name": "idgl"}]}], "setting 'a': unknown attack 'idgl'.*did you mean 'idlg'"),
        ([{"name": "a", "client": {"lr": 0.1}}], "setting 'a': client.lr is for local training"),
        ([{"name": "a", "data": 3}], r"setting 'a': \[data\] must be a table"),
        ("a", r"settings must be written as \[\[settings\]\] tables"),
        ([3], r"settings must be written as \[\[settings\]\] tables"),
    ],
)
def test_refused_with_a_sentence_that_names_the_setting(settings: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse_study({**BASE, "settings": settings})
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_lists_the_others() -> None:
    with pytest.raises(UnknownName, match="Accepted: a, b"):
        study({"name": "a"}, {"name": "b"}, {"name": "c", "against": "zzz"})


def test_settings_are_read_from_a_file_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(study(*MANY).to_toml())
    assert load_study(str(path)) == study(*MANY)
    # A key of one setting, by its place in the list.
    assert load_study(str(path), ["settings.1.run.samples=4"]).experiments[1].run.samples == 4
    assert load_study(str(path), ["settings.1.run.samples=4"]).experiments[0].run.samples == 8
    with pytest.raises(ConfigError, match="has 4 settings; one experiment is needed"):
        load_experiment(str(path))


def test_what_the_whole_file_says_is_overridden_for_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[data]\nname = "digits"\n[model]\nname = "mlp"\n[[attacks]]\nname = "idlg"\n'
        '[[settings]]\nname = "a"\n[[settings]]\nname = "b"\nrun.samples = 4\n'
    )
    assert [e.run.samples for e in load_study(str(path), ["run.samples=2"]).experiments] == [2, 2]
    assert [e.run.samples for e in load_study(str(path), ["settings.1.run.samples=8"]).experiments] == [16, 8]
    assert load_study(str(path)).title == "mine"


def test_a_setting_has_no_settings_of_its_own() -> None:
    with pytest.raises(ConfigError):
        study({"name": "a", "settings": [{"name": "b", "client": {"batch_size": 2}}]})


def test_a_title_in_a_setting_is_refused_or_survives() -> None:
    try:
        one = study({"name": "a", "title": "other"}, {"name": "b"})
    except ConfigError:
        return
    assert parse_study(tomllib.loads(one.to_toml())) == one
