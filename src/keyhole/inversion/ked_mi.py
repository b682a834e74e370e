"""KED-MI: a GAN that knows what the target thinks of public images, and a distribution of latents for each class."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import INVERSIONS
from keyhole.core.types import Candidate, Key, Tensors
from keyhole.errors import check_range
from keyhole.inversion.gan import GAN, usable
from keyhole.inversion.hsic import Dependence, HsicName
from keyhole.inversion.identity import IdentityName, flat, identity_loss, public_features
from keyhole.inversion.losses import surprise_of_real
from keyhole.inversion.soft_label_gan import SoftLabelSettings, train_soft_label_gan
from keyhole.solve.files import digest
from keyhole.solve.optimizers import Optimizer, adam

MEAN, LOG_VAR = "mean", "log_var"


@INVERSIONS.add(name="ked_mi", paper="Chen et al. 2021", arxiv="2010.04092")
@dataclass(frozen=True)
class KEDMI(Inversion):
    """Knowledge-enriched distributional model inversion: recover a Gaussian of latent vectors for each class.

    Minimises over mean and log-variance of each class y, one draw z a step, by Adam:
    ``-log P_D(real | G(z)) + weight * L(T(G(z)), y)``. G and D are a GAN whose discriminator has learned the target's
    own labels of public images, so that it is trained again for every attacked network. Its D sees the classes of a
    step as one batch.

    Args:
        steps: steps of the search, at least 1 (2400 in the authors' code, 5000 in FedInverse's).
        lr: of Adam, above 0.
        weight: of the identity loss, at least 0.
        log_var: where log-variances begin: 1 in the authors' code, 0 in FedInverse's.
        identity: ``cross_entropy``, or ``logit`` (LOMMA), ``max_margin`` (PLG-MI), ``poincare`` (PPA).
        final: times more draws than images asked for, of which those are kept that the target is surest of, at least 1.
        views: randomly transformed copies that the identity loss averages over (AlignMI); 0: the image as it is.
        hsic: FedInverse's dependence term, among the images of a step, one a class; ``none`` or ``faithful``.
        hsic_weight: its weight; `None` takes that of the preset.
        warm: whether the GAN goes on from that of the round attacked before.
        gan_steps: steps of the discriminator; the generator takes one for five of them.
        gan_warm_steps: the same where it goes on, at least 1; `None` takes ``gan_steps``.
        gan_width: channels next to the image; 64 in the authors' code.
        gan_batch: images in a step of the GAN.
        gan_lr: its rate for Adam.
        gan_kernels: features that minibatch discrimination adds; 64 in the authors' code.
        gan_kernel_size: numbers that each of them compares; 50 in the authors' code.

    Reference: Chen, Kahla, Jia and Qi, "Knowledge-Enriched Distributional Model Inversion Attacks", ICCV 2021,
    https://arxiv.org/abs/2010.04092.

    Differs from the authors' code: the target stays in eval mode while the GAN learns from it; losses are sums over
    classes (Adam does not notice). As there, latent vectors are not clamped, other than in GMI.
    """

    steps: int = 2400
    lr: float = 0.02
    weight: float = 100.0
    log_var: float = 1.0
    identity: IdentityName = "cross_entropy"
    final: int = 1
    views: int = 0
    hsic: HsicName = "none"
    hsic_weight: float | None = None
    warm: bool = True
    gan_steps: int = 53_500
    gan_warm_steps: int | None = None
    gan_width: int = 64
    gan_batch: int = 64
    gan_lr: float = 2e-4
    gan_kernels: int = 64
    gan_kernel_size: int = 50
    optimizer: Optimizer = field(init=False, repr=False)
    together: int = field(init=False, repr=False, default=0)
    per_target: bool = field(init=False, repr=False, default=True)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("final", self.final, 1)
        check_range("views", self.views, 0)
        check_range("weight", self.weight, 0)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("gan_warm_steps", self.gan_warm_steps or 1, 1)
        self._gan(warm=False)
        self._dependence().check(1)
        object.__setattr__(self, "optimizer", adam(self.lr))

    def _gan(self, warm: bool) -> SoftLabelSettings:
        steps = self.gan_warm_steps if warm and self.gan_warm_steps is not None else self.gan_steps
        return SoftLabelSettings(
            steps=steps, width=self.gan_width, batch=self.gan_batch, lr=self.gan_lr,
            kernels=self.gan_kernels, kernel_size=self.gan_kernel_size,
        )  # fmt: skip

    def _dependence(self) -> Dependence:
        return Dependence.preset(self.hsic, self.hsic_weight)

    def check(self, public: Tensor) -> None:
        """Images that a GAN can be trained on, at least a batch of them."""
        usable(public, self.gan_batch)

    def prepare(self, target: Target, public: Tensor, key: Key, place: Place, before: Any = None) -> GAN:
        """The GAN of public images as this target labels them."""
        begin: GAN | None = before if self.warm else None
        known = digest(target.weights.params, target.weights.buffers)
        trained = train_soft_label_gan(
            public, target.logits, known, target.classes, self._gan(begin is not None), key, begin=begin,
            folder=place.folder, told=place.told,
        )  # fmt: skip
        if begin is None:
            return trained
        whole = replace(
            trained.facts,
            steps=trained.facts.steps + begin.facts.steps,
            seconds=trained.facts.seconds + begin.facts.seconds,
        )
        return replace(trained, facts=whole)

    def infer(self, target: Target, prior: GAN, public: Tensor) -> Tensors:
        """The target's features of public images, where the identity loss wants them."""
        return public_features(target, public) if self.identity == "logit" else {}

    def start(self, target: Target, prior: GAN, key: Key) -> Candidate:
        """Mean 0 and the given log-variance, (k, d) each."""
        zero = torch.zeros(target.classes, prior.generator.latent, device=key.device)
        return {MEAN: zero, LOG_VAR: zero + self.log_var}

    def loss(self, target: Target, prior: GAN, facts: Tensors, candidate: Candidate, key: Key) -> Tensor:
        """Of one draw for each class."""
        made = self.images(prior, candidate, 1, fold_in(key, "z"))
        images, labels = flat(made)
        realism = surprise_of_real(prior.discriminator(images)) * target.classes
        identity = identity_loss(self.identity, target, facts, images, labels, self.views, fold_in(key, "views"))
        return realism + self.weight * identity + len(images) * self._dependence()(made)

    def images(self, prior: GAN, candidate: Candidate, count: int, key: Key) -> Tensor:
        """G of draws from each class's Gaussian, (count, k, c, h, w)."""
        mean = candidate[MEAN]
        z = mean + torch.exp(candidate[LOG_VAR] / 2) * normal(key, (count, *mean.shape))
        made = prior.generator(z.flatten(0, 1))
        return made.reshape(count, mean.shape[0], *made.shape[1:])
