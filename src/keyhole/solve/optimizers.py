"""Optimizers as pure functions of a vector, one evaluation at a time.

An optimizer proposes a point; whoever owns the loop evaluates the objective there and tells it; it answers with its
next state. Asking for one evaluation at a time is what lets a line search lift: at any moment one trial may be
shortening its step while another takes a new direction. All of it is written for one trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Project = Callable[[Tensor], Tensor]
"""The nearest admissible point, on flat vectors."""


class Optimizer(Protocol):
    """What the engine asks of an optimizer. States are named tuples of tensors with a boolean ``stuck``."""

    def init(self, x: Tensor) -> Any:
        """The state at a start point of shape (n,)."""
        ...

    def restart(self, state: Any, x: Tensor) -> Any:
        """The state at another start point; large buffers may be the same objects, marked empty."""
        ...

    def propose(self, state: Any) -> Tensor:
        """Where to evaluate next, (n,)."""
        ...

    def update(self, state: Any, value: Tensor, gradient: Tensor, tick: int, project: Project) -> Any:
        """The state after learning the objective and its gradient at the proposed point.

        The objective is infinite where it or its gradient is not finite.
        """
        ...


class Schedule(Protocol):
    """A factor on the learning rate as a function of the step, counted from 0."""

    def __call__(self, step: Tensor) -> Tensor:
        """The factor at ``step``."""
        ...


@dataclass(frozen=True)
class Constant:
    """No schedule."""

    def __call__(self, step: Tensor) -> Tensor:
        """Always 1."""
        return torch.ones_like(step, dtype=torch.float64)


@dataclass(frozen=True)
class StepDecay:
    """A tenth of the rate after 3/8, 5/8 and 7/8 of the steps (Geiping et al. 2020, arXiv 2003.14053, their code)."""

    steps: int

    def __call__(self, step: Tensor) -> Tensor:
        """1, 0.1, 0.01 or 0.001."""
        passed = torch.stack([step >= self.steps * eighths // 8 for eighths in (3, 5, 7)]).sum(0)
        return torch.pow(0.1, passed.double())


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to 0, after a linear warm-up."""

    steps: int
    warmup: int = 0

    def __call__(self, step: Tensor) -> Tensor:
        """A factor in [0, 1]."""
        rise = (step.double() + 1) / max(self.warmup, 1)
        done = ((step - self.warmup).double() / max(self.steps - self.warmup, 1)).clamp(0, 1)
        return torch.where(step < self.warmup, rise, 0.5 * (1 + torch.cos(math.pi * done)))


class FirstOrderState(NamedTuple):
    """State of `SGD`, `Nesterov` and `Adam`."""

    x: Tensor
    step: Tensor
    momentum: Tensor
    square: Tensor
    stuck: Tensor


class _FirstOrder:
    """What optimizers with a `FirstOrderState` share: all but the step."""

    def init(self, x: Tensor) -> FirstOrderState:
        """Zero moments."""
        return _first_order(x)

    def restart(self, state: FirstOrderState, x: Tensor) -> FirstOrderState:
        """The same as a new start."""
        return _first_order(x)

    def propose(self, state: FirstOrderState) -> Tensor:
        """The current point."""
        return state.x


@dataclass(frozen=True)
class SGD(_FirstOrder):
    """Gradient descent with momentum: v <- m v + g; x <- x - lr v."""

    lr: float
    momentum: float = 0.0
    schedule: Schedule = field(default_factory=Constant)

    def update(
        self, state: FirstOrderState, value: Tensor, gradient: Tensor, tick: int, project: Project
    ) -> FirstOrderState:
        """One step; an objective that is not finite marks the trial as stuck."""
        velocity = self.momentum * state.momentum + gradient
        rate = (self.lr * self.schedule(state.step)).to(gradient.dtype)
        x = project(state.x - rate * velocity)
        bad = ~value.isfinite()
        return FirstOrderState(x, state.step + 1, velocity, state.square, bad)


@dataclass(frozen=True)
class Nesterov(_FirstOrder):
    """Nesterov's momentum in terms of the looked-ahead point: v' <- m v - lr g; x <- x - m v + (1 + m) v'; project.

    Sutskever et al. 2013 with a change of variables; the update of GMI's released code (Zhang et al. 2020, arXiv
    1911.07135).
    """

    lr: float
    momentum: float = 0.9

    def update(
        self, state: FirstOrderState, value: Tensor, gradient: Tensor, tick: int, project: Project
    ) -> FirstOrderState:
        """One step; an objective that is not finite marks the trial as stuck."""
        velocity = self.momentum * state.momentum - self.lr * gradient
        x = project(state.x - self.momentum * state.momentum + (1 + self.momentum) * velocity)
        return FirstOrderState(x, state.step + 1, velocity, state.square, ~value.isfinite())


@dataclass(frozen=True)
class Adam(_FirstOrder):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""

    lr: float
    schedule: Schedule = field(default_factory=Constant)
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def update(
        self, state: FirstOrderState, value: Tensor, gradient: Tensor, tick: int, project: Project
    ) -> FirstOrderState:
        """One step; an objective that is not finite marks the trial as stuck."""
        count = (state.step + 1).double()
        first = self.beta1 * state.momentum + (1 - self.beta1) * gradient
        second = self.beta2 * state.square + (1 - self.beta2) * gradient * gradient
        rate = (self.lr * self.schedule(state.step) / (1 - self.beta1**count)).to(gradient.dtype)
        correction = (1 - self.beta2**count).to(gradient.dtype)
        x = project(state.x - rate * first / ((second / correction).sqrt() + self.epsilon))
        bad = ~value.isfinite()
        return FirstOrderState(x, state.step + 1, first, second, bad)


def _first_order(x: Tensor) -> FirstOrderState:
    zero = torch.zeros_like(x)
    return FirstOrderState(
        x,
        torch.zeros((), dtype=torch.int64, device=x.device),
        zero,
        zero.clone(),
        torch.zeros((), dtype=torch.bool, device=x.device),
    )


@dataclass(frozen=True)
class Signed:
    """Gives another optimizer only the sign of each partial derivative, as adversarial attacks do."""

    inner: Optimizer

    def init(self, x: Tensor) -> Any:
        """The inner state."""
        return self.inner.init(x)

    def restart(self, state: Any, x: Tensor) -> Any:
        """The inner state."""
        return self.inner.restart(state, x)

    def propose(self, state: Any) -> Tensor:
        """The inner proposal."""
        return self.inner.propose(state)

    def update(self, state: Any, value: Tensor, gradient: Tensor, tick: int, project: Project) -> Any:
        """The inner step on the sign."""
        return self.inner.update(state, value, gradient.sign(), tick, project)


def adam(lr: float, schedule: Schedule | None = None) -> Adam:
    """`Adam` with the usual betas."""
    return Adam(lr, schedule or Constant())


def signed(inner: Optimizer) -> Signed:
    """`Signed` around an optimizer."""
    return Signed(inner)
