"""Distributions of latent vectors, as pure functions of the tensors of one class.

Each turns standard normal noise into latent vectors and says how far it is from N(0, I); neither draws anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import elu

from keyhole.core.keys import fold_in, new_key, normal, permutation
from keyhole.core.types import Key, Tensors
from keyhole.errors import ConfigError, check_range

BATCH = 512
"""Draws of N(0, I) that a flow's ActNorms are first set by."""


class Posterior(Protocol):
    """A distribution of latent vectors. Everything is of one class, and lifts over classes."""

    def start(self, key: Key) -> Tensors:
        """Its tensors at the beginning, where it is N(0, I), exactly or nearly."""
        ...

    def draw(self, params: Tensors, noise: Tensor) -> Tensor:
        """Latent vectors (n, d) of standard normal noise (n, d)."""
        ...

    def divergence(self, params: Tensors, noise: Tensor) -> Tensor:
        """An unbiased estimate of KL(q || N(0, I)) up to a constant, a scalar; ``noise`` (n, d) is fresh."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """z = m + L e with a full matrix L, from m = 0 and L = I on.

    ``-1/2 logdet(L L^T) + 1/2 (|m|^2 + |L|_F^2)``, which is the divergence plus d / 2.

    Args:
        latent: d, at least 1.

    Reference: Wang et al. 2021, https://arxiv.org/abs/2201.10787. Differs from the authors' code: the second part is
    E|z|^2 / 2 in closed form, where theirs is a mean over 1000 draws.
    """

    latent: int

    def start(self, key: Key) -> Tensors:
        """Mean (d,) and factor (d, d)."""
        return {
            "mean": torch.zeros(self.latent, device=key.device),
            "factor": torch.eye(self.latent, device=key.device),
        }

    def draw(self, params: Tensors, noise: Tensor) -> Tensor:
        """(n, d)."""
        return params["mean"] + noise @ params["factor"].mT

    def divergence(self, params: Tensors, noise: Tensor) -> Tensor:
        """Needs no noise."""
        mean, factor = params["mean"], params["factor"]
        return 0.5 * (mean.square().sum() + factor.square().sum()) - torch.linalg.slogdet(factor).logabsdet


@dataclass(frozen=True, eq=False)
class Flow:
    """A small Glow on vectors: levels of steps, each ``ActNorm -> shuffle -> additive coupling``.

    In the direction from latents z to noise e, a step is ``y = (x + shift) exp(log_scale)``, a fixed shuffle, and
    ``y_2 <- y_2 + b(y_1)``, y_1 the first half; b is two linear layers with ActNorm and ELU and a third linear one that
    begins at zero, times ``exp(3 log_scale)``. After each level but the last, half of the numbers leave: they are
    modelled by a Gaussian whose mean and log-deviation are linear in those that stay, from zero on, and become
    ``(x - mean) / deviation``. ``log q(z) = log N(e; 0, I) + sum log_scale - sum log deviation``, with the log-scales
    of steps, since shuffles and couplings leave volume as it is.

    Args:
        latent: d, at least 2 to the power of ``levels``.
        steps: steps of a level, at least 1 (10 in the authors' code).
        levels: levels, at least 1 (3 in the authors' code).
        hidden: width of b, at least 1 (100 in the authors' code).

    Reference: Wang et al. 2021, https://arxiv.org/abs/2201.10787; Kingma and Dhariwal, "Glow: Generative Flow with
    Invertible 1x1 Convolutions", NeurIPS 2018, https://arxiv.org/abs/1807.03039. Differs from the authors' code: linear
    layers in place of convolutions on a 1x1 map, which are the same; ActNorm holds the logarithm of its scale; weights
    before an ActNorm begin with variance 1 / inputs, which it takes out again (Glow's 0.05 in narrow couplings makes it
    magnify a lot, and steps with it); all classes have the same shuffles.
    """

    latent: int
    steps: int = 10
    levels: int = 3
    hidden: int = 100
    sizes: tuple[int, ...] = field(init=False, repr=False)
    """Numbers at each level."""
    _orders: tuple[Tensor, ...] = field(init=False, repr=False)
    """The shuffles of each level, (steps, n), and not among what is optimised."""

    def __post_init__(self) -> None:
        check_range("flow_steps", self.steps, 1)
        check_range("flow_levels", self.levels, 1)
        check_range("flow_hidden", self.hidden, 1)
        if self.latent < 2**self.levels:
            raise ConfigError(
                f"a flow of {self.levels} levels halves {self.latent} latent numbers too often; use fewer flow_levels."
            )
        sizes = [self.latent]
        for _ in range(self.levels - 1):
            sizes.append(sizes[-1] - sizes[-1] // 2)
        key = new_key(0)
        orders = [
            torch.stack([permutation(fold_in(fold_in(key, level), step), size) for step in range(self.steps)])
            for level, size in enumerate(sizes)
        ]
        object.__setattr__(self, "sizes", tuple(sizes))
        object.__setattr__(self, "_orders", tuple(orders))

    def start(self, key: Key) -> Tensors:
        """ActNorms set by a batch of N(0, I), couplings and splits at zero: near N(0, I)."""
        return self.fitted(normal(fold_in(key, "batch"), (BATCH, self.latent)), key)

    def fitted(self, z: Tensor, key: Key) -> Tensors:
        """Tensors whose ActNorms give mean 0 and variance 1 on latents z (n, d); a level's steps share a tensor."""
        params: Tensors = {}
        for level, size in enumerate(self.sizes):
            first, second = size // 2, size - size // 2
            made = []
            for step in range(self.steps):
                own = fold_in(fold_in(key, level), step)
                enter = _random(fold_in(own, "in"), self.hidden, first, z)
                mid = _random(fold_in(own, "mid"), self.hidden, self.hidden, z)
                norm = _norm_of(z)
                z = _norm(z, *norm)[:, self._order(level, step, z.device)]
                inside = z[:, :first] @ enter.mT
                norm_in = _norm_of(inside)
                norm_mid = _norm_of(elu(_norm(inside, *norm_in)) @ mid.mT)
                # The coupling adds nothing yet, so z is already what the next step sees.
                made.append({
                    "shift": norm[0], "scale": norm[1], "in": enter, "in.shift": norm_in[0],
                    "in.scale": norm_in[1], "mid": mid, "mid.shift": norm_mid[0], "mid.scale": norm_mid[1],
                    **_nothing("out", self.hidden, second, z),
                })  # fmt: skip
            params |= {f"{level}.{name}": torch.stack([one[name] for one in made]) for name in made[0]}
            if level < self.levels - 1:
                params |= _nothing(f"{level}.split", second, 2 * first, z)
                z = z[:, :second]
        return params

    def encode(self, params: Tensors, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (n, d) of latents z (n, d), and log |det de/dz| (n,)."""
        volume = z.new_zeros(len(z))
        left: list[Tensor] = []
        for level, size in enumerate(self.sizes):
            for step in range(self.steps):
                own = _step(params, level, step)
                z = _norm(z, own["shift"], own["scale"])[:, self._order(level, step, z.device)]
                first, second = z[:, : size // 2], z[:, size // 2 :]
                z = torch.cat([first, second + _added(own, first)], 1)
                volume = volume + own["scale"].sum()
            if level < self.levels - 1:
                z, leaving = z[:, : size - size // 2], z[:, size - size // 2 :]
                mean, spread = _affine(params, f"{level}.split", z).chunk(2, -1)
                left.append((leaving - mean) * torch.exp(-spread))
                volume = volume - spread.sum(-1)
        # What stays longest comes first.
        return torch.cat([z, *reversed(left)], 1), volume

    def decode(self, params: Tensors, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (n, d) of noise (n, d), and log |det dz/de| (n,): the inverse of `encode`."""
        volume = noise.new_zeros(len(noise))
        z, rest = noise[:, : self.sizes[-1]], noise[:, self.sizes[-1] :]
        for level, size in reversed([*enumerate(self.sizes)]):
            if level < self.levels - 1:
                leaving, rest = rest[:, : size // 2], rest[:, size // 2 :]
                mean, spread = _affine(params, f"{level}.split", z).chunk(2, -1)
                z = torch.cat([z, mean + leaving * torch.exp(spread)], 1)
                volume = volume + spread.sum(-1)
            for step in reversed(range(self.steps)):
                own = _step(params, level, step)
                first, second = z[:, : size // 2], z[:, size // 2 :]
                z = torch.cat([first, second - _added(own, first)], 1)
                z = z[:, self._order(level, step, z.device).argsort()] * torch.exp(-own["scale"]) - own["shift"]
                volume = volume - own["scale"].sum()
        return z, volume

    def log_density(self, params: Tensors, z: Tensor) -> Tensor:
        """The logarithm of q, (n,), at latents (n, d)."""
        noise, volume = self.encode(params, z)
        return _log_normal(noise) + volume

    def draw(self, params: Tensors, noise: Tensor) -> Tensor:
        """(n, d)."""
        return self.decode(params, noise)[0]

    def divergence(self, params: Tensors, noise: Tensor) -> Tensor:
        """Mean of log q(z) - log N(z; 0, I) over the draws of the noise; decoding knows log q without encoding."""
        z, volume = self.decode(params, noise)
        return (_log_normal(noise) - volume - _log_normal(z)).mean()

    def _order(self, level: int, step: int, device: torch.device) -> Tensor:
        return self._orders[level][step].to(device)


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)


def _norm_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and log-scale that give a batch mean 0 and variance 1."""
    return -x.mean(0), -torch.log(x.std(0, correction=0) + 1e-6)


def _norm(x: Tensor, shift: Tensor, log_scale: Tensor) -> Tensor:
    return (x + shift) * torch.exp(log_scale)


def _step(params: Tensors, level: int, step: int) -> Tensors:
    prefix = f"{level}."
    return {
        name.removeprefix(prefix): tensor[step]
        for name, tensor in params.items()
        if name.startswith(prefix) and not name.startswith(f"{level}.split")
    }


def _added(own: Tensors, first: Tensor) -> Tensor:
    """The sum of a coupling, b(first)."""
    x = elu(_norm(first @ own["in"].mT, own["in.shift"], own["in.scale"]))
    x = elu(_norm(x @ own["mid"].mT, own["mid.shift"], own["mid.scale"]))
    return _affine(own, "out", x)


def _random(key: Key, after: int, before: int, like: Tensor) -> Tensor:
    """Weights that keep the variance of what they read."""
    return (normal(key, (after, before), like.dtype) / math.sqrt(before)).to(like.device)


def _nothing(name: str, before: int, after: int, like: Tensor) -> Tensors:
    """A linear layer that gives zeros."""
    zero = like.new_zeros(after)
    return {name: like.new_zeros(after, before), f"{name}.bias": zero, f"{name}.scale": zero}


def _affine(params: Tensors, name: str, x: Tensor) -> Tensor:
    return (x @ params[name].mT + params[f"{name}.bias"]) * torch.exp(3 * params[f"{name}.scale"])
