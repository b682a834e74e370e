"""What trials share: refused where it would mislead, and named so that another problem has another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keyhole.errors import ConfigError, DataError, KeyholeError
from keyhole.experiment import audit, load_experiment
from keyhole.experiment.setup import find_device, prepare
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
