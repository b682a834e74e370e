"""The values that flow through Keyhole: data that is lifted over trials.

Each class is a `NamedTuple` because named tuples (and dicts) of tensors can enter and leave `torch.func.vmap`;
plain dataclasses cannot. All shapes describe one trial: b images of a batch, k classes, r reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Tensors = dict[str, Tensor]
"""Tensors keyed by parameter name, never a positional list."""

Key = Tensor
"""A counter-based random key: two 32-bit words in an int64 tensor of shape (2,), see `keyhole.core.keys`."""

Candidate = Tensors
"""What an attack optimises, by name; ``"inputs"`` for attacks that work on pixels."""

Field = Literal["weights", "update", "targets", "statistics", "masks", "hints"]
"""What an attacker may see of one round: global weights, the update, the labels, batch statistics, dropout
masks and noise inside the model, and what an insider would know of a defense's own choices."""


class Batch(NamedTuple):
    """A client's private batch, or an attacker's guess at one."""

    inputs: Float[Tensor, "b *shape"]
    """Images in the model's own input space (`keyhole.core.task.Bounds` maps it to pixels)."""
    targets: Float[Tensor, "b k"]
    """Class probabilities: hard, smoothed, mixed and optimised labels are one thing."""
    share: Float[Tensor, " b"]
    """Each example's weight in the loss; sums to 1, and 0 marks padding."""


class Weights(NamedTuple):
    """A model's state: what is trained, and what is not."""

    params: Tensors
    buffers: Tensors


class Observation(NamedTuple):
    """What the attacker sees of one round; `None` where the threat model hides it."""

    weights: Weights | None = None
    update: Tensors | None = None
    """What the server subtracts from the weights: the gradient, or lr times it after one local step."""
    targets: Tensor | None = None
    """Labels of the batch as probabilities, (b, k), sorted by class, where the threat model gives them."""
    statistics: Tensors | None = None
    """Mean and variance of each BatchNorm layer's input over the batch, ``<layer>.mean`` and ``<layer>.var``."""
    masks: Tensors | None = None
    """What the client's layers drew: dropout masks and noise, by buffer name."""
    hints: Tensors | None = None
    """What defenses gave away with `keyhole.core.defense.Context.hint`, by name."""


class Seen(NamedTuple):
    """Everything an attack may use: the observations of an episode, and facts worked out from them once."""

    observations: tuple[Observation, ...]
    facts: Tensors
    """Recovered labels under ``"targets"``; a counter's facts under ``"counter.<name>"``."""


class Reconstruction(NamedTuple):
    """An attack's answer: r guesses (r may exceed the number of secrets) and its own opinion of them."""

    inputs: Float[Tensor, "r *shape"]
    targets: Float[Tensor, "r k"] | None
    score: Float[Tensor, ""]
    """The attack's own measure of fit, without priors; lower is better. Never computed from the truth."""


class Upload(NamedTuple):
    """What a client rule returns before update-level defenses act on it."""

    update: Tensors
    buffers: Tensors
    examples: Int[Tensor, ""]
    """The number of examples that took part (padding excluded)."""


class Trace(NamedTuple):
    """A forward pass with its inside."""

    logits: Float[Tensor, "b k"]
    features: Float[Tensor, "b m"]
    """The input of the head, the model's last linear layer."""
    activations: Tensors
    """Outputs of the named modules without children."""
    statistics: Tensors
    """Mean and (biased) variance of what enters each BatchNorm layer, over the batch and all positions."""


GradFn = Callable[[Weights, Batch, Key], Tensors]
"""How a client turns a batch into a gradient."""

LossFn = Callable[[Tensor, Tensor], Tensor]
"""Logits (b, k) and targets (b, k) to a loss per example (b,)."""

Distance = Callable[[Tensors, Tensors, Tensor], Tensor]
"""Simulated update, observed update and the observed squared norm to a scalar."""
