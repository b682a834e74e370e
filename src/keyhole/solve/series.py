"""A series of updates, one after another: each is solved by itself, and a sequential attack learns on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from keyhole.core.attack import Attack, SequentialAttack
from keyhole.core.keys import fold_in
from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.trial import Status
from keyhole.core.types import Observation, Reconstruction, Tensors
from keyhole.solve.checkpoint import load_checkpoint, save_checkpoint
from keyhole.solve.drive import Solved, Watch, solve
from keyhole.solve.lift import Shared, lift, stack


def solve_series(
    attack: Attack,
    task: Task,
    threat: ThreatModel,
    observations: tuple[Observation, ...],
    images: Tensor | None,
    keys: Tensor,
    shared: Shared,
    watch: Watch,
) -> list[Solved]:
    """Solve the updates of an episode in order; see `keyhole.solve.drive.solve` for the arguments.

    ``images`` hold the start images of all updates, (trials, starts, rounds x b, *shape).

    Returns:
        One `Solved` for each trial: images of all rounds in order, the worst status, evaluations in all.
    """
    size, total = threat.batch_size, len(observations)
    learner = attack if isinstance(attack, SequentialAttack) else None
    if learner is not None and images is None:
        raise TypeError("a sequential attack needs start images, of noise where it starts from noise")
    memory: Tensors = lift(learner.begin, Shared())(images[:, 0, :size]) if learner and images is not None else {}
    kept = None if watch.checkpoint is None else watch.checkpoint.with_suffix(".series.safetensors")
    begun = kept is not None and kept.exists()
    done, memory = _resume(kept, memory, keys)
    if begun and not done and watch.checkpoint is not None:
        # The account was damaged: what is left of an interrupted update belongs to a later one than the first.
        watch.checkpoint.unlink(missing_ok=True)
    for number in range(len(done), total):
        own = lift(lambda key, n=number: fold_in(key, f"round {n}"), Shared())(keys)
        here = None if images is None else images[:, :, number * size : (number + 1) * size]
        carried = [False] * keys.shape[0]
        if learner is not None and here is not None:
            carried = lift(learner.carries, Shared())(memory).tolist()
            first = lift(learner.next_start, Shared())(memory, here[:, 0])
            here = torch.cat([first[:, None], here[:, 1:]], 1)
        told = replace(watch, progress=partial(_told, watch, number, total))
        inner = learner.inner if learner is not None else attack
        solved = solve(inner, task, threat, (observations[number],), here, own, shared, told)
        answers = [one.reconstruction for one in solved]
        together = stack(answers, Shared())
        if learner is not None:
            matched = lift(learner.matched, Shared())(together).tolist()
            ended: list[Status] = ["converged" if hit else "budget" for hit in matched]
            solved = [
                s._replace(status=e if s.status != "diverged" or e == "converged" else "diverged")
                for s, e in zip(solved, ended, strict=True)
            ]
            memory = lift(learner.learn, Shared())(memory, together)
        done.append([s._replace(rounds=((s.status, s.evaluations, c),)) for s, c in zip(solved, carried, strict=True)])
        if kept is not None and number + 1 < total:
            _keep(kept, done, memory)
    if kept is not None:
        kept.unlink(missing_ok=True)
    return [_joined(rounds) for rounds in zip(*done, strict=True)]


def _told(watch: Watch, number: int, total: int, part: float) -> None:
    watch.progress((number + part) / total)


_WORST: tuple[Status, ...] = ("failed", "diverged", "budget", "stalled", "converged")


def _joined(rounds: Sequence[Solved]) -> Solved:
    answers = [one.reconstruction for one in rounds]
    targets = [answer.targets for answer in answers]
    known = None if any(t is None for t in targets) else torch.cat(cast(list[Tensor], targets))
    score = torch.stack([answer.score for answer in answers]).mean()
    status = min((one.status for one in rounds), key=_WORST.index)
    return Solved(
        Reconstruction(torch.cat([answer.inputs for answer in answers]), known, score),
        status,
        sum(one.evaluations for one in rounds),
        rounds[0].history if len(rounds) == 1 else _history(rounds),
        tuple(part for one in rounds for part in one.rounds),
    )


def _history(rounds: Sequence[Solved]) -> tuple[tuple[int, float], ...]:
    """(round, final score): within a series what matters is how it goes from round to round."""
    return tuple((i + 1, fmean([float(one.reconstruction.score)])) for i, one in enumerate(rounds))


def _keep(path: Path, done: list[list[Solved]], memory: Tensors) -> None:
    account = [[(s.rounds[0], s.history, s.reconstruction.targets is None) for s in one] for one in done]
    tensors = [leaf for one in done for s in one for leaf in s.reconstruction if leaf is not None]
    text = json.dumps({"rounds": account, "memory": list(memory)})
    save_checkpoint(path, [*tensors, *memory.values()], text)


def _resume(path: Path | None, memory: Tensors, keys: Tensor) -> tuple[list[list[Solved]], Tensors]:
    found = load_checkpoint(path, keys.device) if path is not None else None
    if found is None:
        return [], memory
    tensors, account = iter(found[0]), json.loads(found[1])
    done = [[_solved(raw, tensors) for raw in one] for one in account["rounds"]]
    return done, {name: next(tensors) for name in account["memory"]}


def _solved(raw: Any, tensors: Any) -> Solved:
    (status, evaluations, carried), history, without_targets = raw
    inputs = next(tensors)
    targets = None if without_targets else next(tensors)
    points = tuple((int(k), float(v)) for k, v in history)
    answer = Reconstruction(inputs, targets, next(tensors))
    return Solved(answer, status, evaluations, points, ((status, evaluations, carried),))
