from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from quickstart_case import EXAMPLE, quickstart, run
from safetensors.torch import load_file, save

from command_line import run as keyhole
from keyhole.core import defense as core
from keyhole.core.registry import DEFENSES
from keyhole.core.types import Weights
from keyhole.errors import KeyholeError
from keyhole.experiment.transcript import read_secret, read_transcript
from keyhole.fl import DefenseMod
from keyhole.fl.mods import round_key
from keyhole.metrics.image import structural_similarity

ONE = {"images": 1, "batch_size": 1, "local_epochs": 1, "rounds": 1}


def test_ten_clients_learn_digits(tmp_path: Path) -> None:
    with quickstart(tmp_path):
        server = run(tmp_path, 10, rounds=0)
        arrays: list[Any] = []
        tested = server.evaluate
        server.evaluate = lambda turn, weights: (
            arrays.append(tested(turn, weights)["accuracy"]) or tested(turn, weights)
        )
        run(tmp_path, 10)
    assert len(arrays) == 21
    assert arrays[0] < 0.2 < 0.95 <= arrays[-1]


@pytest.mark.parametrize("place", [EXAMPLE / "pyproject.toml", EXAMPLE.parents[1] / "docs" / "flower.md"])
def test_the_command_that_is_told_runs_ten_clients(place: Path) -> None:
    """As Flower reads it; of its own accord it simulates two."""
    from flwr.common.config import parse_config_args
    from flwr.supercore.constant import DEFAULT_SIMULATION_CONFIG
    from flwr.supercore.utils import simulation_config_from_json

    (told,) = re.findall(r'flwr run \. --federation-config "([^"]*)"', place.read_text())
    assert place.read_text().count("flwr run . ") == 1
    read = {name.replace("-", "_"): value for name, value in parse_config_args([told]).items()}
    assert simulation_config_from_json(read).num_supernodes == 10
    assert DEFAULT_SIMULATION_CONFIG.num_supernodes == 2


def test_one_step_on_one_image_gives_it_away_to_whoever_has_transcript_and_model(tmp_path: Path) -> None:
    """The plain app, with its two lines of recording: its ReLU and max pooling do not save it."""
    with quickstart(tmp_path, "record", "secrets") as folder:
        run(folder, 2, **ONE)
        attack = 'attacks=[{name="inverting_gradients",steps=800,restarts=2,tv=0.0}]'
        rest = ("--model", "quickstart.model:Net", "--out", folder / "out", "--set", attack, "--set", "most=1")
        assert keyhole("audit", "--transcript", folder / "transcript", *rest) == 0
        (found,) = load_file(folder / "out" / "reconstructions.safetensors").values()
        (update,) = json.loads((folder / "out" / "report.json").read_text())["updates"]
        secret = read_secret(folder / "secrets", 1, update["client"])
    assert secret is not None
    assert float(structural_similarity(found, secret.inputs)) >= 0.9
    assert update["attacks"][0]["labels"] == secret.labels.tolist()
    assert update["attacks"][0]["metrics"] == {}, "no secrets were given"


def test_the_defended_app_sends_what_the_defense_makes_of_a_step_done_by_hand(tmp_path: Path) -> None:
    """One step of SGD written out, the defense called with the mod's key, and the rounding of weights in between."""
    with quickstart(tmp_path, "record", "secrets") as folder:
        client = importlib.import_module("quickstart.client_app")
        net = importlib.import_module("quickstart.model").Net()
        defense = DEFENSES.build("random_masking", rate=0.5)
        mod = DefenseMod(defense, net, seed=5)
        plain = client.app
        from flwr.clientapp import ClientApp

        client.app = ClientApp(mods=[mod])
        client.app.train()(plain._registered_funcs["train.default"])
        run(folder, 2, **ONE)
        found = read_transcript(folder / "transcript", net)
        secrets = [read_secret(folder / "secrets", 1, one.client) for one in found.updates]
    for client_number, (one, secret) in enumerate(zip(found.updates, secrets, strict=True)):
        assert secret is not None
        sent = one.weights.params
        net.load_state_dict(sent)
        net.zero_grad()
        functional.cross_entropy(net(secret.inputs), secret.labels).backward()
        trained = {name: torch.add(sent[name], p.grad, alpha=-one.config["lr"]) for name, p in net.named_parameters()}
        ctx = core.Context(mod.task, Weights(sent, {}), round_key(5, client_number, 1), round=1, client=client_number)
        defended = defense.on_update({name: sent[name] - trained[name] for name in sent}, ctx)
        for name, value in one.update.items():
            # To the last bit, so that whatever attacks it in process or from the transcript finds the same.
            assert torch.equal(value, sent[name] - (sent[name] - defended[name])), name


def test_the_commented_lines_work_as_they_stand(tmp_path: Path) -> None:
    with quickstart(tmp_path, "record", "defend") as folder:
        run(folder, 2, **{**ONE, "batch_size": 32, "images": 32})
        model = importlib.import_module("quickstart.model").Net()
        found = read_transcript(folder / "transcript", model)
    assert len(found.updates) == 2 and found.updates[0].examples == 32
    assert found.updates[0].update["conv1.weight"].std() > 0.002
    kinds = {"client_app.py": ("defend", 2), "server_app.py": ("record", 2)}
    for name, (kind, count) in kinds.items():
        assert (EXAMPLE / "quickstart" / name).read_text().count(f"# {kind}: ") == count


def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quickstart(tmp_path, "record") as folder:
        run(folder, 2, **ONE)
        known = ("audit", "--transcript", folder / "transcript", "--model")
        net = "quickstart.model:Net"
        weights = folder / "transcript" / "round-0001" / "weights.safetensors"
        cases: list[tuple[tuple[Any, ...], str]] = [
            ((*known, net, "--set", "lrr=1"), "unknown key 'lrr'"),
            ((*known, "quickstart.model:Absent"), "has no 'Absent'"),
            ((*known, "torch.nn:Identity"), "another model"),
            ((*known, net, "--secrets", folder / "absent"), "no folder of secrets"),
            (known[:3], "--transcript goes with --model"),
            ((*known, net, "--dry-run"), "--transcript goes with --model"),
            (("audit", "faces", "--model", net), "name a preset"),
            (("audit",), "name a preset"),
            (("audit", "--transcript", folder, "--model", net), "is no transcript"),
        ]
        for arguments, said in cases:
            assert keyhole(*arguments) == 2
            error = " ".join(capsys.readouterr().err.split())
            assert said in error and error.startswith("Error: ")
        weights.write_bytes(weights.read_bytes()[:-10])
        assert keyhole(*known, net) == 2
        assert "cut short" in capsys.readouterr().err
    assert not (tmp_path / "audits").exists()


def test_a_bad_transcript_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with quickstart(tmp_path, "record") as folder:
        run(folder, 2, **ONE)
        whole, place = folder / "transcript", Path("round-0001")
        update = place / "client-1000.safetensors"
        tensors = load_file(whole / update)
        holed = save({**tensors, "fc2.bias": tensors["fc2.bias"] * float("nan")})
        torch.save(tensors, folder / "weights.pt")
        other = save({name: value for name, value in tensors.items() if name != "fc2.bias"})
        newer = (whole / "transcript.json").read_bytes().replace(b'"version": 1', b'"version": 2')
        for number, (name, content, said) in enumerate(
            (
                (update, holed, "'fc2.bias' holds NaN or infinity"),
                (update, pickle.dumps(Bomb()), "is a pickle, which could run code and is never loaded"),
                (update, (folder / "weights.pt").read_bytes(), "is a pickle, which could run code and is never loaded"),
                (update, other, "returned only some of the arrays that it was sent ('fc2.bias' is missing)"),
                (update, save(tensors)[:-4], "cut short"),
                (place / "round.json", (whole / place / "round.json").read_bytes()[:-40], "cut short"),
                (Path("transcript.json"), newer, "version 2, of a newer Keyhole"),
            )
        ):
            bad = folder / f"bad{number}"
            shutil.copytree(whole, bad)
            (bad / name).write_bytes(content)
            if name == update:  # as whoever meant to deceive would
                told = json.loads((bad / place / "round.json").read_text())
                told["files"][update.name] = len(content)
                (bad / place / "round.json").write_text(json.dumps(told))
            known = ("--model", "quickstart.model:Net", "--set", 'clients=["1000"]')
            assert keyhole("audit", "--transcript", bad, *known) == 2
            printed = capsys.readouterr()
            error = " ".join(printed.err.split())
            assert error.startswith("Error: ") and error.endswith(".") and said in error
            assert "Traceback" not in error and not printed.out
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "audits").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_a_mod_on_replies_without_arrays_leaves_a_transcript_that_says_why_there_is_nothing_to_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quickstart(tmp_path, "record", "defend") as folder:
        path = folder / "quickstart" / "client_app.py"
        path.write_text(path.read_text().replace('"arrays": ArrayRecord(model.state_dict()), ', ""))
        run(folder, 2, **ONE)
        command = ("audit", "--transcript", folder / "transcript", "--model", "quickstart.model:Net")
        assert keyhole(*command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("Error: ") and error.endswith(".")
    assert "holds no update of a complete round: round 1, client 1000: the reply is an error: Keyhole withheld" in error
    assert "the reply has no arrays named as the model's parameters" in error


def test_what_is_no_strategy_ends_the_app_with_one_sentence(tmp_path: Path) -> None:
    with quickstart(tmp_path, "record") as folder:
        path = folder / "quickstart" / "server_app.py"
        path.write_text(path.read_text().replace("Recorder(strategy,", "Recorder(FedAvg,"))
        with pytest.raises(KeyholeError, match=r"^FedAvg is not a strategy; it must be [^\n]*\.$"):
            run(folder, 2, **ONE)
    assert not (tmp_path / "transcript").exists()


def test_only_one_folder_imports_flower() -> None:
    source = EXAMPLE.parents[1] / "src" / "keyhole"
    # Flower itself, not the partitioners of flwr_datasets.
    imports = re.compile(r"^\s*(import|from) flwr\b", re.MULTILINE)
    using = {p.relative_to(source).parts[0] for p in source.rglob("*.py") if imports.search(p.read_text())}
    assert using == {"fl"}
