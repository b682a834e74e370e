"""VMI: for each class a distribution of latents that trades the target's belief against the generator's prior."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import INVERSIONS
from keyhole.core.types import Candidate, Key, Tensors
from keyhole.errors import check_range
from keyhole.inversion.dcgan import DCGANSettings, train_dcgan
from keyhole.inversion.gan import GAN, usable
from keyhole.inversion.hsic import Dependence, HsicName
from keyhole.inversion.identity import IdentityName, flat, identity_loss, public_features
from keyhole.inversion.posteriors import Flow, Gaussian, Posterior
from keyhole.solve.optimizers import SGD, Optimizer


@INVERSIONS.add(name="vmi", paper="Wang et al. 2021", arxiv="2201.10787")
@dataclass(frozen=True)
class VMI(Inversion):
    """Variational model inversion: a Gaussian or a flow over the latent vectors of each class.

    Minimises for each class y over a distribution q that begins near N(0, I)
    ``weight * E_q[L(T(G(z)), y)] + kl * KL(q || N(0, I))``, by the mean of some draws a step. G is a DCGAN of public
    images; its discriminator has no say. With weight 1 and the cross-entropy the best q of all is the posterior
    proportional to ``p_T(y | G(z))^(1 / kl) N(z; 0, I)``.

    Args:
        posterior: ``gaussian`` (full covariance) or ``flow``; see `keyhole.inversion.posteriors`.
        steps: steps of the search, at least 1 (31 passes of 10,000 draws are 9,700 in the authors' code).
        draws: draws of each class in a step, at least 1 (32 in the authors' code).
        lr: of gradient descent with momentum 0.9, above 0. The authors' 1e-4 is for their thousands of steps; some
            hundreds need about 0.1 for the Gaussian and 0.01 to 0.03 for the flow.
        kl: weight of the divergence, at least 0.
        weight: of the identity loss, at least 0.
        identity: ``cross_entropy``, or ``logit`` (LOMMA), ``max_margin`` (PLG-MI), ``poincare`` (PPA).
        final: times more draws than images asked for, of which those are kept that the target is surest of, at least 1.
        views: randomly transformed copies that the identity loss averages over (AlignMI); 0: the image as it is.
        hsic: FedInverse's dependence term, between two halves of a class's draws: ``none``, or ``faithful`` (0.05) or
            ``diversity`` (-0.5), which differ in weight alone here; see `keyhole.inversion.hsic`.
        hsic_weight: its weight; `None` takes that of the preset.
        flow_steps: steps of each level of the flow, at least 1.
        flow_levels: its levels, at least 1; 2 to their power is at most ``gan_latent``.
        flow_hidden: width of its couplings, at least 1.
        gan_steps: steps of the DCGAN, of both networks.
        gan_latent: length of z, at least 1.
        gan_width: its channels are 2, 4 and 8 times that; 10 in the MNIST script of BiDO.
        gan_batch: images in a step of the GAN.
        gan_lr: its rate for Adam.

    Reference: Wang, Fu, Li, Khisti, Zemel and Makhzani, "Variational Model Inversion Attacks", NeurIPS 2021,
    https://arxiv.org/abs/2201.10787.

    Differs from the authors' code: the classes share a search, each with its own tensors; no label smoothing (their
    default); one generator, where their StyleGAN has a distribution for each of its layers; no early stop.
    """

    posterior: Literal["gaussian", "flow"] = "gaussian"
    steps: int = 9_700
    draws: int = 32
    lr: float = 1e-4
    kl: float = 1e-3
    weight: float = 1.0
    identity: IdentityName = "cross_entropy"
    final: int = 1
    views: int = 0
    hsic: HsicName = "none"
    hsic_weight: float | None = None
    flow_steps: int = 10
    flow_levels: int = 3
    flow_hidden: int = 100
    gan_steps: int = 53_500
    gan_latent: int = 50
    gan_width: int = 64
    gan_batch: int = 64
    gan_lr: float = 2e-4
    optimizer: Optimizer = field(init=False, repr=False)
    together: int = field(init=False, repr=False, default=0)
    family: Posterior = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "final"):
            check_range(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0, open_low=True)
        for name in ("kl", "weight", "views"):
            check_range(name, getattr(self, name), 0)
        self._gan()
        self._dependence().check(self.draws, "draws")
        object.__setattr__(self, "family", self._family())
        object.__setattr__(self, "optimizer", SGD(self.lr, 0.9))

    def _family(self) -> Posterior:
        if self.posterior == "gaussian":
            return Gaussian(self.gan_latent)
        return Flow(self.gan_latent, self.flow_steps, self.flow_levels, self.flow_hidden)

    def _gan(self) -> DCGANSettings:
        return DCGANSettings(
            steps=self.gan_steps, latent=self.gan_latent, width=self.gan_width, batch=self.gan_batch, lr=self.gan_lr
        )

    def _dependence(self) -> Dependence:
        # The authors attack one class at a time, so that their halves are halves of a class.
        return replace(Dependence.preset(self.hsic, self.hsic_weight), grouping="within_class")

    def check(self, public: Tensor) -> None:
        """32x32 images, at least a batch of them."""
        usable(public, self.gan_batch, sides=(32,))

    def prepare(self, target: Target, public: Tensor, key: Key, place: Place, before: GAN | None = None) -> GAN:
        """A DCGAN of the public images; the target plays no part."""
        return train_dcgan(public, self._gan(), key, folder=place.folder, told=place.told)

    def infer(self, target: Target, prior: GAN, public: Tensor) -> Tensors:
        """The target's features of public images, where the identity loss wants them."""
        return public_features(target, public) if self.identity == "logit" else {}

    def start(self, target: Target, prior: GAN, key: Key) -> Candidate:
        """The distribution of each class, near N(0, I); all tensors begin with the axis of classes."""
        return vmap(self.family.start)(torch.stack([fold_in(key, place) for place in range(target.classes)]))

    def loss(self, target: Target, prior: GAN, facts: Tensors, candidate: Candidate, key: Key) -> Tensor:
        """A mean over draws and a sum over classes."""
        made = self.images(prior, candidate, self.draws, fold_in(key, "z"))
        images, labels = flat(made)
        identity = identity_loss(self.identity, target, facts, images, labels, self.views, fold_in(key, "views"))
        noise = self._noise(candidate, self.draws, fold_in(key, "divergence"))
        divergence = vmap(self.family.divergence, in_dims=(0, 1))(candidate, noise).sum()
        return self.weight * identity / self.draws + self.kl * divergence + target.classes * self._dependence()(made)

    def images(self, prior: GAN, candidate: Candidate, count: int, key: Key) -> Tensor:
        """G of draws from each class's distribution, (count, k, c, h, w)."""
        noise = self._noise(candidate, count, key)
        z = vmap(self.family.draw, in_dims=(0, 1), out_dims=1)(candidate, noise)
        made = prior.generator(z.flatten(0, 1))
        return made.reshape(*z.shape[:2], *made.shape[1:])

    def _noise(self, candidate: Candidate, count: int, key: Key) -> Tensor:
        """Standard normal, (count, k, d)."""
        some = next(iter(candidate.values()))
        return normal(key, (count, some.shape[0], self.gan_latent), some.dtype).to(some.device)
