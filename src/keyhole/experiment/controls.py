"""Controls: what the same guesses score without what the client sent. Leakage is what an attack scores beyond them."""

from __future__ import annotations

import torch
from torch import Tensor

from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import CONTROLS
from keyhole.core.tensors import safe_norm
from keyhole.core.types import Key, Tensors


@CONTROLS.add(name="prior_only")
def noise_update(update: Tensors, key: Key) -> Tensors:
    """The same attack on noise in place of the update: what its start and its prior give by themselves.

    Each tensor gets Gaussian noise with the norm of the observed one, and keeps its zeros, so that masks look alike.
    BatchNorm's batch statistics are part of what a client sends, so that this control does without them. Labels, masks
    and hints are not sent: an attacker who knows them knows them without the update, and so does the control.
    """
    noise = {
        name: torch.where(value != 0, normal(fold_in(key, name), tuple(value.shape), value.dtype), 0.0)
        for name, value in update.items()
    }
    return {
        name: value * safe_norm({name: update[name]}) / safe_norm({name: value}).clamp(min=1e-30)
        for name, value in noise.items()
    }


@CONTROLS.add(name="class_mean")
def class_mean(public: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """The mean public image of the secret's true class, or of all classes where the class has none.

    Generous on purpose: it is given the label.

    Args:
        public: pixels (n, c, h, w).
        public_labels: int64 (n,).
        labels: true classes of the secrets, int64 (b,).

    Returns:
        One guess for each secret, (b, c, h, w).
    """
    everything = public.mean(0)
    guesses = []
    for label in labels.tolist():
        own = public[public_labels == label]
        guesses.append(own.mean(0) if len(own) else everything)
    return torch.stack(guesses)


@CONTROLS.add(name="other_client")
def neighbours(reconstructions: Tensor) -> Tensor:
    """The reconstruction from another client's update: each trial is given the next one's, (trials, r, c, h, w)."""
    return reconstructions.roll(-1, 0)
