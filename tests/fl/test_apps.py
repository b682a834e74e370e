"""Training with Flower between server and clients: the lifted backend's networks, its guards, and going on."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import LoopGrid
from flwr.app import Message

from keyhole.core.registry import DEFENSES
from keyhole.errors import ConfigError, ModelError
from keyhole.experiment.train import Trained, train
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.fl import apps
from keyhole.fl.apps import Server, client_app, train_in_flower

OPTIONS: dict[str, dict[str, Any]] = {  # others run with their defaults
    "clip": {"norm": 0.1},
    "concealing": {"start": "noise", "steps": 2},
    "dp_sgd": {"clip": 0.5, "noise_multiplier": 0.5},
    "gaussian_noise": {"std": 0.01},
    "laplace_noise": {"b": 0.01},
    "obscuring": {"start": "noise", "steps": 2},
    "prune": {"rate": 0.5},
    "quantize": {"levels": 4, "mode": "qsgd"},
    "random_masking": {"rate": 0.5},
    "soteria": {"rate": 0.4},
    "top_k": {"rate": 0.5},
    "user_dp": {"clip": 0.1, "noise_multiplier": 0.5},
    "withhold": {"layers": "conv1"},
}


def raw(*links: dict[str, Any], **federation: Any) -> dict[str, Any]:
    """A training of a second on few digits; each link is a defense of its own."""
    return {
        "data": {"name": "digits", "target": 4, "tune": 0, "public": 8, "candidates": 0, "test": 30, "train": 30},
        "model": {"name": "lenet_zhu"},
        "federation": {"clients": 2, "rounds": 2, "batch_size": 8, "lr": 0.3, **federation},
        "defenses": [{"chain": [link]} for link in links],
    }


class Grid(LoopGrid):
    """Clients in this process, each with a context of its own; they answer in reverse order, one at a look."""

    def __init__(self, app: Callable[[Message, Any], Message], nodes: int) -> None:
        super().__init__(app, nodes)
        self.answers: list[Message] = []
        self.asked = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the clients."""
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        self.asked += 1
        self.answers += self.send_and_receive(asked)
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The next answer."""
        return [self.answers.pop(0)]


def in_flower(plan: TrainingPlan, folder: Path, grid: type[Grid] = Grid, **more: Any) -> list[Trained]:
    server = Server(plan, folder, **more)
    server.main(grid(client_app(plan, folder), plan.federation.clients), None)  # type: ignore[arg-type]
    return server.result()


def networks(run: Trained) -> list[dict[str, torch.Tensor]]:
    return [load_file(run.checkpoint(row.round)) for row in run.rounds]


def assert_equal(one: list[Trained], two: list[Trained]) -> None:
    for a, b in zip(one, two, strict=True):
        for mine, its in zip(networks(a), networks(b), strict=True):
            assert all(torch.equal(mine[name], its[name]) for name in mine), a.folder
        # But for the clients' seconds, a measurement.
        for x, y in zip(a.rounds[1:], b.rounds[1:], strict=True):
            assert (x.accuracy, x.bytes_up, x.nonzero) == (y.accuracy, y.bytes_up, y.nonzero)
            assert x.loss == pytest.approx(y.loss, rel=1e-12) and x.client_seconds > 0
        assert a.changed == b.changed or (a.changed != a.changed and b.changed != b.changed)


@pytest.mark.parametrize("name", [card.name for card in DEFENSES])
def test_every_defense_gives_the_networks_of_the_lifted_backend(name: str, tmp_path: Path) -> None:
    plan = parse_training(raw({"name": name, **OPTIONS.get(name, {})}))
    assert_equal(train(plan, tmp_path / "lifted"), in_flower(plan, tmp_path / "flower"))


@pytest.mark.parametrize("how", [
    {"strategy": "fedprox", "mu": 0.5}, {"strategy": "fedadam"}, {"partition": "dirichlet", "alpha": 0.3, "epochs": 2},
])  # fmt: skip
def test_strategies_and_unequal_clients(how: dict[str, Any], tmp_path: Path) -> None:
    """With BatchNorm, whose statistics travel and are averaged by size too."""
    given = raw(clients=3, **how)
    given["model"] = {"name": "resnet20", "width": 4}
    plan = parse_training(given)
    assert_equal(train(plan, tmp_path / "lifted"), in_flower(plan, tmp_path / "flower"))


class Killed(Exception):
    """The server's process ends."""


class KilledWhileClientsHaveAnswered(Grid):
    """In the second defended round: the clients have kept their state, the server has nothing of it."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        # Two bare rounds, the first defended one, the same bare for comparison.
        if self.asked == 5:
            raise Killed
        return ids


@pytest.mark.parametrize("name", ["top_k", "obscuring"])
def test_a_killed_training_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    """Of defenses that keep something of their clients, in new processes of the clients, too."""
    plan = parse_training(raw({"name": name, **OPTIONS.get(name, {})}))
    whole = train(plan, tmp_path / "whole")
    with pytest.raises(Killed):
        in_flower(plan, tmp_path / "cut", KilledWhileClientsHaveAnswered)
    apps._problem.cache_clear()
    told: list[str] = []
    again = in_flower(plan, tmp_path / "cut", told=lambda what, fraction: told.append(f"{what} {fraction}"))
    assert told == [f"training 01-{name}, seed 0 1.0"]
    assert_equal(whole, again)


def test_no_more_clients_at_a_time_than_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    import flwr.simulation

    given: list[dict[str, Any]] = []
    for name in ("RAY_usage_stats_enabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(logging.getLogger("flwr"), "setLevel", lambda level: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(flwr.simulation, "run_simulation", lambda *app, backend_config: given.append(backend_config))
    for clients in (2, 8):
        with pytest.raises(ConfigError, match="ended before the training did"):
            train_in_flower(parse_training(raw(clients=clients)), tmp_path)
    assert [one["init_args"]["num_cpus"] for one in given] == [2, 3]


def test_what_a_defense_keeps_stays_with_its_client(tmp_path: Path) -> None:
    plan = parse_training(raw({"name": "top_k", "rate": 0.5}, rounds=3))
    seen: list[Message] = []

    class Listening(Grid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            found = super().pull_messages(message_ids)
            seen.extend(found)
            return found

    (_, run) = in_flower(plan, tmp_path, Listening)
    network = set(networks(run)[0])
    assert {frozenset(reply.content) for reply in seen} == {frozenset({"arrays", "metrics"})}
    assert all(set(reply.content.array_records["arrays"]) == network for reply in seen)
    assert not any(name.startswith("client:") for name in load_file(run.folder / "progress.safetensors"))
    kept = sorted(path.name for path in (run.folder / "clients").iterdir())
    # The last two rounds of each; another one's says something else.
    assert kept == [f"client-00{c}-round-00{r}.safetensors" for c in (0, 1) for r in (2, 3)]
    one, other = (load_file(run.folder / "clients" / kept[place]) for place in (1, 3))
    assert one.keys() == other.keys() and not all(torch.equal(one[n], other[n]) for n in one)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (run.folder / "clients").iterdir())


def test_a_client_that_lost_what_it_kept_ends_the_training(tmp_path: Path) -> None:
    plan = parse_training(raw({"name": "top_k", "rate": 0.5}))
    with pytest.raises(Killed):
        in_flower(plan, tmp_path, KilledWhileClientsHaveAnswered)
    (lost,) = tmp_path.glob("01-top_k/seed-0/clients/client-001-round-001.safetensors")
    lost.unlink()
    with pytest.raises(ModelError, match="client 1: what a client's defense kept cannot be read from"):
        in_flower(plan, tmp_path)


def test_one_backend_does_not_go_on_with_what_another_began(tmp_path: Path) -> None:
    """The lifted one keeps the clients' state with the server's; with flower it is the clients' own."""
    plan = parse_training(raw({"name": "top_k", "rate": 0.5}))

    def kill(what: str, fraction: float) -> None:
        if "top_k" in what:
            raise Killed

    for name, begin, go_on in (("lifted", train, in_flower), ("flower", in_flower, train)):
        with pytest.raises(Killed):
            begin(plan, tmp_path / name, told=kill)
        with pytest.raises(ConfigError, match=f"was begun with --backend {name}"):
            go_on(plan, tmp_path / name)
        # With nothing left to train there is nothing to mix.
        assert_equal(begin(plan, tmp_path / name), go_on(plan, tmp_path / name))


def test_a_client_that_returns_what_it_got_ends_the_training(dropping: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="client 0 returned exactly the weights it got in round 1 under dropping"):
        in_flower(parse_training(raw({"name": "dropping"})), tmp_path)


def test_a_client_that_fails_says_who_and_why_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse_training(raw())
    real = apps.take_part

    def fail(*arguments: Any) -> Any:
        if arguments[4] == 1:
            raise ZeroDivisionError("by nothing\nat all")
        return real(*arguments)

    monkeypatch.setattr(apps, "take_part", fail)
    with pytest.raises(ModelError) as error:
        in_flower(plan, tmp_path)
    assert str(error.value) == "a client could not train: client 1: ZeroDivisionError: by nothing."


def test_a_node_that_answers_for_another_ends_the_training(tmp_path: Path) -> None:
    class Doubled(Grid):
        def __init__(self, app: Any, nodes: int) -> None:
            super().__init__(app, nodes)
            for place in self.contexts.values():
                place.node_config["partition-id"] = 0

    with pytest.raises(ModelError, match=r"in round 1 clients \[0\] answered; 0 to 1 should have"):
        in_flower(parse_training(raw()), tmp_path, Doubled)


def test_a_server_that_is_stopped_ends_without_its_clients(tmp_path: Path) -> None:
    class Silent(Grid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            server.stop_soon()
            return []

    class Stopping(Server):
        def stop_soon(self) -> None:
            self._stop.set()

    plan = parse_training(raw())
    server = Stopping(plan, tmp_path)
    server.main(Silent(client_app(plan, tmp_path), 2), None)  # type: ignore[arg-type]
    server.stop()
    with pytest.raises(apps._Stopped):
        server.result()
    # The untrained network is there, and the training goes on from it.
    assert_equal(train(plan, tmp_path / "whole"), in_flower(plan, tmp_path))


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'keyhole\[flower\]'"):
        apps.train_in_flower(parse_training(raw()), tmp_path)


def test_an_engine_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.simulation

    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("stopped") from ValueError("no room\nat all")

    monkeypatch.setattr(flwr.simulation, "run_simulation", fail)
    with pytest.raises(ConfigError, match=r"^Flower's simulation engine stopped \(ValueError: no room\).$"):
        apps.train_in_flower(parse_training(raw()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_end_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "_END", 0.05)
    server, ended = Server(parse_training(raw()), tmp_path), threading.Event()
    monkeypatch.setattr(server, "_nodes", lambda grid: ended.wait(60))
    busy = threading.Thread(target=server.main, args=(None, None))
    busy.start()
    while not server._started:
        time.sleep(0.01)
    server.stop()
    assert busy.is_alive()
    ended.set()
    busy.join()


_INTERRUPTED = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import flwr.simulation
from keyhole.fl import apps

def wait():
    while True:
        time.sleep(60)

def engine(*arguments, **more):
    threading.Thread(target=wait, daemon=hangs != "threads").start()
    try:
        print("running", os.environ["RAY_ENABLE_AUTO_CONNECT"], flush=True)
        wait()
    finally:
        if hangs == "shutdown":
            wait()

hangs = sys.argv.pop()
flwr.simulation.run_simulation = engine
apps._LEAVE = 4
from keyhole.cli import main
main()
"""


@pytest.mark.parametrize("kind", ["threads", "shutdown"])
def test_ctrl_c_ends_the_command_whatever_the_engine_waits_for(kind: str, tmp_path: Path) -> None:
    """In place of the engine one whose threads, or whose shutdown, hang."""
    pytest.importorskip("ray")
    (tmp_path / "training.toml").write_text(tomli_w.dumps(raw()))
    given = ["train", str(tmp_path / "training.toml"), "--out", str(tmp_path / "out"), "--backend", "flower", kind]
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "running 0\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGALRM
    assert said.startswith("Interrupted: what is done is stored") is (kind == "threads")


def command(*arguments: str, without: str = "", mark: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules.update({{{without!r}: None}} if {without!r} else {{}})\n"
    code += "from keyhole.cli import main; main()"
    # Ray's workers would give way to everything else on the machine.
    env = {**os.environ, "KEYHOLE_TEST_MARK": mark, "RAY_worker_niceness": "0"}
    whole = [sys.executable, "-c", code, "train", *arguments, "--backend", "flower"]
    return subprocess.run(whole, capture_output=True, text=True, timeout=400, env=env)


def test_without_flower_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    done = command("frontier", "--out", str(tmp_path / "out"), without="flwr")
    assert done.returncode == 2
    assert done.stderr == "Error: this needs Flower: pip install 'keyhole[flower]'.\n"


def test_the_command_on_the_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, two clients, one round: the lifted backend's networks, and no process left behind."""
    pytest.importorskip("ray")
    given = raw({"name": "top_k", "rate": 0.5}, rounds=1)
    path = tmp_path / "training.toml"
    path.write_text(tomli_w.dumps(given))
    mark = uuid.uuid4().hex
    # Whatever else runs on the machine: a cluster that is said to be there, and is not.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = command(str(path), "--out", str(tmp_path / "flower"), mark=mark)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "training 00-none, seed 0\ntraining 01-top_k, seed 0\n"
    lifted = train(parse_training(given), tmp_path / "lifted")
    for run in lifted:
        for number, network in enumerate(networks(run)):
            its = load_file(tmp_path / "flower" / run.checkpoint(number).relative_to(tmp_path / "lifted"))
            assert all(float((network[name] - its[name]).abs().max()) <= 1e-5 for name in network)
            assert all(torch.equal(network[name], its[name]) for name in network)
    # Ray's own processes take a moment to notice that they are to end.
    ends = time.monotonic() + 120
    while (left := _marked(mark)) and time.monotonic() < ends:
        time.sleep(0.2)
    assert not left


def _marked(mark: str) -> list[str]:
    """Processes that have it in their environment."""
    return [place.parent.name for place in Path("/proc").glob("[0-9]*/environ") if mark in _read(place)]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
