"""Handwritten digits that come with scikit-learn, so that nothing is downloaded."""

from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TEST = 297
"""Images that no client has."""


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # they come sorted by writer
    return torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)[order]


def client_data(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
    """A client's own images and labels."""
    images, labels = _digits()
    return images[:-TEST][partition::partitions], labels[:-TEST][partition::partitions]


def test_data() -> tuple[Tensor, Tensor]:
    """The server's test images and labels."""
    images, labels = _digits()
    return images[-TEST:], labels[-TEST:]
