"""Lift a function of one trial over many trials.

A thin layer over `torch.func.vmap` that adds two things. Leaves that all trials share (a network's weights, say) stay
unlifted, which keeps a convolution a convolution instead of a grouped one; they are recognised by identity. And `None`
leaves, where a threat model hides a field, pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree


class Shared:
    """The leaves of these trees are the same for every trial."""

    def __init__(self, *trees: Any) -> None:
        # The tensors are kept alive: an id may be reused once its owner is gone.
        self._leaves = [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]
        self._ids = {id(leaf) for leaf in self._leaves}

    def __contains__(self, leaf: object) -> bool:
        return id(leaf) in self._ids


def lift(fn: Callable[..., Any], shared: Shared) -> Callable[..., Any]:
    """``fn`` over a leading trial axis of every tensor leaf of its arguments, but for shared ones.

    Leaves of the result get the trial axis, unless they are shared leaves returned as they came.
    """

    def lifted(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        dims = tuple(0 if isinstance(leaf, Tensor) and leaf not in shared else None for leaf in leaves)
        kept: list[Any] = []
        out_spec: list[Any] = []

        def flat(*inner: Any) -> tuple[Tensor, ...]:
            out, out_tree = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(inner), spec)))
            out_spec[:] = [out_tree]
            kept[:] = [leaf if not isinstance(leaf, Tensor) or leaf in shared else _LIFTED for leaf in out]
            return tuple(leaf for leaf, keep in zip(out, kept, strict=True) if keep is _LIFTED)

        results = iter(vmap(flat, in_dims=dims)(*leaves))
        return pytree.tree_unflatten([next(results) if k is _LIFTED else k for k in kept], out_spec[0])

    return lifted


class _Lifted:
    pass


_LIFTED = _Lifted()


def stack(trees: Sequence[Any], shared: Shared) -> Any:
    """Trees of single trials as one tree with a leading trial axis; shared leaves stay as they are."""

    def join(*leaves: Any) -> Any:
        first = leaves[0]
        return first if not isinstance(first, Tensor) or first in shared else torch.stack(leaves)

    return pytree.tree_map(join, *trees)


def take(tree: Any, index: Tensor, shared: Shared) -> Any:
    """The trials at ``index`` of a lifted tree."""

    def pick(leaf: Any) -> Any:
        return leaf if not isinstance(leaf, Tensor) or leaf in shared else leaf[index]

    return pytree.tree_map(pick, tree)
