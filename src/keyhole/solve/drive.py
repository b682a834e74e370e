"""The lifted loop: start, evaluate, step, judge, restart, decode, for a group of trials at once.

The loop owns what attacks must not each write again: the best iterate, divergence, stalls, restarts, budgets, history
and checkpoints. It never sees a secret. Every `CHECK` evaluations it judges each trial on the host and drops those that
have ended, so that the group shrinks to what still runs; between two looks nothing waits for the device.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from keyhole.core.attack import Attack, DirectAttack, IterativeAttack, SequentialAttack
from keyhole.core.defense import Counter
from keyhole.core.keys import advance, fold_in
from keyhole.core.task import Task
from keyhole.core.tensors import flatten, unflatten
from keyhole.core.threat import ThreatModel
from keyhole.core.trial import Status
from keyhole.core.types import Candidate, Key, Observation, Reconstruction, Seen
from keyhole.errors import Refused
from keyhole.solve.checkpoint import load_checkpoint, save_checkpoint
from keyhole.solve.lift import Shared, lift, stack, take

CHECK = 10
"""Evaluations between two looks at a group. Part of the result: ends of trials fall on this grid."""

CHECKPOINT_SECONDS = 30.0
HISTORY_POINTS = 60


class Paused(Exception):  # noqa: N818  (not an error: the run was asked to stop and can go on)
    """The loop was asked to stop; its checkpoint is written."""


class Solved(NamedTuple):
    """What the engine says of one trial."""

    reconstruction: Reconstruction
    status: Status
    evaluations: int
    history: tuple[tuple[int, float], ...]
    rounds: tuple[tuple[Status, int, bool], ...] = ()
    """How each update of a series ended, its evaluations, and whether its start carried something over from earlier
    ones; empty for a single update."""


class Best(NamedTuple):
    """The best iterate of one trial: by objective within a start, by score between starts."""

    x: Tensor
    objective: Tensor
    score: Tensor


@dataclass
class Lane:
    """Host-side account of one trial that still runs."""

    trial: int
    start: int = 0
    local: int = 0
    """Evaluations in this start."""
    evaluations: int = 0
    mark: float = math.inf
    """Objective at the last stall check."""
    marked: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    ending: Status = "diverged"
    """How the start ended that gave the best score so far."""


@dataclass(frozen=True)
class Watch:
    """How a caller follows, limits and resumes a group."""

    limit: int = 0
    """Most evaluations of one trial, or of each update of a series, all starts together; 0: the attack's own budget."""
    checkpoint: Path | None = None
    """Where to keep the state of an unfinished group."""
    progress: Callable[[float], None] = lambda fraction: None
    """Told the finished share of the group, in [0, 1]."""
    paused: Callable[[], bool] = lambda: False
    """Asked at every look whether to stop; the checkpoint is written first."""


def solve(
    attack: Attack,
    task: Task,
    threat: ThreatModel,
    observations: tuple[Observation, ...],
    images: Tensor | None,
    keys: Tensor,
    shared: Shared,
    watch: Watch | None = None,
    then_images: Tensor | None = None,
) -> list[Solved]:
    """Run an attack on a group of trials, and the counter's second attack on what it found, where there is one.

    Args:
        attack: the method, written for one trial.
        task: what the clients train, as the defense changed it.
        threat: what the attacker knows, its counter included.
        observations: what the attacker saw, with a leading trial axis.
        images: public start images, (trials, starts, r, *input_shape), or `None` for random starts.
        keys: the attacker's randomness, (trials, 2).
        shared: leaves that all trials have in common.
        watch: progress, limits and checkpoint.
        then_images: as ``images``, for the counter's second attack.

    Returns:
        One `Solved` for each trial, in order.
    """
    watch = watch or Watch()
    then = threat.counter.then
    if then is not None:
        if len(observations) > 1 and not threat.repeated:
            raise Refused("the second attack works on one update at a time; set client.series = 1.")
        # A limit is for both together.
        half = replace(watch, limit=watch.limit // 2, progress=lambda fraction: watch.progress(fraction / 2))
        plain = replace(threat, counter=without_then(threat.counter))
        first = solve(attack, task, plain, observations, images, keys, shared, half)
        return _second(then, task, plain, observations, then_images, keys, shared, watch, first)
    if threat.repeated and len(observations) > 1:
        observations = (_combined(threat, observations, shared),)
    if isinstance(attack, SequentialAttack) or len(observations) > 1:
        # Imported here because a series is made of single updates, which this function solves.
        from keyhole.solve.series import solve_series

        return solve_series(attack, task, threat, observations, images, keys, shared, watch)

    def infer(seen: tuple[Observation, ...], key: Key) -> Seen:
        known = {f"counter.{name}": value for name, value in threat.counter.facts(task, seen).items()}
        return Seen(seen, {**known, **attack.infer(task, threat, Seen(seen, known), fold_in(key, "infer"))})

    seen = lift(infer, shared)(observations, keys)
    if isinstance(attack, DirectAttack):
        answers = lift(lambda s, k: attack.reconstruct(task, threat, s, k), shared)(seen, keys)
        count = keys.shape[0]
        return [Solved(at(answers, i), "converged", 1, ()) for i in range(count)]
    if not isinstance(attack, IterativeAttack):
        raise TypeError(f"{type(attack).__name__} is neither a direct, an iterative nor a sequential attack")
    return _Loop(attack, task, threat, seen, images, keys, shared, watch).run()


def without_then(counter: Counter) -> Counter:
    """The counter without its second attack."""
    own = copy.copy(counter)
    own.then = None
    return own


def _second(
    then: Attack,
    task: Task,
    threat: ThreatModel,
    observations: tuple[Observation, ...],
    images: Tensor | None,
    keys: Tensor,
    shared: Shared,
    watch: Watch,
    first: list[Solved],
) -> list[Solved]:
    """The second attack, which finds what the first one found among its facts; budgets and histories add up."""
    if not isinstance(then, IterativeAttack):
        raise TypeError(f"{type(then).__name__} is no iterative attack, and so no second one")
    found = stack([one.reconstruction.inputs for one in first], shared)

    def infer(seen: tuple[Observation, ...], inputs: Tensor, key: Key) -> Seen:
        known = {"found.inputs": inputs}
        return Seen(seen[:1], {**known, **then.infer(task, threat, Seen(seen[:1], known), fold_in(key, "infer"))})

    keys = lift(lambda key: fold_in(key, "then"), shared)(keys)
    seen = lift(infer, shared)(observations, found, keys)
    rest = replace(
        watch,
        limit=watch.limit - watch.limit // 2,
        progress=lambda fraction: watch.progress((1 + fraction) / 2),
        checkpoint=watch.checkpoint and watch.checkpoint.with_suffix(".then.safetensors"),
    )
    return [
        two._replace(
            reconstruction=two.reconstruction._replace(targets=one.reconstruction.targets),
            evaluations=one.evaluations + two.evaluations,
        )
        for one, two in zip(first, _Loop(then, task, threat, seen, images, keys, shared, rest).run(), strict=True)
    ]


def _combined(threat: ThreatModel, observations: tuple[Observation, ...], shared: Shared) -> Observation:
    """Updates of one batch at the same weights as one, in the way of the counter."""
    updates = [one.update for one in observations]
    if any(update is None for update in updates):
        return observations[0]
    by_name = {name: [update[name] for update in updates if update] for name in updates[0] or {}}

    def combine(rounds: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return threat.counter.combine({name: torch.stack(values) for name, values in rounds.items()})

    return observations[0]._replace(update=lift(combine, shared)(by_name))


class _Loop:
    """One run of the lifted loop; see the module's docstring."""

    def __init__(
        self,
        attack: IterativeAttack,
        task: Task,
        threat: ThreatModel,
        seen: Seen,
        images: Tensor | None,
        keys: Tensor,
        shared: Shared,
        watch: Watch,
    ) -> None:
        self.attack, self.task, self.threat, self.shared, self.watch = attack, task, threat, shared, watch
        self.optimizer = attack.optimizer
        self.seen, self.all_seen, self.keys = seen, seen, keys
        candidates = [
            self._begin(seen, None if images is None else images[:, i], keys, i) for i in range(attack.restarts)
        ]
        self.shapes = {name: tuple(value.shape[1:]) for name, value in candidates[0].items()}
        self.starts = torch.stack([lift(flatten, shared)(candidate) for candidate in candidates])
        # Cloned: leaves that vmap only expanded share memory between trials and cannot be written in place.
        self.state = pytree.tree_map(torch.clone, lift(self.optimizer.init, shared)(self.starts[0]))
        self.best = self._no_best(self.starts[0])
        self.champion = self._no_best(self.starts[0])
        self.lanes = [Lane(i) for i in range(keys.shape[0])]
        self.tick = 0
        self.ended: dict[int, Lane] = {}
        self.results = self._no_best(self.starts[0])
        self.saved_at = time.monotonic()

    def _begin(self, seen: Seen, images: Tensor | None, keys: Tensor, number: int) -> Candidate:
        def begin(seen: Seen, images: Tensor | None, key: Key) -> Candidate:
            key = fold_in(key, f"start {number}")
            candidate = self.attack.start(self.task, self.threat, seen, images, key)
            unknowns = self.threat.counter.unknowns(self.task, seen.observations, fold_in(key, "unknowns"))
            return {**candidate, **{f"counter.{name}": value for name, value in unknowns.items()}}

        return lift(begin, self.shared)(seen, images, keys)

    @staticmethod
    def _no_best(x: Tensor) -> Best:
        never = torch.full((x.shape[0],), math.inf, dtype=x.dtype, device=x.device)
        return Best(x.clone(), never, never.clone())

    def _step(self, state: Any, best: Best, seen: Seen, key: Key) -> tuple[Any, Best]:
        """One evaluation and one step, for one trial. A gradient that is not finite counts as an infinite objective."""

        def objective(x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attack.loss(self.task, self.threat, seen, unflatten(x, self.shapes), key)

        def project(x: Tensor) -> Tensor:
            return flatten(self.attack.project(self.task, unflatten(x, self.shapes)))

        x = self.optimizer.propose(state)
        gradient, (value, score) = grad_and_value(objective, has_aux=True)(x)
        value = torch.where(gradient.isfinite().all(), value, math.inf)
        state = self.optimizer.update(state, value, gradient, self.tick, project)
        better = value < best.objective
        return state, Best(
            torch.where(better, x, best.x),
            torch.where(better, value, best.objective),
            torch.where(better, score, best.score),
        )

    def run(self) -> list[Solved]:
        """Loop until every trial has ended, then decode."""
        total = len(self.lanes)
        self._resume()
        step = lift(self._step, self.shared)
        while self.lanes:
            self.state, self.best = step(self.state, self.best, self.seen, advance(self.keys, self.tick))
            self.tick += 1
            for lane in self.lanes:
                lane.local += 1
                lane.evaluations += 1
            if self.tick % CHECK == 0 or any(self._spent(lane) for lane in self.lanes):
                self._look()
                self.watch.progress(self._fraction(total))
                self._keep()
        decoded = self._decode()
        if self.watch.checkpoint is not None:
            self.watch.checkpoint.unlink(missing_ok=True)
        return decoded

    def _spent(self, lane: Lane) -> bool:
        out_of_budget = self.watch.limit > 0 and lane.evaluations >= self.watch.limit
        return lane.local >= self.attack.steps or out_of_budget

    def _look(self) -> None:
        """Judge every running trial: go on, start again, or end."""
        objectives = self.best.objective.tolist()
        scores = torch.minimum(self.best.score, self.champion.score).tolist()
        stuck = self.state.stuck.tolist()
        ended: list[tuple[int, Status]] = []
        for i, lane in enumerate(self.lanes):
            if self.tick % CHECK != 0 and not self._spent(lane):
                continue  # looked at only for a neighbour whose budget ended off the grid
            if math.isfinite(scores[i]):
                lane.history.append((lane.evaluations, scores[i]))
            reason = self._reason(lane, objectives[i], stuck[i])
            if reason is not None:
                ended.append((i, reason))
        if not ended:
            return
        self._crown(ended)
        again = [i for i, reason in ended if self._starts_again(self.lanes[i], reason)]
        done = {i for i, _ in ended if i not in again}
        if again:
            self._restart(again)
        if done:
            self._drop(done)

    def _reason(self, lane: Lane, objective: float, stuck: bool) -> Status | None:
        """Why this start has ended, or `None` if it goes on."""
        attack = self.attack
        if attack.tolerance > 0 and objective <= attack.tolerance:
            return "converged"
        if stuck:
            return "stalled" if math.isfinite(objective) else "diverged"
        if attack.patience > 0 and lane.local - lane.marked >= attack.patience:
            if not objective < lane.mark * (1.0 - attack.min_progress):
                return "stalled" if math.isfinite(objective) else "diverged"
            lane.mark, lane.marked = objective, lane.local
        if self._spent(lane):
            return "budget" if math.isfinite(objective) else "diverged"
        return None

    def _starts_again(self, lane: Lane, reason: Status) -> bool:
        left = lane.start + 1 < self.attack.restarts
        allowed = self.watch.limit == 0 or lane.evaluations < self.watch.limit
        return left and allowed and (self.attack.always_restart or reason != "converged")

    def _crown(self, ended: list[tuple[int, Status]]) -> None:
        """The best of all starts so far, by score without priors."""
        for i, reason in ended:
            if bool(self.best.score[i] < self.champion.score[i]):
                self.lanes[i].ending = reason
                for mine, theirs in zip(self.champion, self.best, strict=True):
                    mine[i] = theirs[i]

    def _restart(self, index: list[int]) -> None:
        for i in index:
            lane = self.lanes[i]
            lane.start, lane.local, lane.mark, lane.marked = lane.start + 1, 0, math.inf, 0
        where = torch.tensor(index, device=self.keys.device)
        xs = torch.stack([self.starts[self.lanes[i].start, self.lanes[i].trial] for i in index])
        renewed = lift(self.optimizer.restart, self.shared)(take(self.state, where, self.shared), xs)
        for tree, part in ((self.state, renewed), (self.best, self._no_best(xs))):
            for leaf, new in zip(pytree.tree_leaves(tree), pytree.tree_leaves(part), strict=True):
                leaf[where] = new

    def _drop(self, done: set[int]) -> None:
        for i in done:
            lane = self.lanes[i]
            self.ended[lane.trial] = lane
            for mine, theirs in zip(self.results, self.champion, strict=True):
                mine[lane.trial] = theirs[i]
        rest = [i for i in range(len(self.lanes)) if i not in done]
        self.lanes = [self.lanes[i] for i in rest]
        if not rest:
            return
        where = torch.tensor(rest, device=self.keys.device)
        self.state, self.best, self.champion, self.seen, self.keys = (
            take(tree, where, self.shared) for tree in (self.state, self.best, self.champion, self.seen, self.keys)
        )

    def _fraction(self, total: int) -> float:
        """Share of the group that is done, each running trial counted by its evaluations."""
        most = self.watch.limit or self.attack.steps * (self.attack.restarts if self.attack.always_restart else 1)
        running = sum(min(1.0, lane.evaluations / most) for lane in self.lanes)
        return (total - len(self.lanes) + running) / total

    def _decode(self) -> list[Solved]:
        def decode(seen: Seen, best: Best) -> Reconstruction:
            candidate = unflatten(best.x, self.shapes)
            return self.attack.decode(self.task, self.threat, seen, candidate, best.score)

        answers = lift(decode, self.shared)(self.all_seen, self.results)
        solved = []
        for trial in range(len(self.ended)):
            lane = self.ended[trial]
            solved.append(Solved(at(answers, trial), lane.ending, lane.evaluations, _thin(lane.history)))
        return solved

    # Checkpoints. Everything random is a function of keys and ticks, so tensors and counters are the whole state.

    def _keep(self) -> None:
        paused = self.watch.paused()
        if self.watch.checkpoint is None:
            if self.lanes and paused:
                raise Paused
            return
        due = time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS
        if self.lanes and (due or paused):
            tensors = pytree.tree_leaves((self.state, self.best, self.champion, self.results))
            ended = {str(trial): asdict(lane) for trial, lane in self.ended.items()}
            account = {"tick": self.tick, "lanes": [asdict(lane) for lane in self.lanes], "ended": ended}
            save_checkpoint(self.watch.checkpoint, tensors, json.dumps(account))
            self.saved_at = time.monotonic()
        if self.lanes and paused:
            raise Paused

    def _resume(self) -> None:
        kept = load_checkpoint(self.watch.checkpoint, self.keys.device) if self.watch.checkpoint else None
        if kept is None:
            return
        tensors, text = kept
        account = json.loads(text)
        trees = (self.state, self.best, self.champion, self.results)
        self.state, self.best, self.champion, self.results = pytree.tree_unflatten(
            tensors, pytree.tree_structure(trees)
        )
        self.tick = account["tick"]
        self.lanes = [_lane(raw) for raw in account["lanes"]]
        self.ended = {int(trial): _lane(raw) for trial, raw in account["ended"].items()}
        where = torch.tensor([lane.trial for lane in self.lanes], device=self.keys.device)
        self.seen, self.keys = take(self.seen, where, self.shared), take(self.keys, where, self.shared)


def _lane(raw: dict[str, Any]) -> Lane:
    return Lane(**{**raw, "history": [(int(k), float(v)) for k, v in raw["history"]]})


def at(tree: Any, index: int) -> Any:
    """One trial of a lifted tree."""
    return pytree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def _thin(history: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most `HISTORY_POINTS` entries, the first and the last among them."""
    if len(history) <= HISTORY_POINTS:
        return tuple(history)
    last = len(history) - 1
    chosen = sorted({round(i * last / (HISTORY_POINTS - 1)) for i in range(HISTORY_POINTS)})
    return tuple(history[i] for i in chosen)
