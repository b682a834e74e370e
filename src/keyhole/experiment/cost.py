"""What an audit costs, measured: a few evaluations of each attack on public images, times all that it may use."""

from __future__ import annotations

import heapq
import itertools
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from keyhole.core.attack import Attack, IterativeAttack, SequentialAttack
from keyhole.core.registry import ATTACKS, RULES
from keyhole.core.rule import ClientRule
from keyhole.core.trial import Spec, Trial
from keyhole.experiment.plan import Group, base_attacker, build_defense, find_counter
from keyhole.experiment.run import run_group
from keyhole.experiment.setup import Setup
from keyhole.experiment.spec import AttackEntry

FEW, MORE = 2, 10
"""Evaluations in the two runs whose difference is timed."""

SMALL = 2
"""Trials of the groups in which every combination of attack and defense is timed."""

CHEAP = 1.0
"""Seconds up to which an attack is also timed in a group of the size that will run."""

RESERVE = 2.0
"""Memory in use over that of the live tensors: what convolutions work in, and gaps between blocks."""

MARGIN = 1.5
"""What is added for steps that take longer than the first ones, and for a machine that is busier than now."""

INNER = 10
"""Steps of a defense's own inner loop in a rehearsal; its time is stretched to all of them."""

_NO_COST = ("steps", "restarts", "labels")


def most_evaluations(attack: Attack) -> int:
    """Evaluations of the objective that an attack may use on one update: all steps of all starts."""
    one = attack.inner if isinstance(attack, SequentialAttack) else attack
    return one.steps * one.restarts if isinstance(one, IterativeAttack) else 1


def _of_second(trial: Trial) -> int:
    """Evaluations of the counter's second attack, taken to cost as much as those of the first."""
    then = find_counter(build_defense(trial.defense), trial.attacker).then
    return 0 if then is None else most_evaluations(then)


def costliest(entry: AttackEntry) -> Spec:
    """Of the options that are tuned, those that may use the most evaluations; the last among equals."""
    tried = [
        entry.spec.replace(**dict(zip(entry.tune, values, strict=True)))
        for values in itertools.product(*entry.tune.values())
    ]
    return max(reversed(tried), key=lambda spec: most_evaluations(_built(spec)))


def _built(spec: Spec) -> Attack:
    attack: Attack = ATTACKS.build(spec.name, **spec.asdict())
    return attack


@dataclass(frozen=True)
class Pace:
    """What one trial takes under an attack, in core-seconds."""

    fixed: float
    """Beside its evaluations: simulating the client, labels, metrics."""
    each: float
    """One evaluation."""
    memory: float
    """Bytes of live tensors at the peak."""
    together: int
    """Trials of the group in which it was timed."""
    problem: str = ""
    """Why the attack did not run, in the engine's words."""


class Pacer:
    """Times attacks on public images: no target is looked at."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Pace] = {}
        self._warm = False

    def pace(self, trial: Trial, setup: Setup, width: int) -> Pace:
        """The pace of a trial in a group of ``width``, measured once for all trials that cost the same.

        Args:
            trial: of the plan.
            setup: of its setting.
            width: trials of its group.
        """
        defense = build_defense(trial.defense)
        rule: ClientRule = RULES.build(trial.rule.name, **trial.rule.asdict())
        steps = rule.steps(trial.batch_size)
        stands_in = not trial.attacker.startswith(("naive", "adaptive"))
        trial = replace(trial, attacker=base_attacker(defense, trial.sees, steps) if stands_in else trial.attacker)
        plain = replace(trial, defense=(), attacker="naive")
        if trial.attacker == "naive" and defense.counters() and defense.on_task(setup.task) is setup.task:
            trial = plain  # to this attacker the update is like any other
        small = self._small(trial, setup)
        plain_small, full = self._small(plain, setup), self._full(plain, setup, width)
        if small.problem or plain_small.problem or full.together == SMALL:
            return small
        # Timed at full width without a defense only; what a defense or counter adds is taken to grow alike.
        each = full.each * max(1.0, small.each / plain_small.each) if plain_small.each > 0 else full.each
        fixed = full.fixed + max(0.0, small.fixed - plain_small.fixed)
        return replace(small, fixed=fixed, each=each, together=width)

    def _small(self, trial: Trial, setup: Setup) -> Pace:
        key = _alike(trial)
        if key not in self._known:
            self._known[key] = self._measure(trial, setup, SMALL)
        return self._known[key]

    def _full(self, trial: Trial, setup: Setup, width: int) -> Pace:
        small, key = self._small(trial, setup), (_alike(trial), width)
        if key not in self._known:
            cheap = (small.fixed + MORE * small.each) * width <= CHEAP
            self._known[key] = self._measure(trial, setup, width) if width > SMALL and cheap else small
        return self._known[key]

    def _measure(self, trial: Trial, setup: Setup, width: int) -> Pace:
        trial, stretch = _shortened(trial)
        if not self._warm:
            _timed(trial, setup, 1, 1)  # whatever is loaded or compiled on first use
            self._warm = True
        memory, problem = _peak(trial, setup) if width == SMALL else (self._small(trial, setup).memory, "")
        if problem:
            return Pace(0.0, 0.0, memory, width, problem)
        (few, client), (more, _) = (_timed(trial, setup, width, limit) for limit in (FEW, MORE))
        each = max(0.0, more - few) / (MORE - FEW)
        fixed = max(0.0, few - FEW * each) / width + (stretch - 1.0) * client
        return Pace(fixed, each / width, memory, width)


def _shortened(trial: Trial) -> tuple[Trial, float]:
    """The trial with short inner loops of its defenses, and how much longer the longest of them is."""
    inner = [spec.asdict().get("steps", 0) for spec in trial.defense]
    links = [spec.replace(steps=min(n, INNER)) if n else spec for spec, n in zip(trial.defense, inner, strict=True)]
    return replace(trial, defense=tuple(links)), max([1.0, *(n / INNER for n in inner)])


def _alike(trial: Trial) -> tuple[Any, ...]:
    """Equal for trials whose evaluations cost the same: weights of penalties and strengths of defenses play no part."""
    options = [(k, v) for k, v in trial.attack.options if k not in _NO_COST and not isinstance(v, float)]
    names = tuple(spec.name for spec in trial.defense)
    client = (trial.rule, trial.belief, trial.batch_size, trial.rounds, trial.sees, trial.dtype)
    return trial.source, trial.model, client, names, trial.attack.name, tuple(options), trial.attacker


def rehearsal(trial: Trial, setup: Setup, count: int, limit: int) -> tuple[Group, Setup]:
    """A group like that of ``trial`` with public images for secrets, one update each, stopped after ``limit``."""
    public, size = setup.data.public, trial.batch_size
    setup = replace(setup, data=replace(setup.data, target=public), last_client={})
    rows = [tuple((size * i + j) % len(public) for j in range(size)) for i in range(count)]
    return Group(tuple(replace(trial, episode=r, pool="target", limit=limit) for r in rows)), setup


def _timed(trial: Trial, setup: Setup, count: int, limit: int) -> tuple[float, float]:
    """Seconds of a rehearsal, and of them those of one trial's client."""
    group, own = rehearsal(trial, setup, count, limit)
    began = _clock(setup.device)
    outcomes = run_group(group, own).outcomes
    return _clock(setup.device) - began, outcomes[0].client_seconds * trial.rounds


def _clock(device: torch.device) -> float:
    """Seconds of this process, which neighbours on the machine do not stretch; on a GPU of the wall clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _peak(trial: Trial, setup: Setup) -> tuple[float, str]:
    """Bytes of live tensors of one trial at the peak, and what went wrong."""
    group, own = rehearsal(trial, setup, SMALL, FEW)
    with _LiveTensors() as live:
        first = run_group(group, own).outcomes[0]
    problem = first.detail.strip().split("\n")[-1] if first.status in ("refused", "failed") else ""
    return live.peak / SMALL, problem


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storage of all tensors that are made while it is active, and of those that live at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return out

    def _born(self, storage: Any) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, name: int) -> None:
        self.now -= self._sizes.pop(name, 0)


@dataclass(frozen=True)
class Cost:
    """What a stage costs at most: every attack uses all its steps in all its starts."""

    core_seconds: float
    wall_seconds: float
    """With so many jobs, groups in the order of the plan."""
    jobs: int
    memory: float
    """Bytes at the peak, all jobs together, beside the program and the data."""


def price(groups: Iterable[tuple[Group, Setup]], pacer: Pacer, jobs: int) -> Cost:
    """The cost of groups that wait for nothing but a free job.

    Args:
        groups: with the setup of each.
        pacer: measures what it does not know.
        jobs: groups at a time.
    """
    seconds, memory = [], [0.0]
    for group, setup in groups:
        trial, width = group.trials[0], len(group.trials)
        if trial.attacker == "control:class_mean":
            seconds.append(0.0)
            continue
        pace = pacer.pace(trial, setup, width)
        if pace.problem:
            seconds.append(0.0)
            continue
        evaluations = most_evaluations(_built(trial.attack)) + _of_second(trial)
        if trial.limit:
            evaluations = min(evaluations, trial.limit)
        updates = len(trial.episode) // trial.batch_size
        seconds.append(MARGIN * width * updates * (pace.fixed + evaluations * pace.each))
        memory.append(width * pace.memory * RESERVE)
    free = [0.0] * max(1, min(jobs, len(seconds)))
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return Cost(sum(seconds), max(free), len(free), sum(sorted(memory)[-len(free) :]))
