"""Bad input on the command line: one clear sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import tomllib
import warnings
from pathlib import Path

import pytest
from typer.models import CommandInfo

from command_line import run
from keyhole.cli import _print_table, app, main
from keyhole.experiment.spec import presets

MODEL = """
from torch import nn
def normed(input_shape, num_classes):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, num_classes))
def dropped(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))
def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
class Own(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(64, 10), act
    def forward(self, images):
        return self.linear(self.act(images).flatten(1))
def in_place():
    return Own(lambda images: images.mul_(2))
def branching():
    return Own(lambda images: 2 * images if images.sum() > 0 else images)
def frozen(num_classes):
    model = plain(num_classes)
    model[1].weight.requires_grad_(False)
    return model
def undefined():
    return Own(lambda images: images / 0)
"""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["audit", "fases"], "did you mean 'faces'"),
        (["audit", "absent.toml"], "no file"),
        (["audit", "quick", "--set", "attacks.0.name=idgl"], "did you mean 'idlg'"),
        (["audit", "quick", "--set", "attacks.0.stepz=1"], "did you mean 'steps'"),
        (["audit", "quick", "--set", "run.sampels=1"], "did you mean 'samples'"),
        (["audit", "quick", "--set", "run.samples=many"], "valid integer"),
        (["audit", "quick", "--set", "run.budget=-1"], "greater than or equal to 0"),
        (["audit", "quick", "--set", "client.batch_size=100"], "larger than the target pool"),
        (["audit", "quick", "--set", "data.target=100000"], "1797"),
        (["audit", "quick", "--set", "data.name=digitz"], "did you mean 'digits'"),
        (["audit", "quick", "--set", "data.name=./empty"], "empty"),
        (["audit", "quick", "--set", "data.name=./corrupt.parquet"], "corrupt.parquet"),
        (["audit", "quick", "--set", "state.train=./weights.safetensors"], "weights.safetensors"),
        (["audit", "quick", "--device", "cuda"], "not available"),
        (["audit", "quick", "--device", "tpu"], "cpu, cuda"),
        (["audit", "normed.toml"], 'batchnorm = "eval"'),
        (["audit", "dropped.toml"], 'dropout = "off"'),
        (["audit", "absent_factory.toml"], "no_such_function"),
        (["audit", "lazy.toml"], "'1.weight' of the model has no shape yet"),
        (["audit", "in_place.toml"], "nothing in place"),
        (["audit", "branching.toml"], "no branch on values"),
        (["audit", "frozen.toml"], "'1.weight' is frozen (requires_grad=False)"),
        (["audit", "undefined.toml"], "NaN or infinity for random images"),
        (["audit", "undefined.toml", "--dry-run"], "NaN or infinity for random images"),
        (["audit", "absent_module.toml"], "run the command in the folder of your code"),
        (["audit", "quick", "--set", "data.size=1000000"], "more than this machine has"),
        (["audit", "quick", "--set", "state.train=erly"], "did you mean 'early'"),
        (["check-mod", "a:b", "--model", "lenet_zhu", "--clip", "-1"], "--clip is -1.0; it must be above 0"),
        (["check-mod", "a:b", "--model", "lenet_zhu", "--noise-std", "nan"], "--noise-std is nan"),
        (["audit", "fases", "--dry-run"], "did you mean 'faces'"),
        (["audit", "normed.toml", "--dry-run"], 'batchnorm = "eval"'),
        (["audit", "quick", "--json"], "--dry-run"),
        (
            ["audit", "--transcript", ".", "--model", "nets_under_test:plain", "--device", "cuda"],
            "works on a CPU",
        ),
        (["audit", "--transcript", ".", "--model", "nets_under_test:plain", "--seconds", "1"], "never pauses"),
        (["init", "normed.toml"], "exists already"),
        (["init", "absent/audit.toml"], "cannot be written"),
        (["report", "."], "no audit"),
        (["report", "trained"], "holds trainings"),
        (["list", "atacks"], "did you mean 'attacks'"),
        (["show", "clipp"], "did you mean 'clip'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_sentence_and_code_2(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "train.json").write_text("{}")
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "weights.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps")
    (tmp_path / "nets_under_test.py").write_text(MODEL)
    functions = ("normed", "dropped", "lazy", "in_place", "branching", "undefined", "frozen")
    factories = {name: f"nets_under_test:{name}" for name in functions}
    factories |= {"absent_factory": "nets_under_test:no_such_function", "absent_module": "elsewhere.nets:make"}
    for name, factory in factories.items():
        (tmp_path / f"{name}.toml").write_text(
            f'[data]\nname = "digits"\n[model]\nfactory = "{factory}"\n[[attacks]]\nname = "idlg"\n'
        )
    before = {path.name for path in tmp_path.iterdir()}
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("Error: ")
    assert said.count("\n") == 1, f"more than one line: {said}"
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} <= before, "something was written"


def test_own_factory_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_that_work.py").write_text(MODEL)
    (tmp_path / "mine.toml").write_text(
        '[data]\nname = "digits"\n[model]\nfactory = "nets_that_work:plain"\n[[attacks]]\nname = "idlg"\nsteps = 30\n'
        "[run]\nsamples = 2\n"
    )
    assert run("audit", "mine.toml", "--jobs", "1") == 0
    assert "recovered 2 of 2 images" in capsys.readouterr().out
    assert (tmp_path / "audits" / "mine" / "report.html").exists()


def test_show_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "random_masking") == 0
    shown = capsys.readouterr().out
    assert "granularity" in shown
    assert "2408.08430" in shown
    assert run("list", "defenses") == 0
    assert "gaussian_noise" in capsys.readouterr().out


def test_show_of_a_name_that_a_method_and_a_preset_have(capsys: pytest.CaptureFixture[str]) -> None:
    """Both are shown, and what is printed is an audit file nevertheless."""
    assert run("show", "dp_sgd") == 0
    shown = capsys.readouterr().out
    assert "noise_multiplier" in shown.partition("The preset of this name")[0]
    assert tomllib.loads(shown) == tomllib.loads(presets()["dp_sgd"])
    assert run("show", "prun") == 2
    accepted = capsys.readouterr().err.partition("Accepted: ")[2].rstrip(".\n").split(", ")
    assert len(accepted) == len(set(accepted)), "a name is listed twice"


@pytest.mark.parametrize("kind", ["", "training"])
def test_show_prints_presets_as_they_are(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken lines would be no TOML."""
    for name, text in presets(kind).items():
        assert run("show", name) == 0
        assert capsys.readouterr().out.endswith(text)


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """However long the names are."""
    names = ("setting " + 30 * "a", "defense " + 40 * "b", "attack " + 30 * "c", "solved, most " + 30 * "d")
    _print_table([names, names])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == 2 * [" ".join(names).split()]


def test_init_and_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init") == 0
    assert "keyhole audit audit.toml --dry-run" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["audit.toml"]
    before = (tmp_path / "audit.toml").read_bytes()
    assert run("init") == 2
    assert (tmp_path / "audit.toml").read_bytes() == before
    arguments = ["audit", "quick", "--dry-run", "--set", "defenses=[]", "--set", "attacks.0.steps=20"]
    assert run(*arguments, "--jobs", "1") == 0
    said = capsys.readouterr().out
    assert "nothing has been run or written" in said
    assert "Prediction without a defense: likely recoverable." in said
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"][0]["feasibility"]["verdict"] == "likely recoverable"
    assert told["cost"]["core_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["audit.toml"]


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from keyhole import __version__

    assert run("--version") == 0
    assert capsys.readouterr().out == f"keyhole {__version__}\n"


@pytest.mark.parametrize("name", ["[/y].toml", "[bold]y.toml"])
def test_brackets_in_a_path_are_printed_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    assert run("init", name) == 0
    assert f"Wrote {name}." in capsys.readouterr().out


def test_brackets_in_a_warning_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # put back afterwards, as it is replaced
    monkeypatch.setattr("keyhole.cli.app", lambda: warnings.warn("'dam/[/y]' is damaged", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "Warning: 'dam/[/y]' is damaged\n"


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.name)
def test_help_shows_all_that_a_command_says_of_itself(command: CommandInfo, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.callback is not None and command.callback.__doc__ is not None
    assert run(command.name, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(command.callback.__doc__.split()) in shown


def test_help_explains_the_arguments_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Which it does not with every pair of typer and click."""
    assert run("train", "--help") == 0
    assert "A training preset's name or file." in " ".join(capsys.readouterr().out.split())
