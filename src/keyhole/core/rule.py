"""What a client does with its batch before it sends something."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from keyhole.core.keys import fold_in, permutation
from keyhole.core.registry import RULES
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Batch, GradFn, Key, Tensors, Upload, Weights
from keyhole.errors import check_range

Order = Literal["fixed", "shuffled"]


class ClientRule(Protocol):
    """From a private batch to an upload; also how an attacker simulates a client."""

    def __call__(self, gradient: GradFn, weights: Weights, batch: Batch, key: Key) -> Upload:
        """Run the client on one batch. Pure, so that it lifts and so that an attacker can differentiate through it."""
        ...

    def scale(self, examples: int) -> float:
        """What the upload is a multiple of: it is about so many times the gradient of ``examples`` images."""
        ...

    def steps(self, examples: int) -> int:
        """Local steps on so many images."""
        ...

    def order_matters(self, examples: int) -> bool:
        """Whether the upload depends on an order of the images that only the client knows."""
        ...

    def describe(self) -> str:
        """A few words for the report."""
        ...


@RULES.add(name="gradient")
@dataclass(frozen=True)
class SingleGradient:
    """The client sends the gradient of one batch (FedSGD)."""

    def __call__(self, gradient: GradFn, weights: Weights, batch: Batch, key: Key) -> Upload:
        """The gradient itself, unchanged buffers, and the number of real examples."""
        return Upload(gradient(weights, batch, key), weights.buffers, (batch.share > 0).sum())

    def scale(self, examples: int) -> float:
        """1: the gradient itself."""
        return 1.0

    def steps(self, examples: int) -> int:
        """1."""
        return 1

    def order_matters(self, examples: int) -> bool:
        """Never: a sum has no order."""
        return False

    def describe(self) -> str:
        """A few words for the report."""
        return "the gradient of one batch"


@RULES.add(
    name="sgd",
    paper="McMahan et al. 2017, Communication-efficient learning of deep networks from decentralized data",
    arxiv="1602.05629",
    version=2,
)
@dataclass(frozen=True)
class LocalSGD:
    """The client trains for some epochs and sends how far its weights moved (FedAvg, algorithm 1).

    ``update = w_0 - w_T`` after T steps ``w <- w - lr g``, each on the next ``batch_size`` images; the last batch of an
    epoch may be smaller. The update is what the server subtracts.

    Args:
        epochs: passes over the client's images, at least 1.
        lr: learning rate, above 0.
        batch_size: images in a step, at least 1.
        order: ``fixed`` goes through the images in the same order each epoch, sorted by class, so that whoever knows
            the labels knows it; ``shuffled`` draws a fresh order each epoch, known to nobody else.
    """

    epochs: int = 1
    lr: float = 0.01
    batch_size: int = 1
    order: Order = "fixed"

    def __post_init__(self) -> None:
        check_range("client.epochs", self.epochs, 1)
        check_range("client.lr", self.lr, 0, math.inf, open_low=True, open_high=True)
        check_range("client.batch_size", self.batch_size, 1)

    def __call__(self, gradient: GradFn, weights: Weights, batch: Batch, key: Key) -> Upload:
        """How far the weights moved, unchanged buffers, and the number of real examples."""
        update = descend(gradient, weights, self._minibatches(batch, key), self.lr, key)
        return Upload(update, weights.buffers, (batch.share > 0).sum())

    def _minibatches(self, batch: Batch, key: Key) -> Iterable[Batch]:
        count = batch.inputs.shape[0]
        for epoch in range(self.epochs):
            ordered = batch
            if self.order == "shuffled":
                rows = permutation(fold_in(key, f"order {epoch}"), count)
                ordered = Batch(*(part.index_select(0, rows) for part in batch))
            yield from minibatches(ordered, self.batch_size)

    def scale(self, examples: int) -> float:
        """Learning rate times steps."""
        return self.lr * self.steps(examples)

    def steps(self, examples: int) -> int:
        """Epochs times batches in an epoch."""
        return self.epochs * -(-examples // self.batch_size)

    def order_matters(self, examples: int) -> bool:
        """Where several batches are drawn in a fresh order."""
        return self.order == "shuffled" and self.batch_size < examples

    def describe(self) -> str:
        """A few words for the report."""
        epochs = f"{self.epochs} local epoch{'s' * (self.epochs != 1)}"
        return f"{epochs} of SGD with batches of {self.batch_size}, learning rate {self.lr:g}, order {self.order}"


def minibatches(batch: Batch, size: int) -> Iterable[Batch]:
    """A batch cut into steps of ``size`` examples, the last one maybe smaller; shares sum to 1 in each."""
    for start in range(0, batch.inputs.shape[0], size):
        inputs, targets, share = (part[start : start + size] for part in batch)
        yield Batch(inputs, targets, share / share.sum().clamp(min=1e-12))


def descend(gradient: GradFn, weights: Weights, steps: Iterable[Batch], lr: float, key: Key) -> Tensors:
    """Plain SGD over the given batches: how far the weights moved, ``w_0 - w_T``."""
    here = weights
    for number, batch in enumerate(steps):
        slope = gradient(here, batch, fold_in(key, f"step {number}"))
        here = Weights(map_tensors(lambda w, g: w - lr * g, here.params, slope), here.buffers)
    return map_tensors(lambda a, b: a - b, weights.params, here.params)
