"""Generators of images and who tells them from public ones, as all attacks by model inversion search them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from keyhole.errors import DataError, check_range
from keyhole.inversion.networks import SIDES, Critic
from keyhole.solve.files import digest


@dataclass(frozen=True, eq=False)
class Generator:
    """Images of latent vectors; build one with `Generator.of`. Never changes, and lifts under `torch.func`."""

    module: nn.Module
    """A private copy in eval mode without gradients to its weights."""
    latent: int
    """Length of z."""
    low: float
    """What the module gives for black."""
    high: float
    """What it gives for white."""

    @classmethod
    def of(cls, module: nn.Module, latent: int, low: float = 0.0, high: float = 1.0) -> Generator:
        """A generator of a module from z (n, latent) to images in [low, high]."""
        return cls(_frozen(module), latent, low, high)

    def __call__(self, z: Tensor) -> Tensor:
        """Latent vectors (n, latent) as pixels in [0, 1], (n, c, h, w)."""
        images: Tensor = self.module(z)
        return (images - self.low) / (self.high - self.low)


@dataclass(frozen=True, eq=False)
class Discriminator:
    """What is said of images; build one with `Discriminator.of`. Never changes."""

    module: Critic
    """A private copy in eval mode without gradients to its weights."""
    low: float
    """What the module reads for black."""
    high: float
    """What it reads for white."""

    @classmethod
    def of(cls, module: Critic, low: float = 0.0, high: float = 1.0) -> Discriminator:
        """A discriminator of a module that reads images in [low, high]."""
        return cls(_frozen(module), low, high)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] (n, c, h, w) to a number each (n,), or to logits (n, k)."""
        said: Tensor = self.module(self._read(pixels))
        return said

    def features(self, pixels: Tensor) -> Tensor:
        """What the last layers see of each image, (n, f)."""
        seen: Tensor = self.module.features(self._read(pixels))
        return seen

    def _read(self, pixels: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * pixels


@dataclass(frozen=True)
class Facts:
    """How a training went."""

    steps: int
    """Steps of the discriminator."""
    losses: tuple[tuple[float, float], ...]
    """Of the discriminator and the generator, at each step of the generator."""
    seconds: float
    """What the training took, wherever and whenever it was done."""
    cached: bool
    """Whether all of it was done before."""


@dataclass(frozen=True, eq=False)
class GAN:
    """A trained generator, its discriminator, and how they were trained."""

    generator: Generator
    discriminator: Discriminator
    facts: Facts

    def digest(self) -> str:
        """Names the weights of both networks."""
        return digest(self.generator.module.state_dict(), self.discriminator.module.state_dict())


def _frozen(module: Any) -> Any:
    return copy.deepcopy(module).eval().requires_grad_(False)


def at_least(low: float, default: float) -> Any:
    """A setting that is at least ``low``."""
    return field(default=default, metadata={"low": low})


@dataclass(frozen=True)
class Settings:
    """What all trainings here share. The defaults are those of the papers' code for digits, at their cost.

    Args:
        steps: of the discriminator, at least 1.
        batch: images in a step, at least 2.
        lr: learning rate of Adam with betas (0.5, 0.999), for both networks, above 0.
        latent: length of z, at least 1.
        width: of both networks, at least 1.
        critic: steps of the discriminator for one of the generator, at least 1.
    """

    steps: int = at_least(1, 53_500)
    batch: int = at_least(2, 64)
    lr: float = field(default=2e-4, metadata={"low": 0, "open_low": True})
    latent: int = at_least(1, 100)
    width: int = at_least(1, 64)
    critic: int = at_least(1, 5)

    def __post_init__(self) -> None:
        for one in fields(self):
            check_range(one.name, getattr(self, one.name), **one.metadata)


def usable(public: Tensor, batch: int, sides: tuple[int, ...] = SIDES) -> Tensor:
    """Public images in float32; raises `DataError` where a GAN cannot be trained on them."""
    if public.dim() != 4 or len(public) == 0:
        raise DataError(f"a GAN needs public images (n, c, h, w); it was given {tuple(public.shape)}.")
    _, channels, height, width = public.shape
    if channels not in (1, 3) or height != width or height not in sides:
        accepted = " or ".join(f"{side}x{side}" for side in sides)
        raise DataError(f"the public images are {channels}x{height}x{width}; a GAN needs {accepted}, 1 or 3 channels.")
    if len(public) < batch:
        raise DataError(f"there are {len(public)} public images, fewer than one batch of {batch}.")
    if not bool(((public >= 0) & (public <= 1)).all()):  # also refuses NaN
        raise DataError("the public images must be pixels in [0, 1].")
    return public.float()
