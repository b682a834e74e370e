"""Distances between a simulated and an observed update, both dictionaries of tensors. Lower is closer.

Each takes the squared norm of the observed update as its third argument: it does not change while an attack runs, so
the attack works it out once, where every evaluation would read the whole update again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keyhole.core.tensors import dot, safe_norm
from keyhole.core.types import Tensors

_TINY = 1e-30


def relative_l2(simulated: Tensors, observed: Tensors, observed_square: Tensor) -> Tensor:
    """Squared distance over the observed squared norm: ``|s - o|^2 / |o|^2``, a scalar.

    DLG and iDLG (Zhu et al. 2019, arXiv 1906.08935; Zhao et al. 2020, arXiv 2001.02610) minimise the numerator alone.
    Norms of gradients span four orders of magnitude over random networks, and absolute tolerances end the small
    ones too early; the quotient makes one tolerance fit all.
    """
    differences = (simulated[name] - observed[name] for name in observed)
    total: Tensor = _SumOfSquares.apply(*differences)  # type: ignore[no-untyped-call]
    return total / (observed_square + _TINY)


class _SumOfSquares(torch.autograd.Function):
    """Sum of squares of all entries of some tensors, differentiable once.

    The differences are the largest tensors of an evaluation, and arithmetic on them waits for memory: this reads them
    once forward and once backward, where the gradient of a norm makes three passes, each with a copy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(tensor).square() for tensor in tensors]).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        twice = 2.0 * gradient
        return tuple(twice * tensor for tensor in ctx.saved_tensors)


def cosine(simulated: Tensors, observed: Tensors, observed_square: Tensor) -> Tensor:
    """One minus the cosine of the angle between the two as vectors over all tensors, in [0, 2].

    Inverting Gradients (Geiping et al. 2020, arXiv 2003.14053, equation 4): one angle for all layers together.
    """
    return 1.0 - dot(simulated, observed) / (safe_norm(simulated) * observed_square.sqrt() + _TINY)
