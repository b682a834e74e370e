"""What trials share: refused where it would mislead, and named so that another problem has another name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from keyhole.core.types import Weights
from keyhole.errors import ConfigError, DataError, KeyholeError
from keyhole.experiment import audit, load_experiment, work
from keyhole.experiment.setup import find_device, prepare
from keyhole.experiment.spec import parse_study
from keyhole.solve.checkpoint import load_checkpoint

CPU = torch.device("cpu")
NETS = """
import numpy, torch
from torch import nn
def sigmoid(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.{activation}(), nn.Linear(8, num_classes))
def same(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def normed(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, num_classes)
    )
def other_each_time(num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(numpy.random.default_rng().normal(size=(num_classes, 64))))
    return model
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module with factories, importable from here and from workers."""
    monkeypatch.chdir(tmp_path)
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS.replace("{activation}", "Sigmoid"))
    return name


def test_small_images_are_refused() -> None:
    with pytest.raises(DataError, match="4x4 pixels.*data.size to 7"):
        prepare(load_experiment("quick", ["data.size=4"]), CPU)


def test_equal_networks_are_not_two(nets: str) -> None:
    experiment = load_experiment("quick", [f'model={{factory="{nets}:same"}}', "run.seeds=[0, 1]"])
    with pytest.raises(ConfigError, match="seeds 0 and 1 give the same network"):
        prepare(experiment, CPU)


def test_another_forward_pass_is_another_problem(nets: str, tmp_path: Path) -> None:
    """Equal weights under another activation: their trials must not share a name."""
    experiment = load_experiment("quick", [f'model={{factory="{nets}:sigmoid"}}'])
    before = prepare(experiment, CPU)
    other = f"{nets}_relu"
    (tmp_path / f"{other}.py").write_text(NETS.replace("{activation}", "ReLU"))
    after = prepare(load_experiment("quick", [f'model={{factory="{other}:sigmoid"}}']), CPU)
    assert after.states == before.states
    assert after.normalisation != before.normalisation
    assert prepare(experiment, CPU).fingerprint == before.fingerprint


def differ(a: Weights, b: Weights) -> bool:
    return not any(torch.equal(a.params[name], b.params[name]) for name in a.params)


def test_a_network_for_each_update_of_a_series() -> None:
    """The first is the one that a single update would see; all of all seeds are different."""
    plain = prepare(load_experiment("quick", ["run.seeds=[0, 1]"]), CPU)
    overrides = ["run.seeds=[0, 1]", "client.series=4", "client.fresh_weights=true"]
    fresh = prepare(load_experiment("quick", overrides), CPU)
    assert [len(own) for own in plain.weights.values()] == [1, 1]
    assert [len(own) for own in fresh.weights.values()] == [4, 4]
    for seed in (0, 1):
        first, single = fresh.weights[seed][0], plain.weights[seed][0]
        assert all(torch.equal(first.params[name], single.params[name]) for name in single.params)
        assert fresh.states[seed] != plain.states[seed]
    everyone = [network for own in fresh.weights.values() for network in own]
    assert all(differ(a, b) for a, b in itertools.combinations(everyone, 2))
    shared = prepare(load_experiment("quick", ["run.seeds=[0, 1]", "client.series=4"]), CPU)
    assert shared.states == plain.states, "a series on one network is attacked on the network of a single update"


def test_a_trial_is_given_the_networks_of_its_updates(make_setup: Any, make_trial: Any) -> None:
    one, several = make_setup(), make_setup(networks=3)
    (only,) = one.weights[0]
    assert one.networks(make_trial(episode=(0,))) == (only,)
    assert one.networks(make_trial(episode=(0, 1, 2))) == (only,) * 3
    assert one.networks(make_trial(episode=(0, 1, 2, 3), batch_size=2)) == (only,) * 2
    assert one.networks(make_trial(episode=(0,), rounds=4)) == (only,) * 4
    assert several.networks(make_trial(episode=(0, 1, 2), fresh=True)) == several.weights[0]


def test_every_mode_is_another_problem(nets: str) -> None:
    def named(*overrides: str) -> str:
        table = f'model={{factory="{nets}:normed", {", ".join(overrides)}}}'
        return prepare(load_experiment("quick", [table]), CPU).normalisation

    modes = [f'batchnorm="{mode}"' for mode in ("eval", "train_shared", "train_hidden")]
    names = [named(mode, f'dropout="{drop}"') for mode in modes for drop in ("off", "active")]
    assert len(set(names)) == 6
    assert named(modes[0], 'dropout="off"') == names[0]


def test_networks_of_this_audit_have_no_facts_of_training() -> None:
    setup = prepare(load_experiment("quick", ["run.seeds=[0, 1]"]), CPU)
    assert not any(setup.facts.get(seed) for seed in (0, 1))
    assert len(setup.data.train) == 0


def test_a_worker_loads_what_it_works_on() -> None:
    """Settings are loaded once, the oldest makes room, and other weights than the parent's are refused."""
    raw = {
        "data": {"name": "digits", "target": 4, "tune": 0, "public": 4, "candidates": 0},
        "model": {"name": "mlp"},
        "attacks": [{"name": "idlg"}],
        "run": {"samples": 4},
        "settings": [{"name": str(seed), "run": {"seeds": [seed]}} for seed in range(work.SETUPS + 1)],
    }
    study = parse_study(raw)
    prints = [prepare(experiment, CPU).fingerprint for experiment in study.experiments]
    assert len(set(prints)) == len(prints)
    loaded = work.Loaded(study, list(prints))
    first = loaded.setup(0)
    assert loaded.setup(0) is first
    for number in range(1, len(prints)):
        assert loaded.setup(number).fingerprint == prints[number]
    assert len(loaded.known) == work.SETUPS
    again = loaded.setup(0)
    assert again is not first
    assert again.fingerprint == first.fingerprint
    loaded.fingerprints[1] = "another"
    with pytest.raises(KeyholeError, match="a worker loaded other data or weights"):
        loaded.setup(1)


def test_workers_refuse_other_weights(nets: str, tmp_path: Path) -> None:
    experiment = load_experiment("quick", [f'model={{factory="{nets}:other_each_time"}}', "attacks.0.steps=20"])
    with pytest.raises(KeyholeError, match="a worker loaded other data or weights"):
        audit(experiment, tmp_path / "out", jobs=2)


def test_want_of_memory_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyhole.experiment import run

    def full(*arguments: object) -> object:
        raise MemoryError("no room")

    monkeypatch.setattr(run, "solve", full)
    with pytest.raises(KeyholeError, match="no room; .* run again"):
        audit(load_experiment("quick"), tmp_path, jobs=1)
    stored = (tmp_path / "outcomes.jsonl").read_text() if (tmp_path / "outcomes.jsonl").exists() else ""
    assert "failed" not in stored


def test_damaged_checkpoint_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged.*anew"):
        assert load_checkpoint(path, CPU) is None
    assert not path.exists()


def test_nothing_of_an_unfinished_run_is_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "old.safetensors").write_bytes(b"iterates of a group that failed")
    (tmp_path / "report.html.partial").write_bytes(b"")
    assert audit(load_experiment("quick", ["attacks.0.steps=20"]), tmp_path, jobs=1)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not list(tmp_path.rglob("*.partial"))


def test_unknown_device() -> None:
    with pytest.raises(ConfigError, match="cpu, cuda"):
        find_device("tpu")
