"""First-order optimizers against torch.optim and closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from keyhole.core.keys import fold_in, new_key, normal
from keyhole.solve.optimizers import SGD, Adam, Constant, Cosine, StepDecay, adam, signed

KEY = new_key(4)
N = 7
MATRIX = normal(fold_in(KEY, "matrix"), (N, N), torch.float64)
START = normal(fold_in(KEY, "start"), (N,), torch.float64)


def bowl(x: Tensor) -> Tensor:
    return (MATRIX @ x).square().sum() + (x**4).sum() / 4


def same(x: Tensor) -> Tensor:
    return x


def trajectory(
    optimizer: Any, steps: int, objective: Callable[[Tensor], Tensor] = bowl, project: Callable[[Tensor], Tensor] = same
) -> Tensor:
    state = optimizer.init(START)
    points = []
    for tick in range(steps):
        gradient, value = grad_and_value(objective)(optimizer.propose(state))
        state = optimizer.update(state, value, gradient, tick, project)
        points.append(optimizer.propose(state))
    return torch.stack(points)


def torch_trajectory(make: Callable[..., torch.optim.Optimizer], steps: int, factor: Callable[[int], float]) -> Tensor:
    x = START.clone().requires_grad_()
    optimizer = make([x])
    rate = optimizer.param_groups[0]["lr"]
    points = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * factor(step)
        optimizer.zero_grad()
        bowl(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def step_decay(step: int) -> float:
    return 0.1 ** sum(step >= 40 * share for share in (3 / 8, 5 / 8, 7 / 8))


@pytest.mark.parametrize(("schedule", "factor"), [(Constant(), lambda step: 1.0), (StepDecay(40), step_decay)])
def test_adam_follows_torch(schedule: Any, factor: Callable[[int], float]) -> None:
    expected = torch_trajectory(lambda p: torch.optim.Adam(p, lr=0.1), 40, factor)
    assert torch.allclose(trajectory(adam(0.1, schedule), 40), expected, rtol=1e-12, atol=1e-13)


def test_adam_follows_torch_with_other_betas() -> None:
    expected = torch_trajectory(
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.8), eps=1e-3), 40, lambda step: 1.0
    )
    got = trajectory(Adam(0.05, beta1=0.5, beta2=0.8, epsilon=1e-3), 40)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("schedule", "factor"), [(Constant(), lambda step: 1.0), (StepDecay(40), step_decay)])
def test_sgd_follows_torch(momentum: float, schedule: Any, factor: Callable[[int], float]) -> None:
    expected = torch_trajectory(lambda p: torch.optim.SGD(p, lr=0.003, momentum=momentum), 40, factor)
    got = trajectory(SGD(0.003, momentum, schedule), 40)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [8, 40, 100, 4800])
def test_step_decay_takes_a_tenth_after_three_five_and_seven_eighths(steps: int) -> None:
    schedule = StepDecay(steps)
    for eighths, power in ((3, 1), (5, 2), (7, 3)):
        at = steps * eighths // 8
        assert float(schedule(torch.tensor(at - 1))) == pytest.approx(0.1 ** (power - 1), rel=1e-12)
        assert float(schedule(torch.tensor(at))) == pytest.approx(0.1**power, rel=1e-12)
    assert float(schedule(torch.tensor(0))) == 1


def test_cosine_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    schedule = Cosine(110, warmup=10)
    for step in range(10):
        assert float(schedule(torch.tensor(step))) == pytest.approx((step + 1) / 10, rel=1e-12)
    for step in range(10, 111):
        expected = 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert float(schedule(torch.tensor(step))) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert float(schedule(torch.tensor(500))) == pytest.approx(0, abs=1e-15)


def test_cosine_without_warm_up_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert float(Cosine(20)(torch.tensor(step))) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_signed_gives_only_the_sign() -> None:
    # Plain signed descent moves every unknown by exactly the rate.
    points = torch.cat([START[None], trajectory(signed(SGD(0.01)), 5)])
    assert torch.allclose(points.diff(dim=0).abs(), torch.full((5, N), 0.01).double(), rtol=1e-9)
    # A monotone change of the objective leaves the signs, and so the path, alone.
    one = trajectory(signed(adam(0.1)), 20)
    assert torch.allclose(one, trajectory(signed(adam(0.1)), 20, lambda x: 1e6 * bowl(x)), rtol=1e-12)
    x = START.clone().requires_grad_()
    reference = torch.optim.Adam([x], lr=0.1)
    for point in one:
        x.grad = torch.autograd.grad(bowl(x), x)[0].sign()
        reference.step()
        assert torch.allclose(point, x.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("optimizer", [SGD(0.01), adam(0.5), signed(adam(0.5))])
def test_every_point_is_projected(optimizer: Any) -> None:
    points = trajectory(optimizer, 30, project=lambda x: x.clamp(0.2, 0.3))
    assert float(points.min()) >= 0.2
    assert float(points.max()) <= 0.3


@pytest.mark.parametrize("optimizer", [SGD(0.01, 0.9), adam(0.1), signed(adam(0.1)), signed(SGD(0.1))])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_objective_that_is_not_finite_marks_the_trial_as_stuck(optimizer: Any, bad: float) -> None:
    state = optimizer.init(START)
    assert not bool(state.stuck)
    good = optimizer.update(state, torch.tensor(1.0).double(), torch.ones(N).double(), 0, same)
    assert not bool(good.stuck)
    value = optimizer.update(state, torch.tensor(bad).double(), torch.ones(N).double(), 0, same)
    assert bool(value.stuck)


@pytest.mark.parametrize("optimizer", [SGD(0.01, 0.9), adam(0.1, StepDecay(10)), signed(adam(0.1))])
def test_a_restart_is_a_new_start(optimizer: Any) -> None:
    state = optimizer.init(START + 1)
    for tick in range(5):
        gradient, value = grad_and_value(bowl)(optimizer.propose(state))
        state = optimizer.update(state, value, gradient, tick, same)
    again = optimizer.restart(state, START)
    for a, b in zip(again, optimizer.init(START), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [SGD(0.003, 0.9, Cosine(20, 5)), adam(0.1, StepDecay(20)), signed(adam(0.1))])
def test_lifted_steps_equal_looped_ones(optimizer: Any) -> None:
    starts = normal(KEY, (4, N), torch.float64)

    def run(x: Tensor) -> Tensor:
        state = optimizer.init(x)
        for tick in range(20):
            gradient, value = grad_and_value(bowl)(optimizer.propose(state))
            state = optimizer.update(state, value, gradient, tick, same)
        return state.x

    assert torch.allclose(vmap(run)(starts), torch.stack([run(x) for x in starts]), rtol=0, atol=1e-10)
