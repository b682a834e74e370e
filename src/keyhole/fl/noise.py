"""The server's part of user-level differential privacy, around any of Flower's strategies that take a mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from torch import nn

from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.types import Key
from keyhole.defenses.user_dp import UserDP
from keyhole.errors import ConfigError, Refused
from keyhole.fl.convert import model_record, parameter_names, to_record, to_tensors
from keyhole.fl.mods import fresh_key

_LOG = logging.getLogger("keyhole.fl")

_MEANS = (FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi)
"""Strategies that make something of the clients' mean alone; noise on a median would be another noise."""


class ServerNoise(Strategy):
    """A strategy on a mean of clients that all weigh the same, with Gaussian noise on every parameter of it.

    Clients clip, with `keyhole.fl.DefenseMod` and the same `UserDP`; the server adds noise of standard deviation
    ``z C / m`` to the mean over the m clients that answered in a round. Buffers are averaged without noise, as are
    metrics: both may tell of the images.

    The noise is added to every reply, the same to all, before the strategy sees them, and their number of examples
    becomes 1. A `Recorder` goes around it, and keeps what the server saw before.

    Args:
        strategy: one that takes a mean: FedAvg, FedProx, FedAvgM, FedAdam, FedYogi or FedAdagrad.
        defense: what the clients use.
        model: the module that is trained, for the names of its parameters. All get noise, frozen ones too, as the
            server cannot know what its clients trained.
        seed: for simulations only; by default the operating system gives 64 bits of randomness in each round.

    Raises:
        ConfigError: the strategy does not take a mean, or the defense is another one.
        Refused: in training, a reply has arrays that the model has not, which would stay without noise.

    Example::

        strategy = ServerNoise(FedAvg(), UserDP(clip=1.0, noise_multiplier=1.0), Net())

    Source: McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963, algorithm 1. Differs: all clients weigh the
    same, and the server divides by the number of them that answered.
    """

    def __init__(self, strategy: FedAvg, defense: UserDP, model: nn.Module, *, seed: int | None = None) -> None:
        if not isinstance(strategy, FedAvg) or type(strategy).aggregate_train not in {
            kind.aggregate_train for kind in _MEANS
        }:
            names = ", ".join(kind.__name__ for kind in _MEANS)
            raise ConfigError(f"{type(strategy).__name__} is not known to take a mean of clients; these are: {names}.")
        if not isinstance(defense, UserDP):
            raise ConfigError(f"{type(defense).__name__} leaves no noise to the server; user_dp does.")
        self.strategy, self.defense, self.seed = strategy, defense, seed
        self.names, self.known = frozenset(parameter_names(model)), frozenset(model.state_dict())
        # What a `Recorder` asks for.
        self.weighted_by_key = strategy.weighted_by_key

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's, of noisy replies."""
        replies = list(replies)
        answered = [reply for reply in replies if not reply.has_error()]
        if answered:
            key, std = self._key(server_round), self.defense.server_noise(len(answered))
            for reply in answered:
                self._add(reply, key, std)
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The strategy's."""
        self.strategy.summary()

    def _key(self, number: int) -> Key:
        if self.seed is None:
            return fresh_key()
        _LOG.warning("A fixed seed: whoever knows it can take the server's noise off. Simulation only.")
        return fold_in(fold_in(new_key(self.seed), "server noise"), number)

    def _add(self, reply: Message, key: Key, std: float) -> None:
        place, record = model_record(reply.content, self.names, "the reply")
        for unknown in sorted(set(record) - self.known):
            raise Refused(f"the reply has '{unknown}', which the model given to ServerNoise has not.")
        noisy = {
            name: value + std * normal(fold_in(key, name), tuple(value.shape), value.dtype)
            for name, value in to_tensors(record).items()
            if name in self.names
        }
        reply.content[place] = to_record(noisy, record)
        for metrics in reply.content.metric_records.values():
            if self.weighted_by_key in metrics:
                metrics[self.weighted_by_key] = 1
