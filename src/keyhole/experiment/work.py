"""Run groups: on a CPU in worker processes with one torch thread each, on a GPU in this process.

One thread each, because threads of several processes on few cores fight: on a busy 2-core machine two threads were 20
to 80 times slower than one. What runs where never changes a result.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from keyhole.errors import KeyholeError
from keyhole.experiment.plan import Group
from keyhole.experiment.run import GroupResult, run_group
from keyhole.experiment.setup import Setup, prepare
from keyhole.experiment.spec import Study
from keyhole.federation.local import Spread
from keyhole.solve.drive import Paused, Watch
from keyhole.solve.memory import keep_freed_memory
from keyhole.solve.threads import one_thread

SETUPS = 3
"""Settings whose data and weights a worker keeps; groups of one setting mostly follow each other."""

Report = Callable[[Group, float], None]
"""Told how far a group is, in [0, 1]."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_groups(
    study: Study,
    setups: list[Setup],
    groups: list[Group],
    checkpoints: Path,
    jobs: int,
    deadline: float | None,
    report: Report,
) -> Iterator[tuple[Group, GroupResult]]:
    """Results as groups finish, in any order.

    Args:
        study: what the groups belong to; workers load it anew.
        setups: the same, loaded in this process, one for each of its experiments.
        groups: what to run.
        checkpoints: folder for the state of unfinished groups.
        jobs: worker processes; 1 runs here. On a GPU always 1.
        deadline: `time.time()` at which to stop; unfinished groups keep their checkpoint.
        report: progress.

    Raises:
        Paused: the deadline passed before all groups were done.
    """
    device = setups[0].device
    if jobs == 1 or device.type != "cpu" or len(groups) == 1:
        with one_thread(device):
            for group in groups:
                told = partial(report, group)
                yield group, run_until(deadline, group, setups.__getitem__, checkpoints, told)
        return
    yield from _in_processes(
        study, [setup.fingerprint for setup in setups], groups, checkpoints, jobs, deadline, report
    )


def run_until(
    deadline: float | None,
    group: Group,
    setup_of: Callable[[int], Setup],
    checkpoints: Path,
    progress: Callable[[float], None] = lambda fraction: None,
) -> GroupResult:
    """Run a group, or go on with it; `Paused` at the deadline leaves its state in the folder of checkpoints."""
    if passed(deadline):
        raise Paused
    checkpoint = checkpoints / f"{group.hash}.safetensors"
    watch = Watch(checkpoint=checkpoint, progress=progress, paused=lambda: passed(deadline))
    return run_group(group, setup_of(group.setting), watch)


def passed(deadline: float | None) -> bool:
    """Whether it is time to stop."""
    return deadline is not None and time.time() >= deadline


Runner = Callable[
    [Study, list[Setup], list[Group], Path, int, float | None, Report], Iterator[tuple[Group, GroupResult]]
]
"""Takes and gives what `run_groups` does."""


@dataclass(frozen=True)
class Workers:
    """Who does the work of an audit or a training; by default this machine. It never changes a result."""

    groups: Runner = run_groups
    spread: Spread = map


HERE = Workers()


class Loaded:
    """What all trials of a setting share, loaded once in each worker and held against what the parent planned with."""

    def __init__(self, study: Study, fingerprints: list[str]) -> None:
        self.study, self.fingerprints = study, fingerprints
        self.known: dict[int, Setup] = {}

    def setup(self, number: int) -> Setup:
        """Of a setting, by its place in the study."""
        if number not in self.known:
            while len(self.known) >= SETUPS:
                del self.known[next(iter(self.known))]
            setup = prepare(self.study.experiments[number], torch.device("cpu"))
            if setup.fingerprint != self.fingerprints[number]:
                raise KeyholeError(
                    "a worker loaded other data or weights than the main process: the data changed meanwhile or differ "
                    "between machines, or the model draws its weights from something other than torch's random state; "
                    "fix that, or use --jobs 1."
                )
            self.known[number] = setup
        return self.known[number]


def _in_processes(
    study: Study,
    fingerprints: list[str],
    groups: list[Group],
    checkpoints: Path,
    jobs: int,
    deadline: float | None,
    report: Report,
) -> Iterator[tuple[Group, GroupResult]]:
    by_hash = {group.hash: group for group in groups}
    work = _Trials(Loaded(study, fingerprints), checkpoints, deadline)
    paused = False
    for name, result in in_processes(work, by_hash, jobs, lambda name, fraction: report(by_hash[name], fraction)):
        if result is None:
            paused = True  # the other workers see the same deadline; wait for their checkpoints
        else:
            yield by_hash[name], result
    if paused:
        raise Paused


@dataclass(frozen=True)
class _Trials:
    """Called with a group in a worker: its result, or `None` when it was time to stop."""

    loaded: Loaded
    checkpoints: Path
    deadline: float | None

    def __call__(self, group: Group, progress: Callable[[float], None]) -> GroupResult | None:
        try:
            return run_until(self.deadline, group, self.loaded.setup, self.checkpoints, progress)
        except Paused:
            return None


# Processes ------------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item, Callable[[float], None]], Result],
    items: Mapping[str, Item],
    jobs: int,
    report: Callable[[str, float], None],
) -> Iterator[tuple[str, Result]]:
    """Call in worker processes of one torch thread each; results come as they are done, and warnings as they are given.

    Args:
        work: called with an item and a function that takes how far it is; must be picklable, and is copied once into
            each worker.
        items: by name.
        jobs: worker processes.
        report: told the name of an item and how far it is.

    Raises:
        KeyholeError: a worker was killed. Whatever a call raises comes out here.
    """
    spawn = multiprocessing.get_context("spawn")
    # Written to at once, so that what a call had to say is there when its result is.
    news: Any = spawn.SimpleQueue()
    pool = ProcessPoolExecutor(min(jobs, len(items)), spawn, _start_worker, (work, news))
    try:
        running = {pool.submit(_call, name, item): name for name, item in items.items()}
        while running:
            finished, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
            while not news.empty():
                told = news.get()
                if isinstance(told, str):
                    warnings.warn(told, stacklevel=2)
                else:
                    report(*told)
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise KeyholeError(
            "a worker process was killed, perhaps for want of memory; run the same command again to go on, with fewer "
            "--jobs (or, in an audit, a smaller run.group)."
        ) from error
    finally:
        # On an interrupt nothing that still waits may begin; what runs keeps its last checkpoint.
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)


_worker: dict[str, Any] = {}


def _start_worker(work: Any, news: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.showwarning = lambda message, *rest, **more: news.put(str(message))  # the parent knows how to show it
    _worker.update(work=work, news=news)


def _die_with_parent() -> None:
    """A parent that was killed cannot stop its workers, and nobody would take their results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(name: str, item: Any) -> Any:
    last = [0.0]

    def progress(fraction: float) -> None:
        if time.monotonic() - last[0] > 0.5:
            last[0] = time.monotonic()
            _worker["news"].put((name, fraction))

    return _worker["work"](item, progress)
