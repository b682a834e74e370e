"""The lifted loop of model inversion: many searches at once, on one or several target networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from keyhole.core.inversion import Inversion, Target
from keyhole.core.keys import advance, fold_in
from keyhole.core.task import Task
from keyhole.core.tensors import flatten, unflatten
from keyhole.core.types import Key, Tensors, Weights
from keyhole.errors import ModelError, check_range
from keyhole.solve.views import averaged

TOGETHER = 256
"""Most images in one lifted step. Part of the result: a group's size changes the last bits."""
EVERY = 10
"""Steps between two points of the history."""
_SLICE = 256


@dataclass(frozen=True, eq=False)
class Inverted:
    """What a model inversion made of one target."""

    images: Tensor
    """Pixels in [0, 1], (k, n, c, h, w): n images of each class, those that the target is surest of first."""
    confidence: Tensor
    """Probability that the target gives each image's class, (k, n)."""
    losses: tuple[float, ...]
    """Mean objective of the searches, at every tenth step."""
    searches: int
    seconds: float


def invert(
    method: Inversion,
    task: Task,
    targets: Sequence[Weights],
    prior: Any,
    public: Tensor,
    samples: int,
    keys: Sequence[Key],
    *,
    told: Callable[[float], None] = lambda fraction: None,
    at_once: int | None = None,
) -> list[Inverted]:
    """Run a model inversion on target networks of one architecture.

    Args:
        method: the attack, written for one search on one target.
        task: the architecture, evaluating, as the defense changed it.
        targets: the weights of each target.
        prior: what the method's `prepare` gave, the same for all targets.
        public: the attacker's images (n, c, h, w) in [0, 1].
        samples: images of each class to make, at least 1.
        keys: the attacker's randomness for each target.
        told: told the finished share.
        at_once: targets in one lifted step; by default 1 on a CPU, where a convolution lifted over weights is slower
            than a loop, and all of them elsewhere.

    Raises:
        ModelError: the objective became infinite or NaN.
    """
    check_range("samples", samples, 1)
    device = public.device
    at_once = at_once or (1 if device.type == "cpu" else len(targets))
    found: list[Inverted] = []
    for begin in range(0, len(targets), at_once):
        group, own = targets[begin : begin + at_once], keys[begin : begin + at_once]

        def part(fraction: float, begin: int = begin, size: int = len(group)) -> None:
            told((begin + fraction * size) / len(targets))

        found += _group(method, task, group, prior, public, samples, own, part)
    return found


def _group(
    method: Inversion,
    task: Task,
    targets: Sequence[Weights],
    prior: Any,
    public: Tensor,
    samples: int,
    keys: Sequence[Key],
    told: Callable[[float], None],
) -> list[Inverted]:
    """Some targets at once: the outer lift is over targets, the inner one over searches."""
    began = time.perf_counter()
    device = public.device
    made = samples * method.final
    searches = math.ceil(made / method.together) if method.together else 1
    facts = [method.infer(Target(task, weights), prior, public) for weights in targets]
    over = _Over(targets, facts)
    lanes = max(1, TOGETHER // (max(1, method.together) * task.num_classes))
    pictures: list[Tensor] = []
    losses: list[list[float]] = []
    for first in range(0, searches, lanes):
        count = min(lanes, searches - first)
        own = torch.stack([torch.stack([fold_in(key, first + i) for i in range(count)]) for key in keys]).to(device)

        def part(fraction: float, first: int = first, count: int = count) -> None:
            told((first + fraction * count) / searches)

        images, history = _search(method, task, prior, over, own, made, part)
        pictures.append(images)
        losses.append(history)
    whole = torch.cat(pictures, 1)[:, :made]
    seconds = (time.perf_counter() - began) / len(targets)
    trace = tuple(sum(values) / len(values) for values in zip(*losses, strict=True))
    return [
        _kept(method, Target(task, weights), one, samples, fold_in(key, "choice"), trace, searches, seconds)
        for weights, one, key in zip(targets, whole, keys, strict=True)
    ]


class _Over:
    """Lifts over targets and searches; a single target stays as it is."""

    def __init__(self, targets: Sequence[Weights], facts: Sequence[Tensors]) -> None:
        self.alone = len(targets) == 1
        self.each = (targets[0], facts[0]) if self.alone else _stacked([*zip(targets, facts, strict=True)])

    def __call__(self, fn: Callable[..., Any], *arguments: Any, chunk: int | None = None) -> Any:
        """``fn(weights, facts, *arguments)`` for each target and search; tensors get the axes (targets, searches).

        At most ``chunk`` searches at once.
        """

        def one(each: tuple[Weights, Tensors], *rest: Any) -> Any:
            return vmap(lambda *inner: fn(*each, *inner), chunk_size=chunk)(*rest)

        if self.alone:
            squeezed = pytree.tree_map(lambda leaf: leaf[0], arguments)
            return pytree.tree_map(lambda leaf: leaf[None], one(self.each, *squeezed))
        return vmap(one)(self.each, *arguments)


def _stacked(trees: Sequence[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _search(
    method: Inversion,
    task: Task,
    prior: Any,
    over: _Over,
    keys: Tensor,
    made: int,
    told: Callable[[float], None],
) -> tuple[Tensor, list[float]]:
    """Images (targets, searches times images each, k, c, h, w) of one group of searches, and its mean losses."""
    shapes: dict[str, tuple[int, ...]] = {}

    def begin(weights: Weights, facts: Tensors, key: Key) -> Any:
        candidate = method.start(Target(task, weights), prior, fold_in(key, "start"))
        shapes.update({name: tuple(value.shape) for name, value in candidate.items()})
        return method.optimizer.init(flatten(candidate))

    def project(flat: Tensor) -> Tensor:
        return flatten(method.project(unflatten(flat, shapes)))

    def step(weights: Weights, facts: Tensors, state: Any, key: Key) -> tuple[Any, Tensor]:
        target = Target(task, weights)

        def objective(flat: Tensor) -> Tensor:
            return method.loss(target, prior, facts, unflatten(flat, shapes), key)

        gradient, value = grad_and_value(objective)(method.optimizer.propose(state))
        # Optimizers of a fixed length do not look at the tick: it lets line searches of several trials share a clock.
        return method.optimizer.update(state, value, gradient, 0, project), value

    states = over(begin, keys, chunk=max(1, TOGETHER // method.initial))
    history: list[float] = []
    steps = keys.clone()
    for tick in range(method.steps):
        states, values = over(step, states, advance(steps.flatten(0, 1), tick).reshape(steps.shape))
        if tick % EVERY == 0 or tick == method.steps - 1:
            mean = float(values.mean())
            if not math.isfinite(mean):
                raise ModelError(f"the inversion's objective became {mean} at step {tick}; lower its lr.")
            if tick % EVERY == 0:
                history.append(mean)
            told((tick + 1) / method.steps)
    count = method.together or made

    def end(weights: Weights, facts: Tensors, state: Any, key: Key) -> Tensor:
        candidate = unflatten(method.optimizer.propose(state), shapes)
        return method.images(prior, candidate, count, fold_in(key, "images"))

    with torch.no_grad():
        images: Tensor = over(end, states, keys)
    return images.flatten(1, 2), history


def _kept(
    method: Inversion,
    target: Target,
    images: Tensor,
    samples: int,
    key: Key,
    losses: tuple[float, ...],
    searches: int,
    seconds: float,
) -> Inverted:
    """The images that the target is surest of, class by class; never chosen by anyone who knows more."""
    made, classes = images.shape[:2]
    labels = torch.arange(classes, device=images.device).expand(made, -1).flatten()
    flat = images.flatten(0, 1)
    sure = []
    with torch.no_grad():
        for begin in range(0, len(flat), _SLICE):
            part = slice(begin, begin + _SLICE)

            def confidence(seen: Tensor, own: Tensor = labels[part]) -> Tensor:
                return target.confidence(seen, own)

            sure.append(averaged(confidence, flat[part], method.views, fold_in(key, begin)))
    sureness = torch.cat(sure).reshape(made, classes).T
    order = sureness.argsort(dim=1, descending=True, stable=True)[:, :samples]
    place = torch.arange(classes, device=images.device)[:, None]
    chosen = images.transpose(0, 1)[place, order]
    return Inverted(chosen, sureness[place, order], losses, searches, seconds)
