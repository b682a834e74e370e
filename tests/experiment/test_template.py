"""The template of an audit file: ready after two edits, every line of it true, never written over anything."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import run
from keyhole.errors import ConfigError
from keyhole.experiment.setup import prepare
from keyhole.experiment.spec import load_study, parse_study
from keyhole.experiment.template import TEMPLATE, write_template

NET = """
from torch import nn
def make(input_shape, num_classes):
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * ((height + 1) // 2) * ((width + 1) // 2), num_classes),
    )
def make_alone():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sigmoid(), nn.Linear(8, 2))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has one: 60 small colour pictures of two classes, and a module with a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    (tmp_path / "own_nets.py").write_text(NET)
    draws = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(30):
            pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{number}.png")
    return tmp_path


def edited(text: str, data: str, factory: str) -> str:
    """The two edits, and no other."""
    lines = text.split("\n")
    marked = [i for i, line in enumerate(lines) if "# EDIT" in line]
    assert len(marked) == 2
    for i, value in zip(marked, (data, factory), strict=True):
        lines[i] = re.sub(r'"[^"]*"', f'"{value}"', lines[i], count=1)
    return "\n".join(lines)


def test_ready_after_two_edits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", "pets.toml") == 0
    assert "pets.toml --dry-run" in capsys.readouterr().out
    path = place / "pets.toml"
    path.write_text(edited(path.read_text(), "pets", "own_nets:make"))
    assert run("audit", "pets.toml", "--dry-run", "--json") == 0
    (setting,) = json.loads(capsys.readouterr().out)["settings"]
    assert {defense.partition("(")[0] for defense, _, _ in setting["cells"]} == {"none", "gaussian_noise", "prune"}
    assert not setting["problems"]
    assert not (place / "audits").exists()
    small = ["run.samples=2", "attacks.0.steps=10", "attacks.0.tune.tv=[1e-2]", "attacks.1.steps=10", "defenses=[]"]
    assert run("audit", "pets.toml", "--jobs", "1", *(f"--set={one}" for one in small)) == 0
    assert (place / "audits" / "pets" / "report.html").exists()
    assert not list((place / "audits" / "pets" / "reconstructions").iterdir()), "private pictures were stored"


def test_a_factory_without_arguments_will_do(place: Path) -> None:
    path = place / "pets.toml"
    write_template(path)
    path.write_text(edited(path.read_text(), "pets", "own_nets:make_alone"))
    (experiment,) = load_study(str(path)).experiments
    assert prepare(experiment, torch.device("cpu")).task.num_classes == 2


def test_unedited_it_says_what_to_edit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init") == 0
    assert run("audit", "audit.toml", "--dry-run") == 2
    assert "path/to/pictures" in capsys.readouterr().err


def test_every_option_that_is_off_can_be_used(tmp_path: Path) -> None:
    """All "# key = value" lines at once, with what they ask for: nothing in the template is an unknown key."""
    path = tmp_path / "all.toml"
    write_template(path)
    text = re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.MULTILINE)
    assert text != path.read_text()
    raw = tomllib.loads(text)
    raw["client"] |= {"rule": "sgd"}
    (experiment,) = parse_study(raw).experiments
    assert (experiment.title, experiment.data.size, experiment.client.size) == ("my audit", 32, 4)
    assert experiment.client.spec.asdict() == {"epochs": 1, "lr": 0.01, "order": "shuffled", "batch_size": 1}
    assert experiment.model.options == {"width": 32}


@pytest.mark.parametrize(
    "change",
    [
        "state.train=early",
        "state.train=late",
        "model.batchnorm=train_hidden",
        "model.dropout=active",
        'attacker={sees=["weights", "update", "targets"], labels="given"}',
        "run.images=reconstructions",
        "run.images=all",
    ],
)
def test_every_other_value_that_a_comment_names_is_accepted(change: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.toml"
    write_template(path)
    named = re.findall(r'"([^"]+)"', change) or [change.partition("=")[2]]
    assert all(f'"{value}"' in TEMPLATE for value in named)
    assert load_study(str(path), [change]).experiments


def test_images_are_private_by_default(tmp_path: Path) -> None:
    path = tmp_path / "audit.toml"
    write_template(path)
    (experiment,) = load_study(str(path)).experiments
    assert experiment.run.images == "none"
    assert experiment.sees == ("update", "weights")
    assert [entry.spec.asdict()["labels"] for entry in experiment.attacks] == ["auto", "auto"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "audit.toml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_template(path)
    assert path.read_text() == "mine"


def test_other_places_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_template(tmp_path / "absent" / "audit.toml")
    with pytest.raises(ConfigError, match=r"must end in \.toml"):
        write_template(tmp_path / "audit")
