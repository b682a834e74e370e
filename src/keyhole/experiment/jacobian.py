"""How much of an input a function's value pins down near a point, without forming its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp

from keyhole.core.keys import new_key, normal

STEPS = 20
"""Lanczos steps, each one product with the Jacobian and one with its transpose."""


def singular_values(fn: Callable[[Tensor], Tensor], x: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Singular values of a Jacobian, as a few of them with the share of directions that each stands for.

    Lanczos quadrature on ``J^T J`` from one random direction: the k Ritz values, with the squared first components of
    the tridiagonal matrix's eigenvectors as shares, have the same moments up to 2k - 1 as the density of all n
    eigenvalues, up to the noise of one direction, about ``1 / sqrt(n)``.

    Args:
        fn: a function of one tensor to a vector, differentiable twice by `torch.func`.
        x: the point, n entries in all.
        steps: k, at least 1; fewer are taken where n is smaller or the Krylov space ends.

    Returns:
        Singular values, ascending, and shares that sum to 1; both float64 of shape (k,).

    Source: Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal.
    Appl. 38(4), 2017, https://doi.org/10.1137/16M1104974, section 3. Differences: one direction instead of an average
    over several, and full reorthogonalisation, twice.
    """
    value, back = vjp(fn, x)[:2]
    # J^T u is linear in u, so that its own transpose is J: no forward-mode derivatives, which fewer operations have.
    along = vjp(lambda u: back(u)[0], torch.zeros_like(value))[1]
    first = normal(new_key(0), (x.numel(),), torch.float64).to(x)
    basis = [first / first.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, x.numel())):
        q = basis[-1]
        w = back(along(q.reshape(x.shape))[0])[0].reshape(-1)
        diagonal.append(float(w @ q))
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        norm = float(w.norm())
        # What is left is rounding: the Krylov space holds all that this direction can tell.
        if norm <= 10 * torch.finfo(x.dtype).eps * max(diagonal):
            break
        beside.append(norm)
        basis.append(w / norm)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside[: len(diagonal) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0.0).sqrt(), vectors[0].square()


def pinned_share(fn: Callable[[Tensor], Tensor], x: Tensor, precision: float, error: float) -> float:
    """Share of the directions around ``x`` in which ``fn(x)`` leaves less freedom than ``error``.

    Whoever reproduces ``fn(x)`` up to ``precision * |fn(x)|`` has an error of at most ``precision |fn(x)| / s`` along a
    singular direction of value s. If the remaining difference is spread evenly over all n directions, each has
    ``1 / sqrt(n)`` of it; a direction counts as pinned down where ``precision |fn(x)| / (sqrt(n) s) <= error``.

    Args:
        fn: a function of one tensor to a vector.
        x: the point.
        precision: relative Euclidean distance that is left, above 0.
        error: error allowed in each entry of x, above 0.

    Returns:
        A share in [0, 1]. It says nothing beyond a neighbourhood of x: other inputs, far away, may give the same value.
    """
    values, shares = singular_values(fn, x)
    least = precision * float(fn(x).norm()) / (math.sqrt(x.numel()) * error)
    return float(shares[values >= least].sum().clamp(0.0, 1.0))
