"""L-BFGS that lifts: state, line search, memory and failure belong to one trial.

Differs from `torch.optim.LBFGS` in what gradient inversion needs. One evaluation a call, so that trials in different
phases of their line search advance together. A loose acceptance rule (the objective may grow up to a factor ``cap``),
which solves more problems than the Armijo rule does. Steps that leave a box far around the images, or give no finite
value, count as rejected instead of ending the run. Curvature pairs are scaled to s.y = 1, so nothing underflows
as steps become small. The direction comes from the compact representation (Byrd, Nocedal and Schnabel 1994,
https://doi.org/10.1007/BF01582063, theorem 2.2), which is a few matrix products where the two-loop recursion is a
chain of 2 m dependent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keyhole.errors import check_range
from keyhole.solve.optimizers import Project


class LBFGSState(NamedTuple):
    """State of one trial; n unknowns, m remembered pairs. The ring buffers are written in place."""

    x: Tensor
    """Last accepted point, (n,)."""
    value: Tensor
    gradient: Tensor
    direction: Tensor
    step: Tensor
    """Step length being tried along the direction."""
    slope: Tensor
    """Directional derivative at x, negative."""
    tries: Tensor
    """Rejected steps along this direction."""
    s: Tensor
    """Position differences, (m, n), scaled so that s.y = 1."""
    y: Tensor
    """Gradient differences, (m, n), scaled likewise."""
    sy: Tensor
    """s y^T, (m, m), by slot."""
    yy: Tensor
    """y y^T, (m, m), by slot."""
    valid: Tensor
    """Which slots hold a pair, (m,)."""
    gamma: Tensor
    """Initial inverse curvature."""
    plain: Tensor
    """The direction is the scaled gradient, not one that the memory gave."""
    fresh: Tensor
    """Nothing has been evaluated since the start."""
    stuck: Tensor
    """No step from here reduces the objective, or the start itself is not finite."""


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS for one trial.

    Args:
        history: number m of remembered pairs.
        cap: a step is accepted when the objective is at most this many times the last accepted one. The objective
            must not be negative.
        max_tries: rejected steps along one direction before the memory is dropped.
        radius: steps that put any unknown beyond this absolute value are rejected.
        curvature: least cosine between s and y for a pair to be remembered.
    """

    history: int = 100
    cap: float = 2.0
    max_tries: int = 12
    radius: float = 50.0
    curvature: float = 1e-6

    def __post_init__(self) -> None:
        check_range("history", self.history, 1)

    def init(self, x: Tensor) -> LBFGSState:
        """An empty memory at ``x`` of shape (n,)."""
        n, m = x.shape[0], self.history
        scalar = x.new_zeros(())
        no = torch.zeros((), dtype=torch.bool, device=x.device)
        return LBFGSState(
            x=x,
            value=scalar + float("inf"),
            gradient=torch.zeros_like(x),
            direction=torch.zeros_like(x),
            step=scalar + 1.0,
            slope=scalar.clone(),
            tries=torch.zeros((), dtype=torch.int64, device=x.device),
            s=x.new_zeros(m, n),
            y=x.new_zeros(m, n),
            sy=x.new_zeros(m, m),
            yy=x.new_zeros(m, m),
            valid=x.new_zeros(m),
            gamma=scalar + 1.0,
            plain=no.clone(),
            fresh=~no,
            stuck=no,
        )

    def restart(self, state: LBFGSState, x: Tensor) -> LBFGSState:
        """Another start in the same buffers: their contents stay, marked invalid."""
        return state._replace(
            x=x,
            value=torch.full_like(state.value, float("inf")),
            gradient=torch.zeros_like(x),
            direction=torch.zeros_like(x),
            step=torch.ones_like(state.step),
            tries=torch.zeros_like(state.tries),
            valid=torch.zeros_like(state.valid),
            gamma=torch.ones_like(state.gamma),
            plain=torch.zeros_like(state.plain),
            fresh=torch.ones_like(state.fresh),
            stuck=torch.zeros_like(state.stuck),
        )

    def propose(self, state: LBFGSState) -> Tensor:
        """The start itself, then a point along the direction."""
        return state.x + state.step * state.direction

    def update(self, state: LBFGSState, value: Tensor, gradient: Tensor, tick: int, project: Project) -> LBFGSState:
        """Accept the step and turn, or reject it and shorten it. ``project`` is not used: L-BFGS has no box.

        ``tick`` counts evaluations over all trials; its remainder by m is the ring slot written, the same for every
        trial, so a rejected step leaves an empty slot.
        """
        point = self.propose(state)
        finite = value.isfinite() & (point.abs().amax() <= self.radius)
        # Replaced before any arithmetic: zero times infinity would be NaN.
        value = torch.where(finite, value, float("inf"))
        gradient = torch.where(finite, gradient, 0.0)
        accept = finite & (state.fresh | (value <= self.cap * state.value))

        slot = tick % self.history
        s, y, valid, gamma = self._remember(state, accept, gradient, slot)
        x = torch.where(accept, point, state.x)
        here = torch.where(accept, gradient, state.gradient)
        fallback, fallback_slope = _steepest(here)
        direction, slope, good = self._direction(state, here, s, y, valid, gamma, tick)
        direction, slope = torch.where(good, direction, fallback), torch.where(good, slope, fallback_slope)

        shorter = self._shorten(state, value)
        tries = torch.where(accept, 0, state.tries + 1)
        exhausted = tries >= self.max_tries
        return state._replace(
            x=x,
            value=torch.where(accept, value, state.value),
            gradient=here,
            direction=torch.where(accept, direction, torch.where(exhausted, fallback, state.direction)),
            step=torch.where(accept | exhausted, 1.0, shorter),
            slope=torch.where(accept, slope, torch.where(exhausted, fallback_slope, state.slope)),
            tries=torch.where(exhausted, 0, tries),
            valid=torch.where(exhausted | (accept & ~good), 0.0, valid),
            gamma=gamma,
            fresh=state.fresh & ~accept,
            plain=torch.where(accept, ~good, exhausted | state.plain),
            stuck=(state.fresh & ~finite) | (exhausted & state.plain) | state.stuck,
        )

    def _remember(
        self, state: LBFGSState, accept: Tensor, gradient: Tensor, slot: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write the new pair into the ring (zeros where there is none) and return it with the valid mask and gamma."""
        s = state.step * state.direction
        y = gradient - state.gradient
        sy = s @ y
        usable = accept & ~state.fresh & (sy > self.curvature * s.norm() * y.norm())
        scale = torch.where(usable, torch.where(usable, sy, 1.0).rsqrt(), 0.0)
        s, y = s * scale, torch.where(usable, y, 0.0) * scale
        gamma = torch.where(usable, 1.0 / torch.where(usable, y @ y, 1.0), state.gamma)
        state.s[slot] = s
        state.y[slot] = y
        at_slot = torch.arange(self.history, device=s.device) == slot
        valid = torch.where(at_slot, usable.to(state.valid.dtype), state.valid)
        return s, y, valid, gamma

    def _direction(
        self, state: LBFGSState, gradient: Tensor, s: Tensor, y: Tensor, valid: Tensor, gamma: Tensor, tick: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the inverse Hessian times the gradient, its slope, and whether it leads down."""
        slot, used = tick % self.history, min(tick + 1, self.history)
        # Only the slots written so far are read: the update is bound by memory traffic.
        old_s, old_y = state.s[:used], state.y[:used]
        all_sy, all_yy = state.sy[:used, :used], state.yy[:used, :used]
        rows = torch.stack([gradient, y, s])
        # Long axis last on both operands: the other layouts are several times slower on a CPU.
        on_s, on_y = rows @ old_s.T, rows @ old_y.T
        all_sy[:, slot] = on_s[1]
        all_sy[slot, :] = on_y[2]
        all_yy[:, slot] = on_y[1]
        all_yy[slot, :] = on_y[1]
        roll = -(slot + 1)  # oldest pair first
        kept = valid[:used].roll(roll)
        both = kept[:, None] * kept[None, :]
        sy = all_sy.roll((roll, roll), (0, 1)) * both
        yy = all_yy.roll((roll, roll), (0, 1)) * both
        a, b = on_s[0].roll(roll) * kept, on_y[0].roll(roll) * kept
        # The unit diagonal of R is s.y = 1; an empty slot then has a zero right-hand side and stays inert.
        upper = sy.triu(diagonal=1)
        u = torch.linalg.solve_triangular(upper, a[:, None], upper=True, unitriangular=True)[:, 0]
        w = u + gamma * (yy @ u) - gamma * b
        p = torch.linalg.solve_triangular(upper.T, w[:, None], upper=False, unitriangular=True)[:, 0]
        # The second product is written row times matrix, for the same layout reason.
        step = p.roll(-roll)[None, :] @ old_s - gamma * (u.roll(-roll)[None, :] @ old_y)
        direction = -(gamma * gradient + step[0])
        slope = gradient @ direction
        return direction, slope, (valid > 0).any() & slope.isfinite() & (slope < 0)

    @staticmethod
    def _shorten(state: LBFGSState, value: Tensor) -> Tensor:
        """Minimum of the parabola through what is known, kept within a tenth and a half of the step."""
        rise = value - state.value - state.slope * state.step
        guess = -state.slope * state.step**2 / (2.0 * rise)
        guess = torch.where(guess.isfinite(), guess, 0.0)
        return torch.minimum(torch.maximum(guess, 0.1 * state.step), 0.5 * state.step)


def _steepest(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient step that moves the unknowns by at most 1 in sum, and its slope."""
    scale = 1.0 / gradient.abs().sum().clamp(min=1.0)
    direction = -gradient * scale
    return direction, gradient @ direction
