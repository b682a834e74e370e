"""What a client does with a batch before it sends something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from keyhole.core.types import Batch, GradFn, Key, Upload, Weights


class ClientRule(Protocol):
    """From a private batch to an upload; also how an attacker simulates a client."""

    def __call__(self, gradient: GradFn, weights: Weights, batch: Batch, key: Key) -> Upload:
        """Run the client on one batch. Pure, so that it lifts and so that an attacker can differentiate through it."""
        ...

    def describe(self) -> str:
        """A few words for the report."""
        ...


@dataclass(frozen=True)
class SingleGradient:
    """The client sends the gradient of one batch (FedSGD)."""

    def __call__(self, gradient: GradFn, weights: Weights, batch: Batch, key: Key) -> Upload:
        """The gradient itself, unchanged buffers, and the number of real examples."""
        return Upload(gradient(weights, batch, key), weights.buffers, (batch.share > 0).sum())

    def describe(self) -> str:
        """A few words for the report."""
        return "the gradient of one batch"
