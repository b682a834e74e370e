"""A Ray cluster: groups of trials, and clients of a round, as tasks on its nodes.

Every node reads its own images and runs its own copy of Keyhole. A node with other versions of Keyhole or its packages
than the main process, or in an audit with other images or weights, is refused; code of a user's own model is not
compared. The main process alone writes the output folder. A task whose worker or node was killed runs again; as it
gives the same result, nobody can tell.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import keyhole
from keyhole.errors import ConfigError, KeyholeError, cause
from keyhole.experiment.audit import versions
from keyhole.experiment.plan import Group
from keyhole.experiment.run import GroupResult
from keyhole.experiment.setup import Setup
from keyhole.experiment.spec import Study
from keyhole.experiment.work import Loaded, Report, Workers, run_until
from keyhole.solve.drive import Paused
from keyhole.solve.files import write_whole
from keyhole.solve.threads import one_thread

RETRIES = 3
"""How often a task whose worker was killed runs again."""

PATIENCE = 60.0
"""Seconds for a cluster to answer."""

AHEAD = 2
"""Tasks that are given to the cluster at a time, for each of its CPUs."""

Files = dict[str, bytes]


@contextmanager
def cluster(address: str) -> Iterator[Workers]:
    """Workers on a Ray cluster.

    Args:
        address: ``auto`` for the cluster that ``RAY_ADDRESS`` names or this machine is a node of, ``host:port`` for one
            by the address of its head, or ``local`` for a private one on this machine, which ends with the context.
    """
    ray = _connected(address)
    try:
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise ConfigError(f"the Ray cluster at '{address}' offers no CPU; start a node with --num-cpus.")
        tasks = _Tasks(ray)
        yield Workers(tasks.groups, tasks.spread)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address not in ("auto", "local") and not re.fullmatch(r"[\w.\-]+:\d+", address):
        raise ConfigError(f"--ray (or RAY_ADDRESS) is '{address}'; it must be auto, local or host:port.")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray, which 'pip install keyhole[flower]' brings.") from error
    options: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_usage_stats_enabled", "0")
        options = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        if address != "local":
            _greet(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to those who write Ray programs
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (OSError, OverflowError, RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"no Ray cluster can be reached at '{address}' from this machine ({cause(error)}); start one with "
            "'ray start --head', or use --ray local."
        ) from error
    return ray


def _greet(address: str) -> None:
    """Raises `OSError` where no cluster answers: Ray itself would try for ever, or end the whole process."""
    where = []
    if address != "auto":
        where = ["--address", address]
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
    # Somebody listens, perhaps something else than Ray. Asked by another process, which can be ended.
    asking = [sys.executable, "-m", "ray.scripts.scripts", "status", *where]
    try:
        answer = subprocess.run(asking, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no answer within {PATIENCE:g} seconds") from error
    if answer.returncode:
        said = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
        raise ConnectionError(said[-1].partition(": ")[2] if said else "it is not well")


class _Tasks:
    """Calls of a dataclass as Ray tasks."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.perform = ray.remote(_perform).options(num_cpus=1, max_retries=RETRIES)
        self.sent: dict[int, tuple[Any, Any]] = {}
        """Fields of the last dataclass and their references, by identity."""

    def groups(
        self,
        study: Study,
        setups: list[Setup],
        groups: list[Group],
        checkpoints: Path,
        jobs: int,
        deadline: float | None,
        report: Report,
    ) -> Iterator[tuple[Group, GroupResult]]:
        """As `keyhole.experiment.work.run_groups`; as many at a time as the cluster has CPUs, told of when done."""
        work = _Trials(Loaded(study, [setup.fingerprint for setup in setups]), deadline)
        items = [(group, _read(checkpoints.glob(f"{group.hash}.*"))) for group in groups]
        paused = False
        for number, got in self._each(work, items):
            if isinstance(got, GroupResult):
                yield groups[number], got
            else:
                paused = True  # the other workers see the same deadline; wait for their checkpoints
                for name, data in got.items():
                    write_whole(checkpoints / name, data)
        if paused:
            raise Paused

    def spread(self, work: Any, items: Sequence[Any]) -> list[Any]:
        """As `map`, at the same time."""
        results = dict(self._each(work, items))
        return [results[number] for number in range(len(items))]

    def _each(self, work: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Numbers of the items and what calls with them gave, as they finish."""
        parts = self._sent(work)
        ours = _versions()
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            # Few ahead, as they are not cancelled on an interrupt: Ray 2.55 ends the main process where a task ends
            # while it is being cancelled. The end of the connection ends them.
            most = AHEAD * max(1, int(self.ray.cluster_resources().get("CPU", 0)))
            while waiting and len(running) < most:
                number, item = waiting.pop()
                running[self.perform.remote(ours, os.getcwd(), parts, item)] = number
            (done, *_), _ = self.ray.wait(list(running))
            yield running.pop(done), self._result(done)

    def _sent(self, work: Any) -> list[Any]:
        """References to a dataclass's type and fields; what the last one had too, such as images, travels once."""
        values = [type(work), *(getattr(work, field.name) for field in fields(work))]
        known, self.sent = self.sent, {}
        for value in values:
            self.sent[id(value)] = known.get(id(value)) or (value, self.ray.put(value))
        return [self.sent[id(value)][1] for value in values]

    def _result(self, task: Any) -> Any:
        failures = self.ray.exceptions
        try:
            result, problem, trace = self.ray.get(task)
        except failures.RayTaskError as error:
            # Whatever goes wrong within the task comes back as its result, so this one never began.
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise KeyholeError(
                f"a node of the cluster cannot do Keyhole's work ({lines[-1].strip().rstrip('.')}); install the same "
                "version of Keyhole on every node."
            ) from error
        except failures.RayError as error:
            raise KeyholeError(
                f"a worker on the cluster was killed {RETRIES + 1} times at the same work, perhaps for want of memory "
                f"({type(error).__name__}); run the same command again to go on, with a smaller run.group or fewer "
                "CPUs a node."
            ) from error
        if trace:
            raise RuntimeError(trace)
        if problem:
            raise KeyholeError(problem)
        return result


# In a worker of a node

_kept: dict[str, Any] = {}
"""What the last task was made of, by reference, as the next one mostly needs the same."""


def _perform(ours: dict[str, str], folder: str, parts: list[Any], item: Any) -> tuple[Any, str, str]:
    """The result of a call, what the user did wrong, and the trace of what Keyhole did wrong.

    Args:
        ours: versions in the main process.
        folder: where it runs; relative paths mean the same here if there is such a folder.
        parts: references to a dataclass's type and fields, which are not read before versions are known to agree.
        item: what to call it with.
    """
    ray = importlib.import_module("ray")
    node = f"on the Ray node {ray.util.get_node_ip_address()}"
    theirs = _versions()
    if theirs != ours:
        names = sorted(name for name in ours if ours[name] != theirs.get(name))
        listed = ", ".join(f"{name} {theirs.get(name)} instead of {ours[name]}" for name in names)
        return None, f"{node} runs {listed}; results would differ, so install the same on every node.", ""
    if Path(folder).is_dir():
        os.chdir(folder)
    wanted = [part.hex() for part in parts]
    for name in _kept.keys() - set(wanted):
        del _kept[name]
    for name, part in zip(wanted, parts, strict=True):
        if name not in _kept:
            _kept[name] = ray.get(part)
    kind, *values = (_kept[name] for name in wanted)
    try:
        with one_thread(torch.device("cpu")):
            return kind(*values)(item), "", ""
    except KeyholeError as error:
        return None, f"{node}: {error}", ""
    except Exception:
        return None, "", f"{node}:\n{traceback.format_exc()}"


@dataclass(frozen=True, eq=False)
class _Trials:
    """Called with a group and its checkpoints: its result, or its checkpoints when it is time to stop."""

    loaded: Loaded
    deadline: float | None

    def __call__(self, item: tuple[Group, Files]) -> GroupResult | Files:
        group, files = item
        with TemporaryDirectory() as name:
            folder = Path(name)
            for own, data in files.items():
                (folder / own).write_bytes(data)
            try:
                return run_until(self.deadline, group, self.loaded.setup, folder)
            except Paused:
                return _read(folder.iterdir())


def _read(paths: Any) -> Files:
    return {path.name: path.read_bytes() for path in paths}


@cache
def _versions() -> dict[str, str]:
    """What results depend on: versions of packages, and a digest of this one's files."""
    digest = hashlib.sha256()
    root = Path(keyhole.__path__[0])
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {**versions(), "keyhole's files": digest.hexdigest()[:12]}
