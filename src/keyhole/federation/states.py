"""The states of a network that an audit can name: ``early`` and ``late`` in federated training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keyhole.core.defense import Defense
from keyhole.core.keys import advance, fold_in, new_key
from keyhole.core.task import Task
from keyhole.core.types import Batch, Key, Weights
from keyhole.errors import ModelError, check_range
from keyhole.federation.local import LocalTraining, Round, Spread, State, train_round
from keyhole.federation.norms import evaluating
from keyhole.federation.partition import dirichlet, iid
from keyhole.federation.strategies import FedAvg, Memory

Progress = Callable[[int, int, float], None]
"""Called after each round with the rounds done, the rounds to do and the round's mean training loss."""

Clients = Callable[[Weights, int], tuple[Round, float]]
"""Runs all clients of a round elsewhere, from the global weights and the number of rounds done: what they send, without
states, which they keep themselves, and the mean seconds of one."""

_SLICE = 256
"""Images in one forward pass of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Federated averaging with all clients in every round.

    Args:
        rounds: how often the server averages, at least 1.
        clients: number of clients, at least 1.
        epochs: passes over a client's images in a round, at least 1.
        lr: learning rate, above 0.
        batch_size: images in a batch, at least 1.
        momentum: momentum of local SGD, 0 to below 1; clients begin each round without any.
        weight_decay: factor of the weights that joins the gradient, at least 0.
        clip: largest Euclidean norm of a step's gradient, above 0; `None` does not clip.
        alpha: how far clients are apart (`keyhole.federation.partition.dirichlet`); `None` deals images out at random.

    The clip lets one learning rate serve very different networks. Without it, this rate overshoots in the first steps
    of networks with BatchNorm, and saturates the sigmoids of `lenet_zhu` for good; a rate low enough for those is slow
    for the others.
    """

    rounds: int
    clients: int = 8
    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, 1)
        check_range("clients", self.clients, 1)
        check_range("alpha", 1.0 if self.alpha is None else self.alpha, 0, open_low=True)
        self.local()

    def local(self, strategy: FedAvg | None = None) -> LocalTraining:
        """What each client does in a round."""
        proximal = strategy.proximal if strategy is not None else 0.0
        return LocalTraining(
            self.epochs, self.lr, self.batch_size, self.momentum, self.weight_decay, self.clip, proximal
        )

    def deal(self, labels: Tensor, key: Key) -> tuple[Tensor, ...]:
        """Row indices of each client."""
        if self.alpha is None:
            return iid(labels, self.clients, key)
        return dirichlet(labels, self.clients, self.alpha, key)


EARLY = Federation(rounds=2)
"""A network that has begun to learn."""

LATE = Federation(rounds=30)
"""A network that knows its training images."""

STATES = {"early": EARLY, "late": LATE}
"""By the name that an audit file gives them."""


class AfterRound(NamedTuple):
    """Where federated training stands."""

    number: int
    """Rounds done."""
    weights: Weights
    loss: float
    """Mean training loss of the round over all images, each client's before its steps."""
    clients: Round | None = None
    """What the round's clients sent."""
    memory: Memory | None = None
    """What the server keeps for the next round."""
    seconds: float = math.nan
    """Wall time of a client's round, its defense included: the mean over clients."""


def rounds(
    task: Task,
    weights: Weights,
    inputs: Tensor,
    labels: Tensor,
    federation: Federation,
    key: Key,
    *,
    done: int = 0,
    together: int | None = None,
    defense: Defense | None = None,
    public: Batch | None = None,
    strategy: FedAvg | None = None,
    memory: Memory | None = None,
    states: Sequence[State] | None = None,
    spread: Spread = map,
    clients: Clients | None = None,
) -> Iterator[AfterRound]:
    """Train by federated averaging, round by round; deterministic in ``key``.

    Args:
        task: made with ``batchnorm="train_shared"`` and ``dropout="active"`` where the model has such layers, and
            changed by the defense's `on_task`.
        weights: to begin with, left as they are; or where ``done`` rounds had led: with ``memory`` and ``states`` as
            they were, training then goes on as if it had never stopped.
        inputs: images in the model's input space, (n, *shape), on the weights' device and of their type.
        labels: class indices, int64 of shape (n,).
        federation: how to train.
        key: who gets which image, the order of images, and dropout.
        done: rounds that are already done.
        together: clients in one lifted step, see `keyhole.federation.local.train_round`.
        defense: what clients do to protect their images, see there.
        public: public images with labels, for the defense.
        strategy: what the server does; by default it averages.
        memory: what the server kept after the rounds that are done.
        states: what the defense kept of each client after them.
        spread: where clients are trained.
        clients: runs the clients of a round, as `train_round` would; by default that does it here.

    Raises:
        ModelError: training diverged.
    """
    strategy = strategy or FedAvg()
    memory = strategy.begin(weights) if memory is None else memory
    local = federation.local(strategy)
    parts = federation.deal(labels.cpu(), fold_in(key, "clients"))
    targets = torch.nn.functional.one_hot(labels, task.num_classes).to(inputs.device, inputs.dtype)
    for number in range(done, federation.rounds):
        if clients is not None:
            trained, mean = clients(weights, number)
        else:
            seconds: list[float] = []
            trained = train_round(
                task, weights, inputs, targets, parts, local, round_key(key, number),
                number=number, together=together, defense=defense, states=states, public=public,
                spread=spread, spent=seconds.append,
            )  # fmt: skip
            mean = math.fsum(seconds) / len(parts)
        states = trained.states
        weights, memory = strategy.aggregate(weights, trained.weights, trained.examples, memory)
        share = trained.examples.double() / trained.examples.sum()
        loss = float((trained.loss.double().cpu() * share).sum())
        if not all(bool(torch.isfinite(t).all()) for t in (torch.tensor(loss), *weights.params.values())):
            raise ModelError(f"training diverged in round {number + 1} with lr = {federation.lr:g}; lower it.")
        yield AfterRound(number + 1, weights, loss, trained, memory, mean)


def round_key(key: Key, number: int) -> Key:
    """The randomness of one round's clients."""
    return fold_in(fold_in(key, "round"), number)


def accuracy(task: Task, weights: Weights, inputs: Tensor, labels: Tensor) -> float:
    """Share of images that the network gets right; see `guessed_right`."""
    return int(guessed_right(task, weights, inputs, labels).sum()) / len(labels)


@torch.no_grad()
def guessed_right(task: Task, weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
    """Which images the network gets right, with BatchNorm's running statistics and without dropout: bool of shape (n,).

    Noise that a layer keeps after training is drawn once, always the same.

    Args:
        task: in whatever mode.
        weights: parameters and buffers.
        inputs: images in the model's input space, (n, *shape).
        labels: class indices, int64 of shape (n,).
    """
    task = evaluating(task)
    right = []
    for start in range(0, len(labels), _SLICE):
        part = inputs[start : start + _SLICE]
        masks = task.masks(advance(new_key(0, part.device), start), len(part))
        guesses = task.logits(weights, part, masks).argmax(-1)
        right.append(guesses == labels[start : start + _SLICE].to(guesses.device))
    return torch.cat(right)
