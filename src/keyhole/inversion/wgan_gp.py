"""The prior of GMI: a Wasserstein GAN with gradient penalty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from keyhole.core.keys import uniform
from keyhole.core.told import Told, silent
from keyhole.core.types import Key
from keyhole.inversion.gan import GAN, Settings, at_least, usable
from keyhole.inversion.gan_training import Game, trained
from keyhole.inversion.losses import gradient_penalty
from keyhole.inversion.networks import Critic, inversion_generator, wasserstein_critic


@dataclass(frozen=True)
class WassersteinSettings(Settings):
    """How `train_wgan_gp` trains. 53,500 steps are 100 passes over 34,265 images, as the paper's code does for digits.

    Args:
        penalty: weight of the gradient penalty, at least 0.
    """

    penalty: float = at_least(0, 10.0)

    @classmethod
    def lean(cls) -> WassersteinSettings:
        """Half the width and a fifth of the steps: about twenty minutes on one core."""
        return cls(steps=10_000, width=32)

    @classmethod
    def smoke(cls) -> WassersteinSettings:
        """Enough for digits of 8x8 pixels, enlarged: under a minute on one core."""
        return cls(steps=1500, batch=32, lr=4e-4, width=16)


def train_wgan_gp(
    public: Tensor, settings: WassersteinSettings, key: Key, *, folder: Path | None = None, told: Told = silent
) -> GAN:
    """A Wasserstein GAN with gradient penalty: the prior of generative model inversion, which no target has a say in.

    L_D = E[D(G(z))] - E[D(x)] + penalty E[(||d D(y) / dy|| - 1)^2] with y = x + a (G(z) - x), a uniform on [0, 1] for
    each example, and L_G = -E[D(G(z))], z from N(0, I).

    Args:
        public: images (n, c, h, w) in [0, 1] that the attacker has, 32x32 or 64x64, on the device to train on.
        settings: how to train.
        key: the training's randomness, initial weights too.
        folder: where trainings are kept, by default `keyhole.solve.files.cache_folder`.
        told: progress.

    Raises:
        DataError: the images are too few, of another size, or not in [0, 1].
        ModelError: training diverged.
        StoreError: the folder cannot be written to.

    Reference: Zhang et al., "The Secret Revealer: Generative Model-Inversion Attacks Against Deep Neural Networks",
    CVPR 2020, https://arxiv.org/abs/1911.07135, and its code; Gulrajani et al., "Improved Training of Wasserstein
    GANs", NeurIPS 2017, https://arxiv.org/abs/1704.00028. Steps are counted, where that code counts passes.
    """
    game = _Wasserstein(usable(public, settings.batch), settings, key)
    return trained("wgan_gp", game, {}, folder, told)


class _Wasserstein(Game):
    def networks(self, shape: tuple[int, int, int]) -> tuple[nn.Module, Critic]:
        latent, width = self.settings.latent, self.settings.width
        return inversion_generator(shape, latent=latent, width=width), wasserstein_critic(shape, width=width)

    def against(self, step: int) -> Tensor:
        real, fake = self.draws.images("real", step), self.fakes(step)
        along = uniform(self.draws.of("along", step), (len(real), 1, 1, 1)).to(real)
        # No example has a say in another's number, so both batches share one pass.
        said_real, said_fake = self.discriminator(torch.cat([real, fake])).chunk(2)
        penalty = gradient_penalty(self.discriminator, real + along * (fake - real))
        loss: Tensor = said_fake.mean() - said_real.mean() + self.settings.penalty * penalty
        return loss

    def fool(self, step: int) -> Tensor:
        said: Tensor = self.discriminator(self.tries(step))
        return -said.mean()
