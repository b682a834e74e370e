"""A loop of fixed length inside a client: for defenses that optimise before they send something."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from keyhole.solve.optimizers import Optimizer, Project


def minimise(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    optimizer: Optimizer,
    steps: int,
    *,
    project: Project = lambda x: x,
    stop: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take ``steps`` steps from ``x``. Written for one trial; lifts.

    Args:
        objective: a tensor like ``x`` to a scalar.
        x: where to begin, of any shape.
        optimizer: proposes iterates.
        steps: how many; 0 returns ``x``.
        project: the nearest admissible point, on flat vectors; applied after each step.
        stop: asked at each iterate, before its step, whether to stay there for good; a boolean scalar.

    Returns:
        The last iterate, and how many steps were taken before it stopped, a scalar.
    """
    shape = x.shape
    state = optimizer.init(x.flatten())
    stopped = torch.zeros((), dtype=torch.bool, device=x.device)
    taken = torch.zeros((), dtype=torch.int64, device=x.device)
    for tick in range(steps):
        here = optimizer.propose(state)
        gradient, value = grad_and_value(lambda flat: objective(flat.reshape(shape)))(here)
        moved = optimizer.update(state, value, gradient, tick, project)
        if stop is not None:
            stopped = stopped | stop(here.reshape(shape))
            moved = pytree.tree_map(partial(torch.where, stopped), state, moved)
        state = moved
        taken = taken + (~stopped).long()
    final: Tensor = state.x
    return final.reshape(shape), taken
