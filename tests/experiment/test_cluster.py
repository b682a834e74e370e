"""Audits and trainings over a Ray cluster: equal to local ones, also when workers and nodes are killed."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_audit import keyhole, lines, timeless

from keyhole.errors import ConfigError, KeyholeError
from keyhole.experiment import cluster as module
from keyhole.experiment.audit import Silent, audit
from keyhole.experiment.cluster import cluster
from keyhole.experiment.plan import Group, choose, plan
from keyhole.experiment.run import GroupResult, run_group
from keyhole.experiment.setup import prepare
from keyhole.experiment.spec import Study, load_experiment
from keyhole.experiment.train import Trained, train
from keyhole.experiment.training_plan import parse_training
from keyhole.experiment.work import Loaded, Workers
from keyhole.federation.local import LocalTraining
from keyhole.report.write import write_report

# Ray leaves files and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SOURCE = str(Path(module.__file__).parents[2])
SMALL = 80 * 2**20
"""Bytes of an object store."""
MARK = "KEYHOLE_TEST_DRIVER"

NETS = """
import os, signal, time
from pathlib import Path
from torch import nn

def in_worker():
    return os.environ["KEYHOLE_TEST_DRIVER"] != str(os.getpid())

def asked(what):
    \"\"\"Whether a worker is to do something, once.\"\"\"
    if not in_worker():
        return False
    try:
        Path(what).unlink()
    except FileNotFoundError:
        return False
    return True

def plain(num_classes, fault=""):
    if asked("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if asked("wait"):
        import ray
        Path("node").write_text(ray.get_runtime_context().get_node_id())
        time.sleep(600)
    if fault == "raise" and in_worker():
        raise OSError("no such network")
    width = 9 if fault == "differ" and in_worker() else 8
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Sigmoid(), nn.Linear(width, num_classes))

class Normed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, num_classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.first(x)).sigmoid().flatten(1)))
"""
OPTIONS = ['model={factory="cluster_nets:plain"}', "attacks.0.steps=10", "run.samples=4"]


@pytest.fixture(scope="module")
def nodes(place: Path) -> Iterator[Any]:
    """A head that offers no CPU, and two nodes of one CPU each; none of their processes survives the tests."""
    pytest.importorskip("ray", reason="Ray, which the extra 'flower' brings, is not installed")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("RAY_usage_stats_enabled", "0")
        patch.setenv("RAY_worker_niceness", "0")  # others on a busy machine would come first
        patch.setenv("PYTHONPATH", SOURCE)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": SMALL, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=SMALL)
        try:
            yield made
        finally:
            made.shutdown()
        deadline = time.monotonic() + 60
        while (alive := marked()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive


def marked() -> list[str]:
    """Command lines of processes that this one started with the mark; it has no mark itself, as it began without."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARK}={os.getpid()}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return [one for one in found if one]  # zombies have none


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, from which alone the networks can be imported."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "cluster_nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(MARK, str(os.getpid()))
        yield folder


@pytest.fixture(scope="module")
def workers(nodes: Any) -> Iterator[Workers]:
    """Those of the nodes, for all tests: starting them takes longer than what they do."""
    with cluster(nodes.address) as made:
        yield made


@pytest.fixture(scope="module")
def here(place: Path) -> Path:
    """The audit in one process."""
    assert audit(load_experiment("quick", OPTIONS), place / "here", jobs=1)
    write_report(place / "here")
    return place / "here"


def same(here: Path, there: Path) -> bool:
    """Equal reports, nothing done twice, and nothing left behind."""
    write_report(there)
    assert not list((there / "checkpoints").iterdir())
    assert sorted(str(line["trial"]) for line in lines(here)) == sorted(str(line["trial"]) for line in lines(there))
    return timeless(here) == timeless(there)


def test_an_audit_over_nodes_equals_the_local_one(
    workers: Workers, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str] = []
    monkeypatch.setattr(module, "cluster", lambda address: addresses.append(address) or nullcontext(workers))
    options = [f"--set={option}" for option in OPTIONS]
    done = keyhole("audit", "quick", "--out", str(tmp_path), "--ray", "head:6379", *options)
    assert done.returncode == 0, done.stderr
    assert addresses == ["head:6379"]
    assert same(here, tmp_path)


def test_what_a_killed_worker_and_a_killed_node_did_is_done_again(
    nodes: Any, workers: Workers, here: Path, place: Path, tmp_path: Path
) -> None:
    removed = []

    def remove() -> None:
        while not (place / "node").exists() or not (name := (place / "node").read_text()):
            time.sleep(0.05)
        (lost,) = (node for node in nodes.list_all_nodes() if node.node_id == name)
        nodes.remove_node(lost, allow_graceful=False)
        removed.append(name)

    (place / "die").touch()
    (place / "wait").touch()
    watching = threading.Thread(target=remove, daemon=True)
    watching.start()
    assert audit(load_experiment("quick", OPTIONS), tmp_path, workers=workers)
    watching.join(60)
    nodes.add_node(num_cpus=1, object_store_memory=SMALL)
    assert not (place / "die").exists() and len(removed) == 1
    assert same(here, tmp_path)


def test_an_interrupted_audit_goes_on_over_nodes(workers: Workers, here: Path, tmp_path: Path) -> None:
    """What was done is stored, and another run does the rest."""
    experiment = load_experiment("quick", OPTIONS)

    class Interrupting(Silent):
        def group(self, group: Group, fraction: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(experiment, tmp_path, workers=workers, progress=Interrupting())
    first = lines(tmp_path)
    assert 0 < len(first) < len(lines(here))
    assert audit(experiment, tmp_path, workers=workers)
    assert lines(tmp_path)[: len(first)] == first
    assert same(here, tmp_path)


def test_a_training_over_nodes_equals_the_local_one(workers: Workers, tmp_path: Path) -> None:
    """Bit by bit, with defenses that keep something of their clients and that change images."""
    links = [{"name": "top_k", "rate": 0.5, "feedback": True}, {"name": "obscuring", "steps": 2, "refresh": 1}]
    plan = parse_training(
        {
            "data": {"name": "digits", "target": 4, "tune": 0, "public": 8, "candidates": 0, "test": 60, "train": 62},
            "model": {"factory": "cluster_nets:Normed"},
            "federation": {"clients": 3, "rounds": 2, "batch_size": 16, "lr": 0.3},
            "defenses": [{"chain": [link]} for link in links],
        }
    )
    local = train(plan, tmp_path / "local")
    spread = train(plan, tmp_path / "spread", workers=workers)
    for one, two in zip(local, spread, strict=True):
        assert files(one).keys() == files(two).keys()
        assert all(torch.equal(value, files(two)[name]) for name, value in files(one).items())
        for a, b in zip(one.rounds[1:], two.rounds[1:], strict=True):
            assert (a.accuracy, a.loss, a.bytes_up) == (b.accuracy, b.loss, b.bytes_up)
            assert b.client_seconds > 0
    assert any("client:" in name for name in files(spread[1]))


def files(run: Trained) -> dict[str, torch.Tensor]:
    """Every tensor that a training left."""
    return {
        f"{path.name}/{name}": t for path in run.folder.glob("*.safetensors") for name, t in load_file(path).items()
    }


def test_a_node_that_would_give_other_results_is_named(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault, said in (("raise", "no such network"), ("differ", "loaded other data or weights")):
        experiment = load_experiment("quick", [*OPTIONS, f'model.fault="{fault}"'])
        with pytest.raises(KeyholeError, match=f"on the Ray node .*{said}"):
            audit(experiment, tmp_path / fault, workers=workers)
        assert not (tmp_path / fault / "outcomes.jsonl").exists()
    ours = {**module._versions(), "torch": "1.0"}
    monkeypatch.setattr(module, "_versions", lambda: ours)
    with pytest.raises(KeyholeError, match="on the Ray node .* torch .* instead of 1.0"):
        audit(experiment, tmp_path / "version", workers=workers)
    assert not (tmp_path / "version" / "outcomes.jsonl").exists()


def test_a_node_without_keyhole_is_said(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleType("only_the_driver_has_this")
    monkeypatch.setitem(sys.modules, absent.__name__, absent)

    def perform(*given: object) -> None:
        pass

    perform.__module__, perform.__qualname__, absent.perform = absent.__name__, "perform", perform  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_perform", perform)
    with pytest.raises(KeyholeError, match="No module named.*install the same"):
        module._Tasks(sys.modules["ray"]).spread(LocalTraining(), [0])


def test_a_group_goes_on_from_the_checkpoint_that_travelled(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load_experiment("quick", ["attacks.0.steps=100", "run.samples=4"])
    setup = prepare(experiment, torch.device("cpu"))
    group = plan(experiment, setup, choose(experiment, setup, []))[0]
    trials = module._Trials(Loaded(Study.of(experiment), [setup.fingerprint]), None)
    asked: list[object] = []

    def third_time(deadline: object) -> bool:
        asked.append(deadline)
        return len(asked) == 3

    with monkeypatch.context() as patch:
        patch.setattr("keyhole.experiment.work.passed", third_time)
        files = trials((group, {}))
    assert isinstance(files, dict) and len(files) == 1
    rest, whole = trials((group, files)), run_group(group, setup)
    assert isinstance(rest, GroupResult)
    assert [one.metrics for one in rest.outcomes] == [one.metrics for one in whole.outcomes]


@pytest.mark.parametrize("address", ["", "somewhere", "ray://head:10001", "head:port"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, local or host:port"), cluster(address):
        pass


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    pytest.importorskip("ray", reason="Ray, which the extra 'flower' brings, is not installed")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray cluster can be reached.*ConnectionRefused"), cluster(address):
            pass


def test_the_cluster_that_the_environment_names_is_asked_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would try to reach it for ever."""
    pytest.importorskip("ray", reason="Ray, which the extra 'flower' brings, is not installed")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"no Ray cluster can be reached at '{address}'"), cluster("auto"):
            pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="RAY_ADDRESS.* is 'ray://head:10001'"), cluster("auto"):
        pass


def test_something_that_listens_and_is_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray, which the extra 'flower' brings, is not installed")
    monkeypatch.setattr(module, "PATIENCE", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match="no Ray cluster .*no answer within 4 seconds"), cluster(address):
            pass
        assert time.monotonic() - began < 120


def test_missing_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs Ray, which 'pip install"), cluster("local"):
        pass


@pytest.mark.parametrize("more", [["--jobs", "2"], ["--device", "cuda"], ["--dry-run"]])
def test_what_the_cluster_decides_is_not_asked_for(more: list[str]) -> None:
    done = keyhole("audit", "quick", "--ray", "local", *more)
    assert done.returncode == 2 and "--ray" in done.stderr
