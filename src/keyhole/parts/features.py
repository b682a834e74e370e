"""Distances between what a network sees of two images: the inputs of its head."""

from __future__ import annotations

import torch
from torch import Tensor

from keyhole.core.task import Task
from keyhole.core.types import Weights


def blank_features(task: Task, weights: Weights, like: Tensor) -> Tensor:
    """Features of mid-gray images, (b, m) for images like (b, c, h, w): what an image without content has."""
    return task.trace(weights, task.bounds.from_pixels(torch.full_like(like, 0.5))).features


def feature_distance(features: Tensor, wanted: Tensor, blank: Tensor) -> Tensor:
    """``|f - w|^2 / |w - b|^2`` of each image, 1 for features as far off as a blank image's: (b, m) each to (b,).

    Not over ``|w|^2``: behind sigmoids most of the features' norm is the same for all images, and unrelated ones would
    be 0.002 apart.
    """
    return (features - wanted).square().sum(-1) / ((wanted - blank).square().sum(-1) + 1e-12)
