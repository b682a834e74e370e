"""L-BFGS against closed forms, the two-loop recursion and the dense BFGS matrix; and what it does with bad steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from keyhole.core.keys import fold_in, new_key, normal
from keyhole.solve.lbfgs import LBFGS, LBFGSState

KEY = new_key(8)
N = 20
BASIS = torch.linalg.qr(normal(fold_in(KEY, "basis"), (N, N), torch.float64)).Q
HESSIAN = BASIS @ torch.diag(torch.logspace(0, 2, N, dtype=torch.float64)) @ BASIS.T
CENTRE = normal(fold_in(KEY, "centre"), (N,), torch.float64)
START = normal(fold_in(KEY, "start"), (N,), torch.float64)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (x - CENTRE) @ HESSIAN @ (x - CENTRE)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def logarithmic(x: Tensor) -> Tensor:
    """Zero at 1, NaN below 0; a Newton step from anywhere above 2 ends below 0."""
    return (x - x.log() - 1).sum()


def same(x: Tensor) -> Tensor:
    return x


class Path:
    """A run with everything that was evaluated."""

    def __init__(
        self, optimizer: LBFGS, objective: Callable[[Tensor], Tensor], x: Tensor, ticks: int, first: int = 0
    ) -> None:
        self.state = optimizer.init(x)
        self.values: list[float] = []
        self.accepted: list[tuple[Tensor, Tensor]] = []
        self.kept: list[bool] = []
        for tick in range(first, first + ticks):
            point = optimizer.propose(self.state)
            gradient, value = grad_and_value(objective)(point)
            self.state = optimizer.update(self.state, value, gradient, tick, same)
            took = torch.equal(self.state.x, point) and bool(value.isfinite())
            self.values.append(float(value))
            self.kept.append(took)
            if took:
                self.accepted.append((point.clone(), gradient.clone()))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Differences along the accepted points, oldest first, unscaled."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.accepted, self.accepted[1:], strict=False)]


def dense_direction(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """By the BFGS update of a full inverse Hessian (Nocedal and Wright, equation 6.17)."""
    s, y = pairs[-1]
    inverse = (s @ y) / (y @ y) * torch.eye(len(s), dtype=torch.float64)
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = torch.eye(len(s), dtype=torch.float64) - rho * torch.outer(s, y)
        inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
    return -inverse @ gradient


def two_loop_direction(state: LBFGSState, slot: int) -> Tensor:
    """By Nocedal and Wright, algorithm 7.4, from the stored pairs; the last was written to ``slot``."""
    m = state.s.shape[0]
    order = [(slot + 1 + i) % m for i in range(m)]
    order = [i for i in order if state.valid[i] > 0]
    q, alphas = state.gradient.clone(), {}
    for i in reversed(order):
        alphas[i] = state.s[i] @ q / (state.s[i] @ state.y[i])
        q = q - alphas[i] * state.y[i]
    newest_s, newest_y = state.s[order[-1]], state.y[order[-1]]
    r = (newest_s @ newest_y) / (newest_y @ newest_y) * q
    for i in order:
        beta = state.y[i] @ r / (state.s[i] @ state.y[i])
        r = r + (alphas[i] - beta) * state.s[i]
    return -r


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-10


def test_a_quadratic_is_minimised_at_its_closed_form() -> None:
    path = Path(LBFGS(history=30), quadratic, START, 150)
    assert torch.allclose(path.state.x, CENTRE, atol=1e-9)
    assert float(path.state.value) < 1e-18


def test_ten_dimensional_rosenbrock_is_solved_in_a_few_hundred_evaluations() -> None:
    x = torch.tensor([-1.2, 1.0] * 5).double()
    path = Path(LBFGS(history=30), rosenbrock, x, 300)
    assert min(path.values) < 1e-10
    assert torch.allclose(path.state.x, torch.ones(10).double(), atol=1e-4)


@pytest.mark.parametrize("ticks", [2, 3, 7, 15])
@pytest.mark.parametrize("objective", [quadratic, rosenbrock])
def test_the_direction_is_that_of_the_dense_bfgs_matrix(objective: Callable[[Tensor], Tensor], ticks: int) -> None:
    path = Path(LBFGS(history=30), objective, START, ticks)
    assert path.kept[-1]
    pairs = [(s, y) for s, y in path.pairs() if s @ y > 1e-6 * s.norm() * y.norm()]
    assert len(pairs) == int(path.state.valid.sum()) > 0
    assert close(path.state.direction, dense_direction(pairs, path.state.gradient))


@pytest.mark.parametrize("ticks", [4, 5, 6, 13, 27])
def test_after_the_ring_wraps_only_the_newest_pairs_count(ticks: int) -> None:
    path = Path(LBFGS(history=5), quadratic, START, ticks)
    assert all(path.kept)
    assert int(path.state.valid.sum()) == min(5, ticks - 1)
    assert close(path.state.direction, dense_direction(path.pairs()[-5:], path.state.gradient))


@pytest.mark.parametrize("ticks", range(2, 60, 3))
def test_the_direction_is_that_of_the_two_loop_recursion_with_empty_slots_between(ticks: int) -> None:
    x = torch.linspace(0.05, 6.0, N).double()
    path = Path(LBFGS(history=8), logarithmic, x, ticks)
    if not path.kept[-1] or not path.state.valid.any():
        return
    assert close(path.state.direction, two_loop_direction(path.state, (ticks - 1) % 8))


def test_the_path_does_not_depend_on_where_in_the_ring_it_begins() -> None:
    a, b = (Path(LBFGS(history=12), rosenbrock, START[:6], 25, first) for first in (0, 7))
    assert torch.allclose(a.state.x, b.state.x, rtol=1e-9)


def test_stored_pairs_are_scaled_and_consistent() -> None:
    state = Path(LBFGS(history=6), quadratic, START, 16).state
    assert torch.allclose((state.s * state.y).sum(1), torch.ones(6).double(), rtol=1e-10)
    assert torch.allclose(state.sy.triu(1), (state.s @ state.y.T).triu(1), atol=1e-10)
    assert torch.allclose(state.yy, state.y @ state.y.T, rtol=1e-10, atol=1e-10)
    newest = 15 % 6
    expected = float(state.s[newest] @ state.y[newest] / (state.y[newest] @ state.y[newest]))
    assert float(state.gamma) == pytest.approx(expected, rel=1e-10)


def test_the_slope_is_the_directional_derivative_and_points_down() -> None:
    for ticks in (1, 2, 10, 25):
        state = Path(LBFGS(history=30), rosenbrock, START, ticks).state
        if int(state.tries) == 0:
            assert float(state.slope) == pytest.approx(float(state.gradient @ state.direction), rel=1e-10)
        assert float(state.slope) < 0


def test_the_first_step_follows_the_gradient_and_is_short() -> None:
    state = Path(LBFGS(), quadratic, START, 1).state
    gradient = HESSIAN @ (START - CENTRE)
    assert torch.allclose(state.direction, -gradient / gradient.abs().sum(), rtol=1e-10)
    near = CENTRE + 1e-6 * START
    state = Path(LBFGS(), quadratic, near, 1).state
    assert torch.allclose(state.direction, -HESSIAN @ (near - CENTRE), rtol=1e-8)


def test_a_step_to_where_there_is_no_number_is_rejected_and_recovered_from() -> None:
    path = Path(LBFGS(history=10), logarithmic, torch.linspace(0.05, 6.0, N).double(), 150)
    assert any(math.isnan(v) for v in path.values), "the test must meet NaN"
    assert min(v for v in path.values if v == v) < 1e-12
    assert not bool(path.state.stuck)
    for name, leaf in path.state._asdict().items():
        assert bool(leaf.isfinite().all()), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rejected_step_is_shortened_along_the_same_line(bad: float) -> None:
    optimizer = LBFGS(history=10)
    before = Path(optimizer, quadratic, START, 4).state
    point, direction = before.x.clone(), before.direction.clone()
    lengths = [1.0]
    state = before
    for tick in range(4, 8):
        state = optimizer.update(state, torch.tensor(bad).double(), torch.full((N,), bad).double(), tick, same)
        assert torch.equal(state.x, point)
        assert torch.equal(state.direction, direction)
        lengths.append(float(state.step))
    assert all(0.1 - 1e-12 <= b / a <= 0.5 + 1e-12 for a, b in zip(lengths, lengths[1:], strict=False))
    assert int(state.tries) == 4
    assert not bool(state.stuck)


def test_a_finite_rise_is_shortened_to_the_minimum_of_the_parabola() -> None:
    optimizer = LBFGS(history=10)
    state = Path(optimizer, quadratic, START, 4).state
    value = 4 * state.value
    # The parabola with value f, slope b at 0 and height 4 f at 1.
    b, c = float(state.slope), float(value - state.value - state.slope)
    after = optimizer.update(state, value, torch.ones(N).double(), 4, same)
    assert float(after.step) == pytest.approx(min(max(-b / (2 * c), 0.1), 0.5), rel=1e-10)


def test_the_objective_may_rise_by_the_cap_and_no_further() -> None:
    optimizer = LBFGS(history=10, cap=2.0)
    for factor, taken in ((1.9, True), (2.1, False)):
        state = Path(optimizer, quadratic, START, 3).state
        point = optimizer.propose(state)
        after = optimizer.update(state, factor * state.value, state.gradient * 0.5, 3, same)
        assert torch.equal(after.x, point) == taken


def test_steps_beyond_the_radius_are_rejected() -> None:
    optimizer = LBFGS(history=10, radius=2.0)
    points: list[Tensor] = []
    state = optimizer.init(torch.zeros(3).double())
    for tick in range(40):
        point = optimizer.propose(state)
        gradient, value = grad_and_value(lambda x: ((x - 10.0) ** 2).sum())(point)
        state = optimizer.update(state, value, gradient, tick, same)
        points.append(state.x)
    assert float(torch.stack(points).abs().max()) <= 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_stuck_at_once(bad: float) -> None:
    path = Path(LBFGS(history=5), lambda x: x.sum() * bad, START, 1)
    assert bool(path.state.stuck)


def test_no_way_down_without_memory_is_stuck_after_the_allowed_tries() -> None:
    optimizer = LBFGS(history=40, max_tries=12)
    state = Path(optimizer, quadratic, START, 1).state
    bad = (torch.tensor(math.inf).double(), torch.full((N,), math.nan).double())
    for tick in range(1, 13):
        assert not bool(state.stuck)
        state = optimizer.update(state, *bad, tick, same)
    assert bool(state.stuck)


@pytest.mark.parametrize("history", [100, 13, 12, 5])
def test_no_way_down_with_memory_drops_it_and_tries_the_gradient(history: int) -> None:
    optimizer = LBFGS(history=history, max_tries=12)
    state = Path(optimizer, quadratic, START, 10).state
    assert bool(state.valid.any())
    steepest = -state.gradient / state.gradient.abs().sum().clamp(min=1)
    bad = (torch.tensor(math.inf).double(), torch.full((N,), math.nan).double())
    for tick in range(10, 22):
        state = optimizer.update(state, *bad, tick, same)
    assert not bool(state.stuck), "a quasi-Newton direction failed; the gradient has not been tried"
    assert not bool(state.valid.any())
    assert torch.allclose(state.direction, steepest, rtol=1e-12)
    assert float(state.step) == 1
    for tick in range(22, 34):
        state = optimizer.update(state, *bad, tick, same)
    assert bool(state.stuck)


def test_a_restart_empties_the_memory() -> None:
    optimizer = LBFGS(history=10)
    state = optimizer.restart(Path(optimizer, rosenbrock, START, 15).state, CENTRE)
    assert not bool(state.valid.any())
    assert bool(state.fresh)
    again, fresh = state, optimizer.init(CENTRE)
    for tick in range(15, 40):
        again, fresh = (
            optimizer.update(s, *reversed(grad_and_value(quadratic)(optimizer.propose(s))), tick, same)
            for s in (again, fresh)
        )
        assert torch.allclose(again.x, fresh.x, rtol=1e-10, atol=1e-13)
        assert torch.allclose(again.direction, fresh.direction, rtol=1e-8, atol=1e-12)


def test_nothing_happens_at_a_minimum() -> None:
    path = Path(LBFGS(history=5), quadratic, CENTRE, 10)
    assert torch.equal(path.state.x, CENTRE)
    assert path.values == [0.0] * 10
    assert not bool(path.state.stuck)


def test_lifted_equals_looped_while_trials_are_in_different_phases() -> None:
    optimizer = LBFGS(history=8)
    starts = torch.stack([torch.linspace(0.05, top, N).double() for top in (0.9, 3.0, 6.0, 12.0)])

    def step(state: Any, tick: int) -> Any:
        gradient, value = grad_and_value(logarithmic)(optimizer.propose(state))
        return optimizer.update(state, value, gradient, tick, same)

    lifted = pytree.tree_map(torch.clone, vmap(optimizer.init)(starts))
    looped = [optimizer.init(x) for x in starts]
    phases: set[tuple[int, ...]] = set()
    for tick in range(30):
        lifted = vmap(lambda s, tick=tick: step(s, tick))(lifted)
        looped = [step(s, tick) for s in looped]
        # Not the pairs: their scaling blows up the last bits once a trial has arrived.
        for name in ("x", "value", "gradient", "direction", "step", "tries", "fresh", "stuck"):
            each = torch.stack([getattr(s, name) for s in looped])
            assert torch.allclose(getattr(lifted, name).double(), each.double(), rtol=1e-10, atol=1e-10), (name, tick)
        phases.add(tuple(int(s.tries) for s in looped))
    assert any(len(set(tries)) > 1 for tries in phases), "the trials must be in different phases"
