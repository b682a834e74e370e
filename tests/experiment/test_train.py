"""Training under defenses: files, resume, guards, and what the command line says of bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import run
from keyhole.core.keys import fold_in, new_key
from keyhole.core.trial import Spec
from keyhole.defenses.dp_sgd import DPSGD
from keyhole.errors import ConfigError, ModelError, StoreError
from keyhole.experiment.spec import presets
from keyhole.experiment.train import Trained, epsilon, train
from keyhole.experiment.training_plan import TrainingPlan, load_training, parse_training
from keyhole.report.training import remarks, training_json, write_training
from keyhole.zoo.models import build_model, load_state


def raw(*links: dict[str, Any], **federation: Any) -> dict[str, Any]:
    """A training of seconds on few digits; each link is a defense of its own."""
    return {
        "data": {
            "name": "digits", "target": 4, "tune": 0, "public": 8, "candidates": 0, "test": 60, "train": 62,
        },
        "model": {"name": "lenet_zhu"},
        "federation": {"clients": 3, "rounds": 3, "batch_size": 16, "lr": 0.3, **federation},
        "defenses": [{"chain": [link]} for link in links],
    }  # fmt: skip


def plan_of(*links: dict[str, Any], **federation: Any) -> TrainingPlan:
    return parse_training(raw(*links, **federation))


def states(run: Trained) -> list[dict[str, torch.Tensor]]:
    return [load_file(run.checkpoint(row.round)) for row in run.rounds]


def equal(one: Trained, two: Trained) -> bool:
    pairs = zip(states(one), states(two), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_a_training_keeps_each_rounds_network_and_says_what_it_came_to(tmp_path: Path) -> None:
    plan = plan_of({"name": "random_masking", "rate": 0.5})
    bare, masked = train(plan, tmp_path / "new" / "out")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}
    assert [row.round for row in bare.rounds] == [0, 1, 2, 3]
    assert bare.rounds[-1].loss < bare.rounds[1].loss
    # 12 5x5 filters on 1, 12 and 12 channels with biases, and a head of 48 inputs (2x2 pixels): in float32.
    parameters = 12 * 25 + 2 * 12 * 12 * 25 + 3 * 12 + 48 * 10 + 10
    assert {row.bytes_up for row in bare.rounds[1:]} == {3 * 4 * parameters}
    # Of the last convolution's 5x5 filters only the inner 3x3 ever meet its 2x2 maps; the rest is padding.
    assert bare.rounds[1].nonzero == pytest.approx(1 - 12 * 12 * 16 / parameters)
    assert masked.rounds[1].nonzero == pytest.approx(0.5 * bare.rounds[1].nonzero, abs=0.02)
    assert math.isnan(bare.changed) and masked.changed == 1
    assert not equal(bare, masked)
    model = build_model("lenet_zhu", input_shape=(1, 8, 8), num_classes=10, options={}, seed=0)
    load_state(model, bare.checkpoint(0))
    assert all(
        torch.equal(value, build_model("lenet_zhu", input_shape=(1, 8, 8), num_classes=10, options={}, seed=0)
        .state_dict()[name]) for name, value in model.state_dict().items()
    )  # fmt: skip
    load_state(model, masked.checkpoint(3))
    assert stat.S_IMODE(masked.checkpoint(3).stat().st_mode) == 0o600
    table = write_training(plan, [bare, masked], tmp_path)
    assert [line[0] for line in table] == ["defense", "none", "random_masking(rate=0.5)"]
    report = json.loads((tmp_path / "train.json").read_text())
    assert len(report["rows"]) == 8 and report["remarks"] == []


@pytest.mark.parametrize("strategy", [{}, {"strategy": "fedadam", "server_lr": 0.03}])
def test_an_interrupted_training_ends_as_a_whole_one(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """Also of a defense that keeps something of its clients, and of a server that does."""
    plan = plan_of({"name": "top_k", "rate": 0.5, "feedback": True}, **strategy)
    whole = train(plan, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(what: str, fraction: float) -> None:
        if "top_k" in what and fraction > 0.5:
            raise Stop

    with pytest.raises(Stop):
        train(plan, tmp_path / "cut", told=stop)
    told: list[str] = []
    again = train(plan, tmp_path / "cut", told=lambda what, fraction: told.append(f"{what} {fraction:.2f}"))
    assert told == ["training 01-top_k, seed 0 1.00"]
    for one, two in zip(whole, again, strict=True):
        assert equal(one, two)
        assert [row.accuracy for row in one.rounds] == [row.accuracy for row in two.rounds]
        assert [row.loss for row in one.rounds[1:]] == [row.loss for row in two.rounds[1:]]


def test_trainings_side_by_side_are_those_one_after_another(tmp_path: Path) -> None:
    """Also where one of them was begun, by a run that was interrupted; all are told of."""
    plan = plan_of({"name": "top_k", "rate": 0.5, "feedback": True})
    whole = train(plan, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "00-none", tmp_path / "half" / "00-none")
    for number in (2, 3):
        (tmp_path / "half" / "00-none" / "seed-0" / f"round-{number:03d}.safetensors").unlink()
    shutil.copy(tmp_path / "whole" / "config.toml", tmp_path / "half")
    (tmp_path / "half" / "00-none" / "seed-0" / "progress.safetensors").unlink()
    told: set[str] = set()
    many = train(plan, tmp_path / "half", jobs=2, told=lambda what, fraction: told.add(f"{what} {fraction:.2f}"))
    assert {f"training {name}, seed 0 1.00" for name in ("00-none", "01-top_k")} <= told
    for one, two in zip(whole, many, strict=True):
        assert equal(one, two) and one.seen == two.seen
        assert [(row.accuracy, row.loss) for row in one.rounds[1:]] == [
            (row.accuracy, row.loss) for row in two.rounds[1:]
        ]
        assert one.changed == two.changed or math.isnan(one.changed)


def test_what_fails_side_by_side_says_so_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "still.toml"
    # Of steps this short nothing is left in float32.
    file.write_text(plan_of({"name": "clip", "norm": 1e-30}).to_toml())
    assert run("train", file, "--out", tmp_path / "out", "--jobs", "2") == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("Error: client 0 returned exactly the weights it got in round 1 under clip")
    assert "Traceback" not in said


def test_a_damaged_account_is_not_trusted(tmp_path: Path) -> None:
    plan = plan_of(rounds=1)
    (one,) = train(plan, tmp_path)
    before = states(one)
    path = one.folder / "progress.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"):
        (again,) = train(plan, tmp_path)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before, states(again), strict=True) for n in a)


MODEL = """
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.{}(), nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize("rounds", [2, 1])
def test_another_model_under_the_same_name_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """Whether the training was at its end or not."""
    monkeypatch.syspath_prepend(tmp_path)
    given = {**raw(rounds=2), "model": {"factory": f"own_net_{rounds}:make"}, "defenses": []}
    plan = parse_training(given)
    source = tmp_path / f"own_net_{rounds}.py"
    source.write_text(MODEL.format("ReLU"))

    class Stop(Exception):
        pass

    def stop(what: str, fraction: float) -> None:
        if fraction >= rounds / 2:
            raise Stop

    with pytest.raises(Stop):
        train(plan, tmp_path / "out", told=stop)
    source.write_text(MODEL.format("Sigmoid"))
    for name in [name for name in sys.modules if name.startswith("own_net")]:
        monkeypatch.delitem(sys.modules, name)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    with pytest.raises(StoreError, match="another model, other images or another version"):
        train(plan, tmp_path / "out")


def test_what_was_right_is_read_again_and_makes_the_accuracy(tmp_path: Path) -> None:
    plan = plan_of(rounds=1)
    (one,), (again,) = train(plan, tmp_path), train(plan, tmp_path)
    assert one.right == again.right and len(one.right) == 60
    assert sum(one.right) / 60 == one.accuracy == again.accuracy


@pytest.mark.parametrize("options", [{}, {"partition": "dirichlet", "alpha": 0.5}])
def test_images_that_cannot_be_dealt_out_leave_no_folder(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="500 clients cannot share"):
        train(plan_of(clients=500, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_training_is_left_alone(tmp_path: Path) -> None:
    train(plan_of(rounds=1), tmp_path)
    with pytest.raises(StoreError, match="another experiment"):
        train(plan_of(rounds=2), tmp_path)


def test_a_client_that_returns_what_it_got_ends_the_training(tmp_path: Path, dropping: None) -> None:
    with pytest.raises(ModelError, match="client 0 returned exactly the weights it got in round 1 under dropping"):
        train(plan_of({"name": "dropping"}, rounds=1), tmp_path)


def test_a_defense_that_changes_nothing_is_reported(tmp_path: Path) -> None:
    plan = plan_of(
        {"name": "random_masking", "rate": 0.0},
        {"name": "clip", "norm": 1e6},
        # The same gradients, summed example by example: equal but for rounding.
        {"name": "dp_sgd", "noise_multiplier": 0.0, "clip": 1e6},
        {"name": "clip", "norm": 1e-3},
        rounds=1,
    )
    done = train(plan, tmp_path)
    assert [run.changed for run in done[1:]] == [0, 0, 0, 1]
    said = remarks(done)
    assert len(said) == 3 and all("changed nothing" in sentence for sentence in said)
    assert training_json(plan, done)["remarks"] == said


def test_the_server_adds_the_noise_that_user_level_privacy_leaves_to_it(tmp_path: Path) -> None:
    link = {"name": "user_dp", "clip": 0.1}
    quiet, loud = (train(plan_of({**link, "noise_multiplier": z}, rounds=1), tmp_path / str(z))[1] for z in (0.0, 6.0))
    apart = torch.cat([(states(loud)[1][n] - w).flatten() for n, w in states(quiet)[1].items()])
    # z C / m = 6 * 0.1 / 3 on each of some 8,000 entries.
    assert float(apart.std()) == pytest.approx(0.2, rel=0.05)
    assert abs(float(apart.mean())) < 0.01
    assert equal(loud, train(plan_of({**link, "noise_multiplier": 6.0}, rounds=1), tmp_path / "6.0")[1])


def test_epsilon_counts_the_gradients_that_an_image_goes_into(tmp_path: Path) -> None:
    plan = plan_of({"name": "dp_sgd", "noise_multiplier": 2.0}, rounds=2, epochs=2)
    defended = train(plan, tmp_path)[1]
    # Three clients of 22 images: two batches of 16, the second filled up, so that some images count twice an epoch.
    assert defended.seen == 4
    assert epsilon(defended.defense, 8) == pytest.approx(DPSGD(noise_multiplier=2.0).privacy(8).epsilon)
    assert training_json(plan, [defended])["summary"][0]["epsilon"] == pytest.approx(
        DPSGD(noise_multiplier=2.0).privacy(8).epsilon, rel=1e-5
    )
    assert epsilon((Spec.of("random_masking", {"rate": 0.5}),), 8) is None
    even = train(plan_of(rounds=1, batch_size=11), tmp_path / "even")[0]
    assert even.seen == 1


def test_differential_privacy_is_refused_where_an_image_counts_several_times_in_a_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a client has 22 images"):
        train(plan_of({"name": "dp_sgd"}, batch_size=32), tmp_path)
    assert not (tmp_path / "config.toml").exists()


def test_held_out_images_are_never_trained_on(tmp_path: Path) -> None:
    from keyhole.experiment.train import Problem

    plan = plan_of()
    problem = Problem(plan, torch.device("cpu"))
    own = {row.numpy().tobytes() for row in problem.inputs}
    assert len(problem.test[1]) == 60 and len(problem.labels) == 66
    assert sum(row.numpy().tobytes() in own for row in problem.test[0]) == 0
    parts = problem.federation.deal(problem.labels, fold_in(fold_in(new_key(0), "training"), "clients"))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(66))


def test_images_that_no_client_has_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets")
    plan = plan_of(partition="shard", shard_size=16, rounds=1, batch_size=8)
    with pytest.warns(UserWarning, match='^2 of 66 training images go to no client: partition = "shard".$') as said:
        (run,) = train(plan, tmp_path)
    # Four shards for three clients; once for all of a seed.
    assert len(said) == 1 and run.seen == 1


@pytest.mark.parametrize("name", sorted(presets("training")))
def test_presets_resolve_to_themselves(name: str, tmp_path: Path) -> None:
    plan = load_training(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(plan.to_toml())
    assert load_training(str(path)) == plan


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere"], "unknown preset 'nowhere'"),
        (["train", "quick"], "a preset of keyhole audit"),
        (["audit", "frontier"], "a preset of keyhole train, frontier and invert"),
        (["train", "frontier", "--backend", "smoke"], "unknown backend 'smoke'"),
        (["train", "frontier", "--set", "federation.round=3"], "did you mean 'rounds'"),
        (["train", "frontier", "--set", "federation.mu=0.1"], 'belongs to strategy = "fedprox"'),
        (["train", "frontier", "--set", "federation.alpha=0.1"], 'belongs to partition = "dirichlet"'),
        (
            ["train", "frontier", "--set", 'federation.partition="fun"'],
            "Accepted: dirichlet, exponential, flower_dirich",
        ),
        (["train", "frontier", "--set", 'federation.partition="shard"'], "shards_per_client or federation.shard_size"),
        (["train", "frontier", "--set", "federation.min_size=5"], 'belongs to partition = "flower_dirichlet"'),
        (["train", "frontier", "--backend", "flower", "--device", "cuda"], "leave out --device, or the backend"),
        (["train", "frontier", "--set", "federation.clients=2000"], "clients cannot share"),
        (["train", "frontier", "--set", "data.test=5000"], "lower data.test"),
        (["train", "frontier", "--set", "run.seeds=[0, 0]"], "repeats a seed"),
        (["frontier", "frontier", "--set", "audit.rounds=[0, 21]"], "a rising list of rounds"),
        (["frontier", "frontier", "--set", "audit.run.seeds=[1]"], "those of the training"),
        (["frontier", "frontier", "--set", "audit.attacks=[]"], "[audit]: the audit file names no attack"),
        (["train", "frontier", "--set", "audit.sees=1"], "unknown key 'sees' in [audit]"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(*arguments, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("Error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_frontier_needs_attacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    path = tmp_path / "bare.toml"
    path.write_text(tomli_w.dumps(raw()))
    assert run("frontier", str(path), "--out", str(tmp_path / "out")) == 2
    assert "needs an [audit] section" in capsys.readouterr().err


@pytest.mark.slow
def test_the_presets_settings_teach_ten_clients_digits(tmp_path: Path) -> None:
    """A small `train_digits`: one seed."""
    (bare,) = train(load_training("frontier", ["defenses=[]"]), tmp_path)
    assert len(bare.rounds) == 21
    assert bare.accuracy >= 0.95
    assert bare.rounds[0].accuracy < 0.3


HELD = """
import os, time
from pathlib import Path
from torch import nn

class Held(nn.Sequential):
    def forward(self, x):
        while "HOLD" in os.environ and len(list(Path(os.environ["HOLD"]).glob("*/*/round-002.safetensors"))) == 2:
            time.sleep(0.01)
        return super().forward(x)

def make(num_classes):
    return Held(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, num_classes))
"""


def test_killed_in_the_middle_of_two_trainings_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once both have done their second round, they wait for it."""
    (tmp_path / "held_net.py").write_text(HELD)
    monkeypatch.syspath_prepend(tmp_path)
    given = raw({"name": "top_k", "rate": 0.5, "feedback": True}, rounds=20)
    plan, folder = parse_training({**given, "model": {"factory": "held_net:make"}}), tmp_path / "cut"
    (tmp_path / "plan.toml").write_text(plan.to_toml())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from keyhole.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "plan.toml")]
    process = subprocess.Popen(
        [*command, "--out", str(folder), "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOLD": str(folder)},
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len({path.parent for path in folder.glob("*/*/round-002.safetensors")}) == 2:
            process.kill()
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=60)  # until the workers have left too, by themselves
    assert process.returncode == -signal.SIGKILL, said
    files = "*/*/round-*.safetensors"
    before = {path: path.stat().st_mtime_ns for path in folder.glob(files)}
    assert len(before) < 2 * 21
    train(plan, folder)
    # The newest file of each may be ahead of the account, and then its round is done again.
    kept = [path for path in before if any(other.parent == path.parent and other > path for other in before)]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept), "a round was trained again"
    train(plan, tmp_path / "whole")
    whole = sorted((tmp_path / "whole").glob(files))
    assert len(whole) == 2 * 21
    assert all(path.read_bytes() == (folder / path.relative_to(tmp_path / "whole")).read_bytes() for path in whole)
