"""How much two samples depend on each other, by their kernels: pure functions of batches that lift and differentiate.

Both samples have one row for each example, paired by position, (m, ...); rows are flattened. All is computed in
float64, as centred kernels of similar rows are small differences of large numbers, and returned in the first sample's
type. One example depends on nothing: every measure is 0 for m = 1, and where all rows of a sample are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-5
"""eps of `nhsic`, for each row."""

SMALLEST_MEDIAN = 0.01

Kernel = Callable[[Tensor], Tensor]
"""Rows (m, d), float64, to their kernel matrix (m, m)."""

Measure = Callable[[Tensor, Tensor, Kernel, Kernel], Tensor]
"""Two samples and their kernels to a scalar."""


def gaussian(sigma: float = 5.0) -> Kernel:
    """``exp(-D / (2 sigma^2 d))`` of squared distances D between rows of d entries: a width for each entry.

    Args:
        sigma: above 0, in units of one entry; or 0 for ``exp(-D / (2 s^2))`` with s the median of D over the pairs of
            the sample stacked on itself, at least 0.01. That s is a squared length already, and half as many pairs as
            rows are of a row with itself: so it is in the public code of HSIC bottlenecks. No gradient goes through s.

    Source: Ma, Lewis and Kleijn, "The HSIC Bottleneck", AAAI 2020, https://arxiv.org/abs/1908.01580, section 3.
    """

    def kernel(rows: Tensor) -> Tensor:
        distances = squared_distances(rows)
        if sigma > 0:
            return torch.exp(-distances / (2.0 * sigma**2 * rows.shape[1]))
        return torch.exp(-distances / (2.0 * _stacked_median(distances.detach()).square()))

    return kernel


def linear(rows: Tensor) -> Tensor:
    """Inner products."""
    return rows @ rows.T


def nhsic(a: Tensor, b: Tensor, kernel_a: Kernel | None = None, kernel_b: Kernel | None = None) -> Tensor:
    """Normalised HSIC, in [0, m - 1]: ``trace(R_a R_b)`` with ``R = K (K + eps m I)^-1`` of centred kernels K.

    Args:
        a: one sample, (m, ...).
        b: the other, (m, ...).
        kernel_a: of a; by default Gaussian with sigma 5.
        kernel_b: of b; likewise.

    Source: Fukumizu, Gretton, Sun and Schoelkopf, "Kernel Measures of Conditional Dependence", NeurIPS 2007. The
    public code centres kernels from one side only and inverts in float32; the trace is the same, and here systems are
    solved in float64.
    """

    def whitened(rows: Tensor, kernel: Kernel | None) -> Tensor:
        centred = _centred(rows, kernel)
        count = centred.shape[0]
        ridge = RIDGE * count * torch.eye(count, dtype=centred.dtype, device=centred.device)
        return torch.linalg.solve(centred + ridge, centred)

    return (whitened(a, kernel_a) * whitened(b, kernel_b).T).sum().to(a.dtype)


def coco(a: Tensor, b: Tensor, kernel_a: Kernel | None = None, kernel_b: Kernel | None = None) -> Tensor:
    """Constrained covariance as BiDO's code has it: ``sqrt(|K_a K_b|) / m`` of centred kernels, Frobenius norm.

    Args: as of `nhsic`.

    Source: Gretton et al., "Kernel Constrained Covariance for Dependence Measurement", AISTATS 2005. Differs: there it
    is the largest singular value in place of the Frobenius norm, which is never below it.
    """
    one, two = _centred(a, kernel_a), _centred(b, kernel_b)
    return (_fourth_root((one @ two).square().sum()) / one.shape[0]).to(a.dtype)


MEASURES: dict[str, Measure] = {"hsic": nhsic, "coco": coco}
"""By the names that defenses give them; "hsic" is the normalised one."""


def squared_distances(rows: Tensor) -> Tensor:
    """Squared Euclidean distances between rows (m, d), (m, m), exactly 0 for rows that are the same."""
    # Around the first row: what all rows have in common would cost digits. Without the diagonal's rounding.
    moved = rows - rows[:1]
    products = moved @ moved.T
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - products - products.T).clamp(min=0.0)


def _stacked_median(distances: Tensor) -> Tensor:
    """Median over the pairs of the sample stacked on itself."""
    count = 2 * distances.shape[0]
    rows, columns = torch.tril_indices(count, count, -1, device=distances.device)
    ordered = distances.repeat(2, 2)[rows, columns].sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2.0
    return middle.clamp(min=SMALLEST_MEDIAN)


def _centred(sample: Tensor, kernel: Kernel | None) -> Tensor:
    """The kernel matrix of a sample, each row and column with mean 0."""
    matrix = (kernel or gaussian())(sample.reshape(sample.shape[0], -1).double())
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def _fourth_root(value: Tensor) -> Tensor:
    """With a gradient of zero, not NaN, at zero."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0) ** 0.25, 0.0)
