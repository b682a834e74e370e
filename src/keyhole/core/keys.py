"""Randomness as a function: counter-based keys instead of generators.

A key is two 32-bit words in an int64 tensor. Drawing hashes the key with a running counter by Threefry-2x32 with 20
rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405), so that a draw depends on nothing but the key: not on the number of trials
lifted together, not on what was drawn before, and there is no generator state to save.

Streams are kept apart by purpose, ``fold_in(key, "defense")``: a shared seed once let an attack start at the truth.

These keys are for simulation. A deployed client must draw from its operating system: a defense whose randomness the
server can regenerate is no defense.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from keyhole.core.types import Key

_WORD = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry2x32(key: Key, counter: Tensor) -> Tensor:
    """Hash 64-bit counters under a key.

    Args:
        key: two words, int64 of shape (2,).
        counter: int64 of shape (..., 2), each entry in [0, 2**32).

    Returns:
        int64 of shape (..., 2), each entry in [0, 2**32).
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    left = (counter[..., 0] + schedule[0]) & _WORD
    right = (counter[..., 1] + schedule[1]) & _WORD
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            left = (left + right) & _WORD
            right = ((right << rotation) | (right >> (32 - rotation))) & _WORD
            right = right ^ left
        left = (left + schedule[(block + 1) % 3]) & _WORD
        right = (right + schedule[(block + 2) % 3] + block + 1) & _WORD
    return torch.stack([left, right], dim=-1)


def _digest(text: str) -> tuple[int, int]:
    raw = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:8], "little")


def new_key(seed: int, device: torch.device | str | None = None) -> Key:
    """A key from an integer seed, of shape (2,)."""
    return torch.tensor(_digest(f"seed:{seed}"), dtype=torch.int64, device=device)


def fold_in(key: Key, purpose: str | int) -> Key:
    """A new key for a named purpose or a numbered item; different purposes give independent streams."""
    return threefry2x32(key, torch.tensor(_digest(f"{purpose}"), dtype=torch.int64, device=key.device))


def split(key: Key, count: int) -> Tensor:
    """``count`` independent keys, of shape (count, 2)."""
    return threefry2x32(fold_in(key, "split"), _counters(count, key.device))


def advance(key: Key, tick: int) -> Key:
    """Keys (..., 2) for one step of a long loop: an addition where `fold_in` would hash, as it is called every step."""
    return (key + torch.tensor([0, tick], dtype=torch.int64, device=key.device)) & _WORD


def _counters(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, dtype=torch.int64, device=device)
    return torch.stack([index & _WORD, index >> 32], dim=-1)


def uniform(key: Key, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform draws in [0, 1) with 53 random bits, rounded to ``dtype``."""
    count = math.prod(shape)
    words = threefry2x32(key, _counters(count, key.device))
    fraction = ((words[..., 0] >> 5).double() * 67108864.0 + (words[..., 1] >> 6).double()) / 9007199254740992.0
    drawn = fraction.reshape(shape).to(dtype)
    # Rounding to a shorter type may give exactly 1, which the half-open interval excludes.
    return drawn.clamp(max=1.0 - torch.finfo(dtype).eps / 2)


def normal(key: Key, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by the Box-Muller transform, computed in float64 and rounded to ``dtype``."""
    count = math.prod(shape)
    half = (count + 1) // 2
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(fold_in(key, "radius"), (half,), torch.float64)))
    angle = 2.0 * math.pi * uniform(fold_in(key, "angle"), (half,), torch.float64)
    drawn = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]
    return drawn.reshape(shape).to(dtype)


def bernoulli(key: Key, probability: float, shape: tuple[int, ...]) -> Tensor:
    """Boolean draws that are true with the given probability."""
    return uniform(key, shape, torch.float64) < probability


def integers(key: Key, high: int, shape: tuple[int, ...]) -> Tensor:
    """Integers in [0, high), int64."""
    return (uniform(key, shape, torch.float64) * high).long()


def permutation(key: Key, count: int) -> Tensor:
    """A random order of ``range(count)``, int64 of shape (count,)."""
    return uniform(key, (count,), torch.float64).argsort()


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Torch's own CPU generator, which modules draw their initial weights from, in a state that follows from a key."""
    high, low = key.tolist()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it also reseeds the generators of accelerators, which are not forked here.
        torch.default_generator.manual_seed((high << 32) | low)
        yield
