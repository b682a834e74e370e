"""Training the generators of model inversion on public images: once for the same images and settings, and resumable.

All randomness is a function of a key and the step, so that a training that was interrupted goes on to the same result,
bit for bit. One thread and one device are the caller's choice (`keyhole.solve.threads.one_thread`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.core.keys import advance, fold_in, normal, permutation, seeded
from keyhole.core.told import Told
from keyhole.core.types import Key, Tensors
from keyhole.errors import ModelError, cause
from keyhole.inversion.gan import GAN, Discriminator, Facts, Generator
from keyhole.inversion.networks import Critic
from keyhole.solve.files import (
    as_metadata,
    cache_folder,
    digest,
    feed,
    held,
    read_tensors,
    take,
    tensors_as_bytes,
    unusable,
    write_whole,
)

GAN_VERSION = 2
"""Raise it when the same call would give other weights."""

CHECKPOINT_STEPS = 1000
CHECKPOINT_SECONDS = 30.0
"""A training that goes on writes its state after so many steps, and after so long."""

_BETAS = (0.5, 0.999)


# What is played


class Draws:
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


class Game(ABC):
    """Two networks, and the losses of both at a step.

    Args:
        public: images (n, c, h, w) that were found `usable`.
        settings: how to train.
        key: the training's randomness, initial weights too.
    """

    low = 0.0
    """What the networks take for black; white is 1."""

    def __init__(self, public: Tensor, settings: Any, key: Key) -> None:
        self.public, self.settings, self.key = public, settings, key
        self.draws = Draws(public, settings.batch, settings.latent, key)
        _, channels, height, width = public.shape
        with seeded(fold_in(key, "weights")):
            self.generator, self.discriminator = self.networks((channels, height, width))

    @abstractmethod
    def networks(self, shape: tuple[int, int, int]) -> tuple[nn.Module, Critic]:
        """A fresh generator and a fresh discriminator, for images of this shape."""

    @abstractmethod
    def against(self, step: int) -> Tensor:
        """The discriminator's loss."""

    @abstractmethod
    def fool(self, step: int) -> Tensor:
        """The generator's loss."""

    def fakes(self, step: int) -> Tensor:
        """A batch of generated images for the discriminator to learn from."""
        with torch.no_grad():
            made: Tensor = self.generator(self.draws.z("z", step))
        return made

    def tries(self, step: int) -> Tensor:
        """A batch of generated images for the generator to learn from."""
        made: Tensor = self.generator(self.draws.z("z of the generator", step))
        return made


# The loop


def trained(kind: str, game: Game, also: dict[str, Any], folder: Path | None, told: Told) -> GAN:
    """Train, or go on with a training, or find it done.

    Args:
        kind: names the game.
        game: what is played for how long.
        also: what else the result depends on, as JSON knows it.
        folder: where trainings are kept, by default `keyhole.solve.files.cache_folder`.
        told: progress.

    Raises:
        ModelError: training diverged.
        StoreError: the folder cannot be written to.
    """
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

    def __init__(self, game: Game) -> None:
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

    def tensors(self, step: int) -> Tensors:
        """All that the rest of the training depends on after so many steps; when it is over, the networks."""
        named = {f"{part}/{name}": t for part, net in self.parts.items() for name, t in net.state_dict().items()}
        if step < self.game.settings.steps:
            for part, adam in self.adams.items():
                for name, parameter in self.parts[part].named_parameters():
                    named |= {f"{part}/{name}/{kind}": moment for kind, moment in adam.state[parameter].items()}
        return named


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


def _name(kind: str, game: Game, also: dict[str, Any]) -> str:
    hashed = hashlib.sha256()
    about = {
        "version": GAN_VERSION, "kind": kind, "settings": asdict(game.settings), "key": game.key.tolist(), **also
    }  # fmt: skip
    hashed.update(json.dumps(about, sort_keys=True).encode())
    feed(hashed, game.public)
    return hashed.hexdigest()


def _save(path: Path, training: _Training) -> None:
    tensors = training.tensors(training.step)
    account = {
        "step": training.step, "seconds": training.seconds, "losses": training.losses, "digest": digest(tensors)
    }  # fmt: skip
    try:
        write_whole(path, tensors_as_bytes(tensors, as_metadata(account)))
    except OSError as error:
        raise unusable(path.parent, error) from error


def _resumed(path: Path, training: _Training) -> bool:
    """Put a training where its file says it was, and tell whether it was over; nothing happens where there is none."""
    from safetensors import SafetensorError

    if not path.exists():
        return False
    steps = training.game.settings.steps
    try:
        stored, account = read_tensors(path)
        step, seconds = int(account["step"]), float(account["seconds"])
        losses = [(float(d), float(g)) for d, g in account["losses"]]
        if not 1 <= step <= steps or len(losses) != step // training.game.settings.critic:
            raise ValueError(f"it tells of {step} steps")
        if account["digest"] != digest(stored):
            raise ValueError("its values are not those that were written")
        own = training.tensors(step)
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
