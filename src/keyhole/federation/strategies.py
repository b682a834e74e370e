"""Strategies: what the server makes of a round, and what clients add to their objective for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyhole.core.keys import fold_in, normal
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Key, Tensors, Weights
from keyhole.errors import check_range
from keyhole.federation.average import average

Memory = dict[str, Tensors]
"""What a server keeps between rounds, by name of the quantity and of the parameter."""


@dataclass(frozen=True)
class FedAvg:
    """The clients' average becomes the next global network; see `keyhole.federation.average.average`.

    Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    @property
    def proximal(self) -> float:
        """Factor of the proximal term in the clients' objective."""
        return 0.0

    def begin(self, weights: Weights) -> Memory:
        """What the server keeps before the first round."""
        return {}

    def aggregate(self, before: Weights, trained: Weights, examples: Tensor, memory: Memory) -> tuple[Weights, Memory]:
        """The next global weights.

        Args:
            before: the weights that the clients got.
            trained: what they sent, with a leading axis of clients.
            examples: number of images of each client, of shape (clients,).
            memory: what the server kept.
        """
        return average(trained, examples), memory


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg of clients that are held near the global weights ``w0``: each adds ``mu / 2 |w - w0|^2`` to its loss.

    Args:
        mu: factor of the proximal term, at least 0; 0 is FedAvg.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
    https://arxiv.org/abs/1812.06127, equation 2 and algorithm 2. Differs from it: every client is in every round, and
    does the same number of local epochs.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        check_range("mu", self.mu, 0)

    @property
    def proximal(self) -> float:
        """As given."""
        return self.mu


@dataclass(frozen=True)
class FedAdam(FedAvg):
    """The clients' mean movement ``D`` as the gradient of an Adam step at the server.

    ``m <- b1 m + (1 - b1) D``, ``v <- b2 v + (1 - b2) D^2``, ``w <- w + lr m / (sqrt(v) + tau)``, entry by entry, with
    ``m = 0`` and ``v = tau^2`` to begin with and no correction of their bias. Buffers are averaged.

    Args:
        lr: the server's learning rate, above 0.
        beta_1: b1, in [0, 1).
        beta_2: b2, in [0, 1).
        tau: how adaptive it is, above 0; large values make it plain momentum.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295, algorithm 2,
    which weights clients by their numbers of images in its experiments, as here.
    """

    lr: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_range("server_lr", self.lr, 0, open_low=True)
        check_range("beta_1", self.beta_1, 0, 1, open_high=True)
        check_range("beta_2", self.beta_2, 0, 1, open_high=True)
        check_range("tau", self.tau, 0, open_low=True)

    def begin(self, weights: Weights) -> Memory:
        """No momentum, and the least second moment that the paper allows."""
        return {
            "m": {name: value.new_zeros(value.shape) for name, value in weights.params.items()},
            "v": {name: value.new_full(value.shape, self.tau**2) for name, value in weights.params.items()},
        }

    def aggregate(self, before: Weights, trained: Weights, examples: Tensor, memory: Memory) -> tuple[Weights, Memory]:
        """An Adam step from the weights that the clients got."""
        mean = average(trained, examples)
        moved = map_tensors(lambda new, old: new - old, mean.params, before.params)
        m = map_tensors(lambda a, d: self.beta_1 * a + (1 - self.beta_1) * d, memory["m"], moved)
        v = map_tensors(lambda a, d: self.beta_2 * a + (1 - self.beta_2) * d.square(), memory["v"], moved)
        params = {name: w + self.lr * m[name] / (v[name].sqrt() + self.tau) for name, w in before.params.items()}
        return Weights(params, mean.buffers), {"m": m, "v": v}


@dataclass(frozen=True, eq=False)
class Noised(FedAvg):
    """Any strategy on a mean of clients that all weigh the same, with Gaussian noise on every parameter of it.

    The server's part of user-level differential privacy, `keyhole.defenses.user_dp.UserDP.server_noise`.

    Args:
        inner: what is done with the noisy mean.
        std: standard deviation of the noise, at least 0.
        key: of the noise; every round draws its own.

    Source: McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963, algorithm 1.
    """

    inner: FedAvg
    std: float
    key: Key

    @property
    def proximal(self) -> float:
        """As inside."""
        return self.inner.proximal

    def begin(self, weights: Weights) -> Memory:
        """What is kept inside, and the number of rounds."""
        return {**self.inner.begin(weights), "noised": {"rounds": torch.zeros((), dtype=torch.int64)}}

    def aggregate(self, before: Weights, trained: Weights, examples: Tensor, memory: Memory) -> tuple[Weights, Memory]:
        """The same noise on every client's weights is that noise on their mean."""
        done = memory["noised"]["rounds"]
        own = fold_in(self.key, int(done))
        noisy = {
            name: sent + self.std * normal(fold_in(own, name), tuple(sent.shape[1:]), sent.dtype).to(sent.device)
            for name, sent in trained.params.items()
        }
        sent = Weights(noisy, trained.buffers)
        weights, kept = self.inner.aggregate(before, sent, torch.ones_like(examples), memory)
        return weights, {**kept, "noised": {"rounds": done + 1}}
