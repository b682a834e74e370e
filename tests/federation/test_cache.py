"""Trained states on disk: found again, never trusted blindly, resumed, and trained by one process only."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keyhole.core.keys import new_key, normal
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Weights
from keyhole.errors import ModelError, StoreError
from keyhole.federation import cache
from keyhole.federation.cache import Facts, trained_state
from keyhole.federation.states import Federation, Progress, accuracy, rounds
from keyhole.solve.files import cache_folder

SHAPE, CLASSES = (1, 4, 4), 3
SETTINGS = Federation(rounds=4, clients=2, batch_size=4)


def task_of(activation: nn.Module | None = None, batchnorm: str = "train_shared") -> tuple[Task, Weights]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), activation or nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
        )
    return Task.of(model, SHAPE, CLASSES, Bounds.of((0.5,), (0.5,)), batchnorm=batchnorm), weights_of(model)


TASK, WEIGHTS = task_of()
INPUTS, LABELS = normal(new_key(0), (12, *SHAPE)), torch.arange(12) % CLASSES


class Rounds:
    """A progress callback that knows how many rounds were trained, and may interrupt."""

    def __init__(self, stop: int | None = None) -> None:
        self.done: list[int] = []
        self.stop = stop

    def __call__(self, number: int, count: int, loss: float) -> None:
        self.done.append(number)
        if number == self.stop:
            raise KeyboardInterrupt


def ask(folder: Path, progress: Progress | None = None, **changed: Any) -> tuple[Weights, Facts]:
    given: dict[str, Any] = {
        "task": TASK, "weights": WEIGHTS, "inputs": INPUTS, "labels": LABELS, "federation": SETTINGS, "key": new_key(0),
    }  # fmt: skip
    return trained_state(**{**given, **changed}, progress=progress, folder=folder)


def same(a: Weights, b: Weights) -> bool:
    names = zip((*a.params.values(), *a.buffers.values()), (*b.params.values(), *b.buffers.values()), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in names)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_a_state_is_trained_once_and_is_what_its_rounds_give(tmp_path: Path) -> None:
    *_, (_, wanted, *_) = rounds(TASK, WEIGHTS, INPUTS, LABELS, SETTINGS, new_key(0))
    first, again = Rounds(), Rounds()
    trained, facts = ask(tmp_path, first)
    found, known = ask(tmp_path, again)
    assert (first.done, again.done) == ([1, 2, 3, 4], [])
    assert same(trained, wanted)
    assert same(found, wanted)
    assert facts == known
    assert facts.rounds == len(facts.losses) == 4
    assert facts.accuracy == accuracy(TASK, wanted, INPUTS, LABELS)


CHANGES: dict[str, Any] = {
    "weights": Weights({**WEIGHTS.params, "4.bias": WEIGHTS.params["4.bias"] + 1e-6}, WEIGHTS.buffers),
    "buffers": Weights(WEIGHTS.params, {**WEIGHTS.buffers, "1.running_mean": torch.full((3,), 1e-6)}),
    "inputs": INPUTS * (1 + 1e-6),
    "labels": LABELS.roll(1),
    "key": new_key(1),
    "forward pass": task_of(nn.Tanh())[0],
    "modes": task_of(batchnorm="eval")[0],
    "loss": replace(TASK, loss=lambda logits, targets: ((logits - targets) ** 2).sum(-1)),
    "rounds": replace(SETTINGS, rounds=5),
    "clients": replace(SETTINGS, clients=3),
    "epochs": replace(SETTINGS, epochs=2),
    "lr": replace(SETTINGS, lr=0.051),
    "batch_size": replace(SETTINGS, batch_size=5),
    "momentum": replace(SETTINGS, momentum=0.8),
    "weight_decay": replace(SETTINGS, weight_decay=0.1),
    "clip": replace(SETTINGS, clip=0.5),
    "alpha": replace(SETTINGS, alpha=1.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_training_is_part_of_the_name(what: str) -> None:
    given: dict[str, Any] = {
        "task": TASK, "weights": WEIGHTS, "inputs": INPUTS, "labels": LABELS, "federation": SETTINGS, "key": new_key(0),
    }  # fmt: skip
    value = CHANGES[what]
    kinds = {Task: "task", Weights: "weights", Federation: "federation"}
    place = kinds.get(type(value), what)
    assert cache._name(**given) == cache._name(**given)
    assert cache._name(**given) != cache._name(**{**given, place: value})


def test_the_version_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache._name(TASK, WEIGHTS, INPUTS, LABELS, SETTINGS, new_key(0))
    monkeypatch.setattr(cache, "TRAINING_VERSION", cache.TRAINING_VERSION + 1)
    assert before != cache._name(TASK, WEIGHTS, INPUTS, LABELS, SETTINGS, new_key(0))


def test_an_interrupted_training_goes_on_after_its_last_round(tmp_path: Path) -> None:
    wanted, facts = ask(tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        ask(broken, Rounds(stop=2))
    rest = Rounds()
    trained, known = ask(broken, rest)
    assert rest.done == [3, 4]
    assert same(trained, wanted)
    assert known == facts


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ask(tmp_path / "cache")
    finally:
        os.umask(old)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    names = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert names == [".lock", ".safetensors"]  # nothing half-written is left
    for path in (tmp_path / "cache").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_kill_while_writing_leaves_the_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, Rounds(stop=2))

    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path)
    rest = Rounds()
    ask(tmp_path, rest)
    assert rest.done == [3, 4]


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    # Copies, as the file behind them is about to be overwritten.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(str(path), framework="pt") as file:
        account = file.metadata()
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    elif how == "no account":
        save_file(tensors, path)
    elif how == "account is no JSON":
        save_file(tensors, path, {"account": "{"})
    elif how == "account is a list":
        save_file(tensors, path, {"account": "[]"})
    elif how == "losses are missing":
        save_file(tensors, path, {"account": account["account"].replace("losses", "lost")})
    elif how == "too many rounds":
        save_file(tensors, path, {"account": account["account"].replace("[", "[1.0, ")})
    elif how == "a tensor is missing":
        del tensors["params/4.bias"]
        save_file(tensors, path, account)
    elif how == "a tensor too many":
        save_file({**tensors, "params/5.bias": torch.zeros(3)}, path, account)
    elif how == "a wrong shape":
        save_file({**tensors, "params/4.bias": torch.zeros(4)}, path, account)
    elif how == "a wrong type":
        save_file({**tensors, "params/4.bias": torch.zeros(3).double()}, path, account)
    elif how == "NaN":
        save_file({**tensors, "params/4.bias": torch.full((3,), torch.nan)}, path, account)
    elif how == "a pickle":
        torch.save(tensors, path)


@pytest.mark.parametrize(
    "how",
    [
        "cut off", "empty", "one bit", "no account", "account is no JSON", "account is a list", "losses are missing",
        "too many rounds", "a tensor is missing", "a tensor too many", "a wrong shape", "a wrong type", "NaN",
        "a pickle",
    ],
)  # fmt: skip
def test_a_damaged_file_is_trained_anew_with_a_warning(tmp_path: Path, how: str) -> None:
    wanted, facts = ask(tmp_path)
    damaged(the_file(tmp_path), how)
    trained = Rounds()
    with pytest.warns(UserWarning, match="is damaged .*; the state is trained anew"):
        again, known = ask(tmp_path, trained)
    assert trained.done == [1, 2, 3, 4]
    assert same(again, wanted)
    assert known == facts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(ask(tmp_path)[0], wanted)


def test_of_two_that_ask_at_once_one_trains(tmp_path: Path) -> None:
    # Threads stand for processes: each opens the lock file on its own, and such a lock knows open files only. Each has
    # a model of its own too, as two calls of one module at once would swap each other's weights.
    trained, found = Rounds(), []
    begun = threading.Event()

    def first(number: int, count: int, loss: float) -> None:
        trained(number, count, loss)
        begun.set()

    def worker(progress: Progress) -> None:
        found.append(ask(tmp_path, progress, task=TASK.to("cpu")))

    one = threading.Thread(target=worker, args=(first,))
    one.start()
    assert begun.wait(60)
    late = Rounds()
    others = [threading.Thread(target=worker, args=(late,)) for _ in range(2)]
    for thread in (*others,):
        thread.start()
    for thread in (one, *others):
        thread.join(60)
    assert len(found) == 3
    assert (trained.done, late.done) == ([1, 2, 3, 4], [])
    assert all(same(weights, found[0][0]) and facts == found[0][1] for weights, facts in found)


def test_a_training_that_diverges_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="diverged"):
            ask(tmp_path, federation=replace(SETTINGS, lr=1e38, clip=None))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep trained states in .*; set KEYHOLE_CACHE"):
        ask(tmp_path / "file")


def test_where_states_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KEYHOLE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "keyhole"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "keyhole"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "keyhole"
    monkeypatch.setenv("KEYHOLE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    trained_state(TASK, WEIGHTS, INPUTS, LABELS, replace(SETTINGS, rounds=1), new_key(0))
    assert the_file(tmp_path / "own").stat().st_size > 0


def test_weights_in_other_types_come_back_in_them(tmp_path: Path) -> None:
    def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}

    own = Weights(wide(WEIGHTS.params), wide(WEIGHTS.buffers))
    for _ in range(2):
        got, _ = ask(tmp_path, weights=own, inputs=INPUTS.double())
        assert {t.dtype for t in got.params.values()} == {torch.float64}
        assert got.buffers["1.num_batches_tracked"].dtype == torch.int64
