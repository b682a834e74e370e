"""What a metric is: a number for each image, with a direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """Compares reconstructions with secrets, image by image, after one assignment.

    ``fn`` takes two image batches (b, c, h, w) in [0, 1], reconstruction first, and returns (b,).
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    higher_is_leakier: bool
    perfect: float
    """The value for equal images."""
    unit: str = ""

    def __call__(self, guess: Tensor, truth: Tensor) -> Tensor:
        """The metric of each pair, shape (b,)."""
        return self.fn(guess, truth)
