"""Which reconstruction stands for which secret: one assignment on one declared cost, under which all metrics follow."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(guesses: Tensor, truths: Tensor) -> Tensor:
    """For each truth the index of its guess, one to one, with the least total squared pixel error.

    Args:
        guesses: (r, c, h, w) pixels, r >= b.
        truths: (b, c, h, w) pixels.

    Returns:
        int64 (b,), all different. Guesses that are not finite are taken last.
    """
    if guesses.shape[0] < truths.shape[0]:
        raise ValueError(f"{guesses.shape[0]} guesses cannot stand for {truths.shape[0]} secrets")
    difference = guesses[None].double() - truths[:, None].double()
    cost = torch.nan_to_num(difference.square().flatten(2).mean(2), nan=1e9, posinf=1e9)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns[rows.argsort()], dtype=torch.int64, device=guesses.device)
