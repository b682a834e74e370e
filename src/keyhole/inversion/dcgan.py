"""The prior of VMI: a DCGAN with spectral normalisation and a noisy discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from keyhole.core.told import Told, silent
from keyhole.core.types import Key
from keyhole.inversion.gan import GAN, Settings, at_least, usable
from keyhole.inversion.gan_training import Game, trained
from keyhole.inversion.losses import real_or_not
from keyhole.inversion.networks import Critic, dcgan_critic, dcgan_generator


@dataclass(frozen=True)
class DCGANSettings(Settings):
    """How `train_dcgan` trains: 32x32 images only.

    Args:
        noise: standard deviation of what is added to the discriminator's inputs, on the scale of [-1, 1]; at least 0.
    """

    latent: int = at_least(1, 50)
    critic: int = at_least(1, 1)
    noise: float = at_least(0, 0.1)

    @classmethod
    def lean(cls) -> DCGANSettings:
        """A quarter of the width and a tenth of the steps."""
        return cls(steps=5000, width=16)


def train_dcgan(
    public: Tensor, settings: DCGANSettings, key: Key, *, folder: Path | None = None, told: Told = silent
) -> GAN:
    """A DCGAN with spectral normalisation and noisy discriminator: the prior of variational model inversion.

    Binary cross-entropy, the generator's not saturating: L_D = -log P(x) - log(1 - P(G(z))), L_G = -log P(G(z)), and
    noise of N(0, 0.1^2) on all that the discriminator reads.

    Args:
        public: images (n, c, 32, 32) in [0, 1] that the attacker has, on the device to train on.
        settings: how to train.
        key: the training's randomness, initial weights too.
        folder: where trainings are kept, by default `keyhole.solve.files.cache_folder`.
        told: progress.

    Raises:
        DataError: the images are too few, of another size, or not in [0, 1].
        ModelError: training diverged.
        StoreError: the folder cannot be written to.

    Reference: Wang et al., "Variational Model Inversion Attacks", NeurIPS 2021, https://arxiv.org/abs/2201.10787, and
    its code; Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative
    Adversarial Networks", ICLR 2016, https://arxiv.org/abs/1511.06434.
    """
    game = _DCGAN(usable(public, settings.batch, sides=(32,)), settings, key)
    return trained("dcgan", game, {}, folder, told)


class _DCGAN(Game):
    low = -1.0

    def networks(self, shape: tuple[int, int, int]) -> tuple[nn.Module, Critic]:
        latent, width = self.settings.latent, self.settings.width
        return dcgan_generator(shape[0], latent=latent, width=width), dcgan_critic(shape[0], width=width)

    def against(self, step: int) -> Tensor:
        real, fake = 2.0 * self.draws.images("real", step) - 1.0, self.fakes(step)
        # BatchNorm couples a batch, so real and generated images have a pass each.
        return real_or_not(self._read(real, "noise on real", step), True) + real_or_not(
            self._read(fake, "noise on generated", step), False
        )

    def fool(self, step: int) -> Tensor:
        return real_or_not(self._read(self.tries(step), "noise for the generator", step), True)

    def _read(self, images: Tensor, purpose: str, step: int) -> Tensor:
        said: Tensor = self.discriminator(images + self.settings.noise * self.draws.noise(purpose, step, images))
        return said
