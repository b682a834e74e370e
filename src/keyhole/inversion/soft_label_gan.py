"""The prior of KED-MI: a GAN whose discriminator also learns what the target says of public images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from keyhole.core.told import Told, silent
from keyhole.core.types import Key
from keyhole.errors import ConfigError, ModelError
from keyhole.inversion.gan import GAN, Settings, at_least, usable
from keyhole.inversion.gan_training import Game, trained
from keyhole.inversion.losses import feature_gap, soft_label_loss, total_entropy
from keyhole.inversion.networks import Critic, inversion_generator, soft_label_critic


@dataclass(frozen=True)
class SoftLabelSettings(Settings):
    """How `train_soft_label_gan` trains. 53,500 steps are 100 passes over 34,265 images.

    Args:
        kernels: features that minibatch discrimination adds, at least 1.
        kernel_size: numbers that each of them compares, at least 1.
        entropy: weight of the summed entropy in the generator's loss, at least 0.
    """

    kernels: int = at_least(1, 64)
    kernel_size: int = at_least(1, 50)
    entropy: float = at_least(0, 1e-4)

    @classmethod
    def lean(cls) -> SoftLabelSettings:
        """Half the width, a twentieth of the minibatch discrimination and a tenth of the steps."""
        return cls(steps=5000, width=32, kernels=32, kernel_size=8)


def train_soft_label_gan(
    public: Tensor,
    target_logits: Callable[[Tensor], Tensor],
    target_digest: str,
    num_classes: int,
    settings: SoftLabelSettings,
    key: Key,
    *,
    begin: GAN | None = None,
    folder: Path | None = None,
    told: Told = silent,
) -> GAN:
    """A GAN whose discriminator also learns what the target says of public images: the prior of KED-MI.

    The discriminator's loss is `keyhole.inversion.losses.soft_label_loss` on three batches that are shuffled apart, the
    generator's the gap of mean features plus 1e-4 times the summed entropy of softmax D(G(z)).

    Args:
        public: images (n, c, h, w) in [0, 1] that the attacker has, 32x32 or 64x64, on the device to train on.
        target_logits: what the attacked network makes of pixels, (n, k). It must be a pure function, so in eval mode;
            it is asked once for each public image.
        target_digest: names the attacked network; trainings for the same one are found again by it.
        num_classes: k.
        settings: how to train.
        key: the training's randomness, initial weights too.
        begin: networks to begin with instead of fresh ones, such as those of an earlier round.
        folder: where trainings are kept, by default `keyhole.solve.files.cache_folder`.
        told: progress.

    Raises:
        ConfigError: the networks to begin with are of another size.
        DataError: the images are too few, of another size, or not in [0, 1].
        ModelError: training diverged, or the target gives something else than k finite logits.
        StoreError: the folder cannot be written to.

    Reference: Chen et al., "Knowledge-Enriched Distributional Model Inversion Attacks", ICCV 2021,
    https://arxiv.org/abs/2010.04092. In the authors' code the target is in train mode: its labels come from the batch's
    statistics and its own running statistics drift. Here it is in eval mode, and its labels are computed beforehand.
    """
    game = _SoftLabel(usable(public, settings.batch), target_logits, num_classes, settings, key, begin)
    also = {"target": target_digest, "classes": num_classes, "begin": begin.digest() if begin else None}
    return trained("soft_label", game, also, folder, told)


class _SoftLabel(Game):
    def __init__(
        self,
        public: Tensor,
        target_logits: Callable[[Tensor], Tensor],
        num_classes: int,
        settings: SoftLabelSettings,
        key: Key,
        begin: GAN | None,
    ) -> None:
        self._target = target_logits
        self._classes = num_classes
        self._labels: Tensor | None = None
        super().__init__(public, settings, key)
        if begin is not None:
            try:
                self.generator.load_state_dict(begin.generator.module.state_dict())
                self.discriminator.load_state_dict(begin.discriminator.module.state_dict())
            except RuntimeError as error:
                raise ConfigError("the GAN to begin with has other networks than the settings ask for.") from error

    def networks(self, shape: tuple[int, int, int]) -> tuple[nn.Module, Critic]:
        own = self.settings
        return inversion_generator(shape, latent=own.latent, width=own.width), soft_label_critic(
            shape, self._classes, width=own.width, kernels=own.kernels, kernel_size=own.kernel_size
        )

    def labels(self) -> Tensor:
        """What the target thinks of the public images, (n, k)."""
        if self._labels is None:
            with torch.no_grad():
                logits = torch.cat([self._target(images) for images in torch.split(self.public, 256)])
            if logits.shape != (len(self.public), self._classes) or not torch.isfinite(logits).all():
                raise ModelError(
                    f"the target gives {tuple(logits.shape)} for {len(self.public)} images; finite logits of "
                    f"{self._classes} classes are needed."
                )
            self._labels = torch.softmax(logits, dim=1)
        return self._labels

    def against(self, step: int) -> Tensor:
        which = self.draws.which("labelled", step)
        # Features are of one image, so three batches share a pass; the head looks at one batch at a time.
        batches = torch.cat([self.public[which], self.draws.images("unlabelled", step), self.fakes(step)])
        logits = [self.discriminator.head(part) for part in self.discriminator.features(batches).chunk(3)]
        return soft_label_loss(self.labels()[which], *logits)

    def fool(self, step: int) -> Tensor:
        with torch.no_grad():
            real = self.discriminator.features(self.draws.images("unlabelled for the generator", step))
        features = self.discriminator.features(self.tries(step))
        logits = self.discriminator.head(features)
        return feature_gap(features, real) + self.settings.entropy * total_entropy(logits)
