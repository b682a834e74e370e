"""Small GANs that train in a moment, for the tests of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyhole.core.keys import new_key, normal, uniform
from keyhole.inversion.dcgan import DCGANSettings, train_dcgan
from keyhole.inversion.gan import GAN
from keyhole.inversion.soft_label_gan import SoftLabelSettings, train_soft_label_gan
from keyhole.inversion.wgan_gp import WassersteinSettings, train_wgan_gp

torch.set_num_threads(1)

PUBLIC = uniform(new_key(9), (11, 1, 32, 32))
SMALL = {"batch": 4, "latent": 3, "width": 2}
WGAN = WassersteinSettings(steps=10, lr=1e-3, **SMALL)
SOFT = SoftLabelSettings(steps=10, lr=1e-3, kernels=3, kernel_size=2, **SMALL)
DC = DCGANSettings(steps=4, lr=1e-3, **SMALL)
TARGET = normal(new_key(8), (1024, 3)) / 8


def target(pixels: Tensor) -> Tensor:
    return pixels.flatten(1) @ TARGET


def wgan(folder: Path, **changed: Any) -> GAN:
    return train_wgan_gp(**{"public": PUBLIC, "settings": WGAN, "key": new_key(0), "folder": folder, **changed})


def soft(folder: Path, **changed: Any) -> GAN:
    given: dict[str, Any] = {
        "public": PUBLIC, "target_logits": target, "target_digest": "a", "num_classes": 3, "settings": SOFT,
        "key": new_key(0), "folder": folder,
    }  # fmt: skip
    return train_soft_label_gan(**{**given, **changed})


def dcgan(folder: Path, **changed: Any) -> GAN:
    return train_dcgan(**{"public": PUBLIC, "settings": DC, "key": new_key(0), "folder": folder, **changed})


TRAININGS: dict[str, Callable[..., GAN]] = {"wgan": wgan, "soft": soft, "dcgan": dcgan}


class Steps:
    """Counts the steps that were trained, and may interrupt."""

    def __init__(self, stop: int | None = None) -> None:
        self.fractions: list[float] = []
        self.stop = stop

    def __call__(self, what: str, fraction: float) -> None:
        self.fractions.append(fraction)
        if len(self.fractions) == self.stop:
            raise KeyboardInterrupt


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path
