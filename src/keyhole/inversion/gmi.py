"""GMI: search the latent space of a GAN of public images for each class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import INVERSIONS
from keyhole.core.types import Candidate, Key, Tensors
from keyhole.errors import ConfigError, check_range
from keyhole.inversion.gan import GAN, usable
from keyhole.inversion.hsic import Dependence, HsicName
from keyhole.inversion.identity import IdentityName, flat, identity_loss, public_features
from keyhole.inversion.wgan_gp import WassersteinSettings, train_wgan_gp
from keyhole.solve.optimizers import Nesterov, Optimizer

Z = "z"


@INVERSIONS.add(name="gmi", paper="Zhang et al. 2020", arxiv="1911.07135")
@dataclass(frozen=True)
class GMI(Inversion):
    """Generative model inversion: the latent vector whose image critic and target both accept.

    For each class y the search minimises, over z in [-1, 1]^d and by Nesterov's momentum,
    ``-D(G(z)) + weight * L(T(G(z)), y)``: G and D are a WGAN-GP trained on public images alone, L is the identity loss.

    Args:
        steps: steps of a search, at least 1 (1500 in the authors' code, 2000 in FedInverse's).
        lr: step size of each latent vector, above 0. The authors' code takes the mean over all classes of a batch, so
            that its step shrinks with their number; here it is a sum: their 1e-2 over 5 classes (MNIST) is 2e-3.
        weight: of the identity loss, at least 0.
        identity: ``cross_entropy``, or ``logit`` (LOMMA), ``max_margin`` (PLG-MI), ``poincare`` (PPA).
        initial: latent vectors drawn for each class, from which the search starts at the one the target is surest of
            (PPA's initial selection), at least 1.
        final: times more searches than images asked for, of which those are kept that the target is surest of (PPA's
            final selection), at least 1.
        views: randomly transformed copies that the identity loss averages over (AlignMI); 0: the image as it is.
        together: images of each class in one search. They only meet in the HSIC term.
        hsic: FedInverse's dependence term: ``none``, ``faithful`` or ``diversity``; see `keyhole.inversion.hsic`.
        hsic_weight: its weight; `None` takes that of the preset.
        gan_steps: steps of the critic; the generator takes one for five of them.
        gan_width: channels next to the image; 64 in the authors' code.
        gan_batch: images in a step of the GAN.
        gan_lr: its rate for Adam.

    Reference: Zhang, Jia, Pei, Wang, Li and Song, "The Secret Revealer: Generative Model-Inversion Attacks Against Deep
    Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.07135.

    Differs from the authors' code: a sum over classes instead of a mean; every search is an image of the answer, where
    their MNIST script keeps the best of five by the target's logit (that is ``final = 5``).
    """

    steps: int = 1500
    lr: float = 2e-3
    weight: float = 100.0
    identity: IdentityName = "cross_entropy"
    initial: int = 1
    final: int = 1
    views: int = 0
    together: int = 1
    hsic: HsicName = "none"
    hsic_weight: float | None = None
    gan_steps: int = 53_500
    gan_width: int = 64
    gan_batch: int = 64
    gan_lr: float = 2e-4
    optimizer: Optimizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("steps", "initial", "final", "together"):
            check_range(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("weight", self.weight, 0)
        check_range("views", self.views, 0)
        if 1 < self.initial < self.together:
            raise ConfigError(
                f"initial is {self.initial}, fewer than the {self.together} images of a search; raise it."
            )
        self._gan()
        self._dependence().check(self.together)
        object.__setattr__(self, "optimizer", Nesterov(self.lr))

    def _gan(self) -> WassersteinSettings:
        return WassersteinSettings(steps=self.gan_steps, width=self.gan_width, batch=self.gan_batch, lr=self.gan_lr)

    def _dependence(self) -> Dependence:
        return Dependence.preset(self.hsic, self.hsic_weight)

    def check(self, public: Tensor) -> None:
        """Images that a GAN can be trained on, at least a batch of them."""
        usable(public, self.gan_batch)

    def prepare(self, target: Target, public: Tensor, key: Key, place: Place, before: Any = None) -> GAN:
        """A WGAN-GP of the public images; the target plays no part."""
        return train_wgan_gp(public, self._gan(), key, folder=place.folder, told=place.told)

    def infer(self, target: Target, prior: GAN, public: Tensor) -> Tensors:
        """The target's features of public images, where the identity loss wants them."""
        return public_features(target, public) if self.identity == "logit" else {}

    def start(self, target: Target, prior: GAN, key: Key) -> Candidate:
        """Normal latent vectors (together, k, d), the likeliest of `initial` for each."""
        latent = prior.generator.latent
        if self.initial == 1:
            return {Z: normal(key, (self.together, target.classes, latent))}
        # Ranked as they will be after the first step: what lies outside the box would change.
        drawn = normal(key, (self.initial, latent)).clamp(-1.0, 1.0)
        confidence = torch.softmax(target.logits(prior.generator(drawn)), -1)
        return {Z: drawn[confidence.topk(self.together, dim=0).indices]}

    def loss(self, target: Target, prior: GAN, facts: Tensors, candidate: Candidate, key: Key) -> Tensor:
        """Critic, identity and dependence, summed over images."""
        made = self.images(prior, candidate, self.together, key)
        images, labels = flat(made)
        realism = -prior.discriminator(images).sum()
        identity = identity_loss(self.identity, target, facts, images, labels, self.views, fold_in(key, "views"))
        return realism + self.weight * identity + len(images) * self._dependence()(made)

    def project(self, candidate: Candidate) -> Candidate:
        """Latent vectors clamped to [-1, 1], as in the authors' code."""
        return {Z: candidate[Z].clamp(-1.0, 1.0)}

    def images(self, prior: GAN, candidate: Candidate, count: int, key: Key) -> Tensor:
        """G(z), (together, k, c, h, w)."""
        z = candidate[Z]
        made = prior.generator(z.flatten(0, 1))
        return made.reshape(*z.shape[:2], *made.shape[1:])
