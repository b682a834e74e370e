"""Partitions by Flower Datasets: who has which images, as many papers on federated learning deal them out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keyhole.core.keys import fold_in, permutation
from keyhole.core.types import Key
from keyhole.errors import ConfigError, cause
from keyhole.federation.states import Federation

PARTITIONERS: dict[str, tuple[str, ...]] = {
    "exponential": (),
    "flower_dirichlet": ("alpha", "balanced", "min_size"),
    "inner_dirichlet": ("alpha",),
    "linear": (),
    "pathological": ("class_assignment", "classes_per_client"),
    "shard": ("shard_size", "shards_per_client"),
    "square": (),
}
"""Options by the name of the partitioner."""


@dataclass(frozen=True, kw_only=True)
class PartitionedByFlower(Federation):
    """A federation whose images ``flwr_datasets.partitioner`` deals out.

    - ``linear``, ``square``, ``exponential``: client j = 1, 2, ... has a share in proportion to j, j^2 or exp(j), of
      images at random.
    - ``pathological``: each client has ``classes_per_client`` classes (required), and shares each evenly with the
      others that have it. ``class_assignment`` is ``random``, ``deterministic`` (client j has classes j, j + 1, ...) or
      ``first-deterministic`` (class j and others at random).
    - ``shard``: images sorted by class are cut into shards. With ``shards_per_client`` each client has so many, as in
      McMahan et al. 2017 with 2; with ``shard_size`` alone all shards are dealt out, the first clients having one more.
    - ``flower_dirichlet``: as `keyhole.federation.partition.dirichlet` by ``alpha`` (required), but drawn anew, at
      most ten times, until each client has ``min_size`` images (10); ``balanced`` gives no more images to a client that
      has its even share already.
    - ``inner_dirichlet``: all clients have as many images, and each its own mix of classes, drawn by ``alpha``
      (required), as long as there are images of these classes left.

    Images are first put into random order, and all draws follow from the key. What a partitioner leaves over (classes
    that no client was given, what does not fill a shard) goes to no client.

    Args:
        partitioner: one of `PARTITIONERS`.
        options: those of the partitioner.

    Source: https://flower.ai/docs/datasets/ref-api/flwr_datasets.partitioner.html
    """

    partitioner: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def deal(self, labels: Tensor, key: Key) -> tuple[Tensor, ...]:
        """Row indices of each client."""
        if self.clients > len(labels):
            raise ConfigError(f"{self.clients} clients cannot share {len(labels)} images; each needs at least one.")
        shards = self.clients * (self.options.get("shards_per_client") or 0)
        if shards > len(labels):
            # Flower Datasets would divide by zero.
            raise ConfigError(f"{len(labels)} images cannot be cut into {shards} shards; lower shards_per_client.")
        parts = self._parts(labels, fold_in(key, "partitioner"))
        for client, part in enumerate(parts):
            if len(part) == 0:
                raise ConfigError(
                    f'client {client} has no images with partition = "{self.partitioner}"; choose other options or '
                    "fewer clients."
                )
        return parts

    def _parts(self, labels: Tensor, key: Key) -> tuple[Tensor, ...]:
        order = permutation(fold_in(key, "order"), len(labels))
        high, low = fold_in(key, "seed").tolist()
        # Numbered from 0 without gaps, as one of the partitioners takes for granted.
        classes = torch.unique(labels, return_inverse=True)[1][order]
        try:
            from datasets import Dataset
            from flwr_datasets import partitioner as flower
        except ImportError as error:
            raise ConfigError(
                f"federation.partition = \"{self.partitioner}\" needs Flower Datasets: pip install 'keyhole[flower]'."
            ) from error
        given = {_NAMES[name]: value for name, value in self.options.items() if value is not None}
        by_class = {"partition_by": "class", "seed": high << 32 | low, **given}
        count = {"num_partitions": self.clients}
        small, more = divmod(len(labels), self.clients)
        even = [small + (client < more) for client in range(self.clients)]
        make = {
            "exponential": lambda: flower.ExponentialPartitioner(**count),
            "flower_dirichlet": lambda: flower.DirichletPartitioner(**count, **by_class),
            "inner_dirichlet": lambda: flower.InnerDirichletPartitioner(partition_sizes=even, **by_class),
            "linear": lambda: flower.LinearPartitioner(**count),
            "pathological": lambda: flower.PathologicalPartitioner(**count, **by_class),
            "shard": lambda: flower.ShardPartitioner(**count, **by_class),
            "square": lambda: flower.SquarePartitioner(**count),
        }
        with warnings.catch_warnings():
            # Of what is left over, which can be counted, and of each attempt at a draw.
            warnings.simplefilter("ignore")
            try:
                dealer = make[self.partitioner]()
                dealer.dataset = Dataset.from_dict({"class": classes.tolist(), "row": order.tolist()})
                rows = [list(dealer.load_partition(client)["row"]) for client in range(self.clients)]
            except (ValueError, TypeError) as error:
                raise ConfigError(f'federation.partition = "{self.partitioner}" failed ({cause(error)}).') from error
        return tuple(torch.tensor(own, dtype=torch.int64) for own in rows)


_NAMES = {
    "alpha": "alpha",
    "balanced": "self_balancing",
    "class_assignment": "class_assignment_mode",
    "classes_per_client": "num_classes_per_partition",
    "min_size": "min_partition_size",
    "shard_size": "shard_size",
    "shards_per_client": "num_shards_per_partition",
}
