"""FedInverse's term: the dependence between two halves of the images that a search is making."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keyhole.errors import ConfigError, check_range
from keyhole.parts.dependence import gaussian, nhsic

HsicName = Literal["none", "faithful", "diversity"]
Grouping = Literal["halves", "within_class"]

_EACH = 4
"""Images of a class in each half that the term within classes needs."""


@dataclass(frozen=True)
class Dependence:
    """``weight * nHSIC(A, B)``, added to the mean loss of an image; rows of A and B are paired by their place.

    With ``halves`` A is the first half of all images and B the second, class after class, so that most pairs are of two
    classes; an odd last image is left out. With ``within_class`` it is the mean over classes of that of the class's own
    halves.

    The value grows with the distance between images until it saturates at ``m - 1`` for m pairs. Minimising it with a
    positive weight therefore rewards images that are alike, and a negative weight rewards diversity.

    Presets:
        none: no term.
        faithful: FedInverse's released code: halves, weight 0.05. (Its published commands switch the term off.)
        diversity: within classes, weight -0.5.

    Args:
        weight: any sign; 0 switches the term off.
        grouping: ``halves`` or ``within_class``.
        sigma: width of the Gaussian kernels, see `keyhole.parts.dependence.gaussian`.

    Source: FedInverse's public code (its paper was not available); the estimator is that of Ma et al. 2020,
    https://arxiv.org/abs/1908.01580. Differs: both kernels are centred from both sides, which leaves the value as it
    is, and linear systems are solved in float64.
    """

    weight: float = 0.0
    grouping: Grouping = "halves"
    sigma: float = 5.0

    def __post_init__(self) -> None:
        check_range("hsic_weight", self.weight)
        check_range("sigma", self.sigma, 0)

    @classmethod
    def preset(cls, name: HsicName, weight: float | None = None) -> Dependence:
        """By name, with another weight where one is given."""
        known = {"none": cls(), "faithful": cls(0.05, "halves"), "diversity": cls(-0.5, "within_class")}
        found = known[name]
        if weight is None:
            return found
        if name == "none":
            raise ConfigError('hsic_weight goes with hsic = "faithful" or "diversity".')
        return cls(weight, found.grouping, found.sigma)

    def check(self, together: int, option: str = "together") -> None:
        """Refuse groups too small for the term to mean anything; ``option`` is what their size is called."""
        if self.weight and self.grouping == "within_class" and together < 2 * _EACH:
            raise ConfigError(
                f"the hsic term compares images of one class, and a search makes {together} of each; set {option} "
                f"to {2 * _EACH} or more."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """The term, as it joins a mean over images; a sum over them takes it so many times.

        Args:
            images: (m, k, c, h, w), m of each class.
        """
        if self.weight == 0:
            return images.new_zeros(())
        return self.weight * _GROUPED[self.grouping](images, self.sigma)


def _halves(images: Tensor, sigma: float) -> Tensor:
    # Class after class for each image, as the released code stacks them.
    flat = images.flatten(0, 1)
    half = len(flat) // 2
    return nhsic(flat[:half], flat[half : 2 * half], gaussian(sigma), gaussian(sigma))


def _within_class(images: Tensor, sigma: float) -> Tensor:
    half = images.shape[0] // 2
    kernel = gaussian(sigma)
    return torch.func.vmap(lambda own: nhsic(own[:half], own[half : 2 * half], kernel, kernel), in_dims=1)(
        images
    ).mean()


_GROUPED: dict[str, Callable[[Tensor, float], Tensor]] = {"halves": _halves, "within_class": _within_class}
