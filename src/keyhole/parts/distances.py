"""Distances between a simulated and an observed update, both dictionaries of tensors. Lower is closer.

Each takes the squared norm of the observed update as its third argument: it does not change while an attack runs, so
the attack works it out once, where every evaluation would read the whole update again.
"""

from __future__ import annotations

from torch import Tensor

from keyhole.core.tensors import dot, map_tensors, safe_norm, squared_norm
from keyhole.core.types import Tensors

_TINY = 1e-30


def relative_l2(simulated: Tensors, observed: Tensors, observed_square: Tensor) -> Tensor:
    """Squared distance over the observed squared norm: ``|s - o|^2 / |o|^2``, a scalar.

    DLG and iDLG (Zhu et al. 2019, arXiv 1906.08935; Zhao et al. 2020, arXiv 2001.02610) minimise the numerator alone.
    Norms of gradients span four orders of magnitude over random networks, and absolute tolerances end the small
    ones too early; the quotient makes one tolerance fit all.
    """
    difference = map_tensors(lambda s, o: s - o, simulated, observed)
    return squared_norm(difference) / (observed_square + _TINY)


def cosine(simulated: Tensors, observed: Tensors, observed_square: Tensor) -> Tensor:
    """One minus the cosine of the angle between the two as vectors over all tensors, in [0, 2].

    Inverting Gradients (Geiping et al. 2020, arXiv 2003.14053, equation 4): one angle for all layers together.
    """
    return 1.0 - dot(simulated, observed) / (safe_norm(simulated) * observed_square.sqrt() + _TINY)
