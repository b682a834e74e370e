"""Arithmetic on dictionaries of tensors, as pure functions that lift."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from keyhole.core.types import Tensors


def map_tensors(fn: Callable[..., Tensor], *trees: Tensors) -> Tensors:
    """Apply ``fn`` name by name; all arguments must have the names of the first."""
    return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Inner product over all entries of all tensors, a scalar."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def squared_norm(a: Tensors) -> Tensor:
    """Squared Euclidean norm over all entries of all tensors, a scalar."""
    # By way of the norm, which reads each tensor once and makes no copy of its squares; at zero its gradient is zero.
    return torch.stack([torch.linalg.vector_norm(tensor).square() for tensor in a.values()]).sum()


def size(a: Tensors) -> int:
    """Number of entries."""
    return sum(tensor.numel() for tensor in a.values())


def rms(a: Tensors) -> Tensor:
    """Root mean square over all entries of all tensors, a scalar."""
    return (squared_norm(a) / size(a)).sqrt()


def safe_norm(a: Tensors) -> Tensor:
    """Euclidean norm with a gradient of zero, not NaN, at zero."""
    square = squared_norm(a)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0.0)


def flatten(a: Tensors) -> Tensor:
    """All entries in one vector, in the dictionary's order."""
    return torch.cat([tensor.reshape(-1) for tensor in a.values()])


def unflatten(vector: Tensor, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """The inverse of `flatten` for the given shapes."""
    pieces = torch.split(vector, [math.prod(shape) for shape in shapes.values()])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
