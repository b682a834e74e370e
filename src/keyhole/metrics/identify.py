"""Identification: does a reconstruction single out the secret among many candidates?"""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH_CANDIDATES = 1000
"""Below this the rate says little, and the runner leaves it out."""


def identified(guess: Tensor, truth: Tensor, candidates: Tensor) -> Tensor:
    """Whether each truth is nearer to its guess than every candidate is, by squared pixel error.

    Args:
        guess: (b, c, h, w) pixels, matched to ``truth``.
        truth: (b, c, h, w) pixels.
        candidates: (n, c, h, w) pixels of other images.

    Returns:
        (b,) of 0 or 1. A tie counts as not identified.
    """
    flat = guess.flatten(1)
    own = (flat - truth.flatten(1)).square().sum(1)
    # Differences, not the faster product form, whose rounding would decide ties.
    exact = "donot_use_mm_for_euclid_dist"
    others = torch.cdist(flat, candidates.flatten(1).to(flat.dtype), compute_mode=exact).square().amin(1)
    return (own < others).to(guess.dtype)
