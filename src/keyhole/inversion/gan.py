"""Training the generators of model inversion on public images: once for the same images and settings, and resumable.

All randomness is a function of a key and the step, so that a training that was interrupted goes on to the same result,
bit for bit. One thread and one device are the caller's choice (`keyhole.solve.threads.one_thread`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keyhole.core.keys import advance, fold_in, normal, permutation, seeded, uniform
from keyhole.core.told import Told, silent
from keyhole.core.types import Key, Tensors
from keyhole.errors import ConfigError, DataError, ModelError, cause, check_range
from keyhole.inversion.losses import (
    feature_gap,
    gradient_penalty,
    real_or_not,
    soft_label_loss,
    total_entropy,
)
from keyhole.inversion.networks import (
    SIDES,
    Critic,
    dcgan_critic,
    dcgan_generator,
    inversion_generator,
    soft_label_critic,
    wasserstein_critic,
)
from keyhole.solve.files import cache_folder, digest, feed, held, take, tensors_as_bytes, unusable, write_whole

GAN_VERSION = 2
"""Raise it when the same call would give other weights."""

CHECKPOINT_STEPS = 1000
CHECKPOINT_SECONDS = 30.0
"""A training that goes on writes its state after so many steps, and after so long."""

_ACCOUNT = "account"
_BETAS = (0.5, 0.999)


# What training gives


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


# Settings


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

    steps: int = 53_500
    batch: int = 64
    lr: float = 2e-4
    latent: int = 100
    width: int = 64
    critic: int = 5

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("batch", self.batch, 2)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("latent", self.latent, 1)
        check_range("width", self.width, 1)
        check_range("critic", self.critic, 1)


@dataclass(frozen=True)
class WassersteinSettings(Settings):
    """How `train_wgan_gp` trains. 53,500 steps are 100 passes over 34,265 images, as the paper's code does for digits.

    Args:
        penalty: weight of the gradient penalty, at least 0.
    """

    penalty: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("penalty", self.penalty, 0)

    @classmethod
    def lean(cls) -> WassersteinSettings:
        """Half the width and a fifth of the steps: about twenty minutes on one core."""
        return cls(steps=10_000, width=32)

    @classmethod
    def smoke(cls) -> WassersteinSettings:
        """Enough for digits of 8x8 pixels, enlarged: under a minute on one core."""
        return cls(steps=1500, batch=32, lr=4e-4, width=16)


@dataclass(frozen=True)
class SoftLabelSettings(Settings):
    """How `train_soft_label_gan` trains. 53,500 steps are 100 passes over 34,265 images.

    Args:
        kernels: features that minibatch discrimination adds, at least 1.
        kernel_size: numbers that each of them compares, at least 1.
        entropy: weight of the summed entropy in the generator's loss, at least 0.
    """

    kernels: int = 64
    kernel_size: int = 50
    entropy: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("kernels", self.kernels, 1)
        check_range("kernel_size", self.kernel_size, 1)
        check_range("entropy", self.entropy, 0)

    @classmethod
    def lean(cls) -> SoftLabelSettings:
        """Half the width, a twentieth of the minibatch discrimination and a tenth of the steps."""
        return cls(steps=5000, width=32, kernels=32, kernel_size=8)


@dataclass(frozen=True)
class DCGANSettings(Settings):
    """How `train_dcgan` trains: 32x32 images only.

    Args:
        noise: standard deviation of what is added to the discriminator's inputs, on the scale of [-1, 1]; at least 0.
    """

    latent: int = 50
    critic: int = 1
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("noise", self.noise, 0)

    @classmethod
    def lean(cls) -> DCGANSettings:
        """A quarter of the width and a tenth of the steps."""
        return cls(steps=5000, width=16)


# Trainings


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
    return _trained("wgan_gp", game, {}, folder, told)


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
    return _trained("soft_label", game, also, folder, told)


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
    return _trained("dcgan", game, {}, folder, told)


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


class _Game(Protocol):
    """Two networks, and the losses of both at a step."""

    generator: nn.Module
    discriminator: Critic
    settings: Any
    public: Tensor
    key: Key
    low: float

    def against(self, step: int) -> Tensor:
        """The discriminator's loss."""
        ...

    def fool(self, step: int) -> Tensor:
        """The generator's loss."""
        ...


class _Draws:
    """The random numbers of each step, by purpose."""

    def __init__(self, public: Tensor, batch: int, latent: int, key: Key) -> None:
        self.public, self.batch, self.latent, self.key = public, batch, latent, key
        self._streams: dict[str, Key] = {}
        self._orders: dict[str, tuple[int, Tensor]] = {}

    def of(self, purpose: str, step: int) -> Key:
        """The key of a purpose at a step."""
        if purpose not in self._streams:
            self._streams[purpose] = fold_in(self.key, purpose)
        return advance(self._streams[purpose], step)

    def z(self, purpose: str, step: int) -> Tensor:
        """Latent vectors (batch, latent)."""
        return normal(self.of(purpose, step), (self.batch, self.latent)).to(self.public)

    def noise(self, purpose: str, step: int, images: Tensor) -> Tensor:
        """Standard normal numbers in the shape of images."""
        # So many numbers take longer by hashing than a small network's step; torch's generator is seeded for each step.
        high, low = self.of(purpose, step).tolist()
        return torch.randn(images.shape, generator=torch.Generator().manual_seed(low ^ (high << 32))).to(images)

    def which(self, purpose: str, step: int) -> Tensor:
        """Indices of a batch: each pass over the images in an order of its own, an incomplete last batch left out."""
        number, place = divmod(step, len(self.public) // self.batch)
        if purpose not in self._orders or self._orders[purpose][0] != number:
            order = permutation(self.of(purpose, number), len(self.public)).to(self.public.device)
            self._orders[purpose] = (number, order)
        return self._orders[purpose][1][place * self.batch : (place + 1) * self.batch]

    def images(self, purpose: str, step: int) -> Tensor:
        """A batch of public images."""
        return self.public[self.which(purpose, step)]


class _Wasserstein:
    low = 0.0

    def __init__(self, public: Tensor, settings: WassersteinSettings, key: Key) -> None:
        self.public, self.settings, self.key = public, settings, key
        self.draws = _Draws(public, settings.batch, settings.latent, key)
        shape = _shape(public)
        with seeded(fold_in(key, "weights")):
            self.generator = inversion_generator(shape, latent=settings.latent, width=settings.width)
            self.discriminator = wasserstein_critic(shape, width=settings.width)

    def against(self, step: int) -> Tensor:
        real = self.draws.images("real", step)
        with torch.no_grad():
            fake = self.generator(self.draws.z("z", step))
        along = uniform(self.draws.of("along", step), (len(real), 1, 1, 1)).to(real)
        # No example has a say in another's number, so both batches share one pass.
        said_real, said_fake = self.discriminator(torch.cat([real, fake])).chunk(2)
        penalty = gradient_penalty(self.discriminator, real + along * (fake - real))
        loss: Tensor = said_fake.mean() - said_real.mean() + self.settings.penalty * penalty
        return loss

    def fool(self, step: int) -> Tensor:
        said: Tensor = self.discriminator(self.generator(self.draws.z("z of the generator", step)))
        return -said.mean()


class _SoftLabel:
    low = 0.0

    def __init__(
        self,
        public: Tensor,
        target_logits: Callable[[Tensor], Tensor],
        num_classes: int,
        settings: SoftLabelSettings,
        key: Key,
        begin: GAN | None,
    ) -> None:
        self.public, self.settings, self.key = public, settings, key
        self.draws = _Draws(public, settings.batch, settings.latent, key)
        shape = _shape(public)
        with seeded(fold_in(key, "weights")):
            self.generator = inversion_generator(shape, latent=settings.latent, width=settings.width)
            self.discriminator = soft_label_critic(
                shape, num_classes, width=settings.width, kernels=settings.kernels, kernel_size=settings.kernel_size
            )
        if begin is not None:
            try:
                self.generator.load_state_dict(begin.generator.module.state_dict())
                self.discriminator.load_state_dict(begin.discriminator.module.state_dict())
            except RuntimeError as error:
                raise ConfigError("the GAN to begin with has other networks than the settings ask for.") from error
        self._target = target_logits
        self._classes = num_classes
        self._labels: Tensor | None = None

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
        with torch.no_grad():
            fake = self.generator(self.draws.z("z", step))
        # Features are of one image, so three batches share a pass; the head looks at one batch at a time.
        batches = torch.cat([self.public[which], self.draws.images("unlabelled", step), fake])
        logits = [self.discriminator.head(part) for part in self.discriminator.features(batches).chunk(3)]
        return soft_label_loss(self.labels()[which], *logits)

    def fool(self, step: int) -> Tensor:
        with torch.no_grad():
            real = self.discriminator.features(self.draws.images("unlabelled for the generator", step))
        features = self.discriminator.features(self.generator(self.draws.z("z of the generator", step)))
        logits = self.discriminator.head(features)
        return feature_gap(features, real) + self.settings.entropy * total_entropy(logits)


class _DCGAN:
    low = -1.0

    def __init__(self, public: Tensor, settings: DCGANSettings, key: Key) -> None:
        self.public, self.settings, self.key = public, settings, key
        self.draws = _Draws(public, settings.batch, settings.latent, key)
        channels = _shape(public)[0]
        with seeded(fold_in(key, "weights")):
            self.generator = dcgan_generator(channels, latent=settings.latent, width=settings.width)
            self.discriminator = dcgan_critic(channels, width=settings.width)

    def against(self, step: int) -> Tensor:
        real = 2.0 * self.draws.images("real", step) - 1.0
        with torch.no_grad():
            fake = self.generator(self.draws.z("z", step))
        # BatchNorm couples a batch, so real and generated images have a pass each.
        return real_or_not(self._read(real, "noise on real", step), True) + real_or_not(
            self._read(fake, "noise on generated", step), False
        )

    def fool(self, step: int) -> Tensor:
        fake = self.generator(self.draws.z("z of the generator", step))
        return real_or_not(self._read(fake, "noise for the generator", step), True)

    def _read(self, images: Tensor, purpose: str, step: int) -> Tensor:
        said: Tensor = self.discriminator(images + self.settings.noise * self.draws.noise(purpose, step, images))
        return said


def _shape(public: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = public.shape
    return channels, height, width


# The loop


def _trained(kind: str, game: _Game, also: dict[str, Any], folder: Path | None, told: Told) -> GAN:
    """Train, or go on with a training, or find it done."""
    device = game.public.device
    game.generator.to(device).train()
    game.discriminator.to(device).train()
    with held(folder or cache_folder(), f"gan-{_name(kind, game, also)}") as path:
        training = _Training(game)
        done = _resumed(path, training)
        if not done:
            training.run(path, told)
    low = game.low
    return GAN(
        Generator.of(game.generator, game.settings.latent, low),
        Discriminator.of(game.discriminator, low),
        Facts(training.step, tuple((d, g) for d, g in training.losses), training.seconds, done),
    )


class _Training:
    """A training under way: its networks, Adam's moments of both, and its history."""

    def __init__(self, game: _Game) -> None:
        self.game = game
        self.parts: dict[str, nn.Module] = {"generator": game.generator, "discriminator": game.discriminator}
        self.adams = {name: _adam(part, game.settings.lr) for name, part in self.parts.items()}
        self.step, self.seconds = 0, 0.0
        self.losses: list[tuple[float, float]] = []

    def run(self, path: Path, told: Told) -> None:
        """All steps that are left, with checkpoints."""
        settings = self.game.settings
        before = saved = time.monotonic()
        while self.step < settings.steps:
            of_discriminator = self._descend("discriminator", self.game.against(self.step))
            if (self.step + 1) % settings.critic == 0:
                of_generator = self._descend("generator", self.game.fool(self.step))
                self.losses.append((of_discriminator.item(), of_generator.item()))
                if not all(map(math.isfinite, self.losses[-1])):
                    raise ModelError(f"the GAN diverged at step {self.step + 1}; lower its learning rate.")
            self.step += 1
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            last = self.step == settings.steps
            if last or self.step % CHECKPOINT_STEPS == 0 or now - saved > CHECKPOINT_SECONDS:
                _save(path, self)
                before = saved = time.monotonic()
            told("GAN", self.step / settings.steps)

    def _descend(self, name: str, loss: Tensor) -> Tensor:
        # Gradients of this network only: those of the other's weights would be computed for nothing.
        own = list(self.parts[name].parameters())
        for parameter, slope in zip(own, torch.autograd.grad(loss, own), strict=True):
            # Adam's fused kernel reads memory in order, and a gradient may come transposed or expanded.
            parameter.grad = slope.contiguous()
        self.adams[name].step()
        return loss.detach()

    def tensors(self) -> Tensors:
        """All that the rest of the training depends on; where it is over, the networks."""
        named = {f"{part}/{name}": t for part, net in self.parts.items() for name, t in net.state_dict().items()}
        if self.step < self.game.settings.steps:
            named |= {name: tensor for name, (_, _, tensor) in self.moments().items()}
        return named

    def moments(self) -> dict[str, tuple[dict[str, Tensor], str, Tensor]]:
        """Adam's moments by name, each with the place where it is kept."""
        found = {}
        for part, adam in self.adams.items():
            for name, parameter in self.parts[part].named_parameters():
                for kind, tensor in adam.state[parameter].items():
                    found[f"{part}/{name}/{kind}"] = (adam.state[parameter], kind, tensor)
        return found


def _adam(module: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam with moments at zero from the beginning, so that there is always something to save and to load."""
    adam = torch.optim.Adam(module.parameters(), lr=lr, betas=_BETAS, fused=True)
    for parameter in module.parameters():
        adam.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam


# Files


def _name(kind: str, game: _Game, also: dict[str, Any]) -> str:
    hashed = hashlib.sha256()
    about = {
        "version": GAN_VERSION, "kind": kind, "settings": asdict(game.settings), "key": game.key.tolist(), **also
    }  # fmt: skip
    hashed.update(json.dumps(about, sort_keys=True).encode())
    feed(hashed, game.public)
    return hashed.hexdigest()


def _save(path: Path, training: _Training) -> None:
    tensors = training.tensors()
    account = {
        "step": training.step, "seconds": training.seconds, "losses": training.losses, "digest": digest(tensors)
    }  # fmt: skip
    try:
        write_whole(path, tensors_as_bytes(tensors, {_ACCOUNT: json.dumps(account)}))
    except OSError as error:
        raise unusable(path.parent, error) from error


def _resumed(path: Path, training: _Training) -> bool:
    """Put a training where its file says it was, and tell whether it was over; nothing happens where there is none."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return False
    steps = training.game.settings.steps
    try:
        with safe_open(str(path), framework="pt") as file:
            account = json.loads((file.metadata() or {})[_ACCOUNT])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, seconds = int(account["step"]), float(account["seconds"])
        losses = [(float(d), float(g)) for d, g in account["losses"]]
        if not 1 <= step <= steps or len(losses) != step // training.game.settings.critic:
            raise ValueError(f"it tells of {step} steps")
        if account["digest"] != digest(stored):
            raise ValueError("its values are not those that were written")
        own = {f"{part}/{name}": t for part, net in training.parts.items() for name, t in net.state_dict().items()}
        if step < steps:
            own |= {name: tensor for name, (_, _, tensor) in training.moments().items()}
        read = {name: take(stored, name, tensor) for name, tensor in own.items()}
        if stored:
            raise ValueError(f"it holds '{next(iter(stored))}', which the networks have not")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({cause(error)}); the GAN is trained anew.", stacklevel=4)
        return False
    with torch.no_grad():
        # Copied into tensors that lie in memory as those of a fresh training do, so that rounding is the same.
        for name, tensor in own.items():
            tensor.copy_(read[name])
    training.step, training.seconds, training.losses = step, seconds, losses
    return step == steps
