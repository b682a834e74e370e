"""Randomly transformed copies of images, as pure functions that lift."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from keyhole.core.keys import fold_in, uniform
from keyhole.core.types import Key

SCALE = 0.1
"""A copy shows between 1 - SCALE and 1 of each side."""
ANGLE = math.radians(10)
"""Largest rotation."""


def transformed(images: Tensor, key: Key) -> Tensor:
    """A random crop, enlarged and turned a little, of each image.

    Each image is scaled by a factor of [1, 1/(1 - SCALE)], shifted so that the crop stays inside, and turned by up to
    `ANGLE` either way; bilinear, with edges repeated.

    Args:
        images: (n, c, h, w).
        key: the draws.

    Returns:
        Images of the same shape; gradients flow back.
    """
    count = images.shape[0]
    draws = uniform(key, (4, count), images.dtype).to(images.device)
    scale = 1.0 - SCALE * draws[0]
    shift_x, shift_y = (2 * draws[1] - 1) * (1 - scale), (2 * draws[2] - 1) * (1 - scale)
    angle = (2 * draws[3] - 1) * ANGLE
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    # By hand rather than by `affine_grid`, which does not lift. Pixel centres, in [-1, 1].
    x, y = (
        ((2 * torch.arange(side, device=images.device, dtype=images.dtype) + 1) / side - 1)
        for side in (images.shape[3], images.shape[2])
    )
    x, y = x[None, None, :], y[None, :, None]
    cos, sin, shift_x, shift_y = (value[:, None, None] for value in (cos, sin, shift_x, shift_y))
    grid = torch.stack([cos * x - sin * y + shift_x, sin * x + cos * y + shift_y], -1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def averaged(score: Callable[[Tensor], Tensor], images: Tensor, views: int, key: Key) -> Tensor:
    """The mean of ``score`` over ``views`` transformed copies of each image, or its value at the images themselves.

    Averaging the score of copies averages its gradient, which removes what only a fixed grid of pixels sees (AlignMI,
    NeurIPS 2025, transformation-averaged gradients).

    Args:
        score: images (m, c, h, w) to a number each (m,); called with copies of ``images`` only.
        images: (n, c, h, w).
        views: copies of each image; 0 takes the images as they are.
        key: the draws.

    Returns:
        A number for each image, (n,).
    """
    if views == 0:
        return score(images)
    return torch.stack([score(transformed(images, fold_in(key, view))) for view in range(views)]).mean(0)
