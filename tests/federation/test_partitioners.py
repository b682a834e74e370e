"""Flower's partitioners over labels: nothing twice, nothing lost where nothing should be, and the shares they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("flwr_datasets")

from keyhole.core.keys import new_key
from keyhole.errors import ConfigError
from keyhole.federation.partitioners import PARTITIONERS, PartitionedByFlower

# Classes with a gap, as a data set's pool may have.
LABELS = torch.tensor([0, 2, 3, 7, 9])[torch.arange(400) % 5]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("exponential", {}),
    ("linear", {}),
    ("square", {}),
    ("flower_dirichlet", {"alpha": 0.5}),
    ("flower_dirichlet", {"alpha": 0.5, "balanced": True, "min_size": 30}),
    ("inner_dirichlet", {"alpha": 0.3}),
    ("pathological", {"classes_per_client": 2, "class_assignment": "deterministic"}),
    ("pathological", {"classes_per_client": 3, "class_assignment": "first-deterministic"}),
    ("shard", {"shards_per_client": 2}),
    ("shard", {"shard_size": 20}),
]


def deal(name: str, options: dict[str, Any], seed: int = 0, clients: int = 5, labels: Tensor = LABELS) -> list[Tensor]:
    federation = PartitionedByFlower(rounds=1, clients=clients, partitioner=name, options=options)
    return list(federation.deal(labels, new_key(seed)))


def sizes(name: str, **options: Any) -> list[int]:
    return [len(part) for part in deal(name, options)]


def classes(parts: list[Tensor]) -> list[set[int]]:
    return [set(LABELS[part].tolist()) for part in parts]


def test_every_partitioner_is_tested() -> None:
    assert {name for name, _ in CASES} == set(PARTITIONERS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_image_has_one_client_and_the_key_decides_which(name: str, options: dict[str, Any]) -> None:
    one, same, other = deal(name, options), deal(name, options), deal(name, options, seed=1)
    assert torch.cat(one).sort().values.tolist() == list(range(400))
    assert all(part.dtype == torch.int64 and len(part) > 0 for part in one)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(a.sort().values.tolist() == b.sort().values.tolist() for a, b in zip(one, other, strict=True))


def test_sizes_follow_the_clients_number() -> None:
    assert sizes("linear") == [26, 53, 80, 106, 135]  # 400 j / 15, rounded down, the rest to the last
    assert sizes("square") == [7, 29, 65, 116, 183]  # 400 j^2 / 55
    shares = np.exp(np.arange(1, 6))
    expected = np.floor(400 * shares / shares.sum()).astype(int)
    expected[-1] += 400 - expected.sum()
    assert sizes("exponential") == expected.tolist()
    # Of all classes: images are in random order before they are dealt out.
    assert classes(deal("linear", {}))[0] == {0, 2, 3, 7, 9}


def test_a_pathological_client_has_as_many_classes_as_asked_for() -> None:
    wanted = [{0, 2}, {2, 3}, {3, 7}, {7, 9}, {9, 0}]
    assert classes(deal("pathological", {"classes_per_client": 2, "class_assignment": "deterministic"})) == wanted
    first = classes(deal("pathological", {"classes_per_client": 2, "class_assignment": "first-deterministic"}))
    assert all(len(own) == 2 and label in own for own, label in zip(first, (0, 2, 3, 7, 9), strict=True))


def test_shards_are_of_few_classes_and_of_one_size() -> None:
    parts = deal("shard", {"shards_per_client": 2})
    # Ten shards of 40: each within one class of 80.
    assert {len(part) for part in parts} == {80} and all(len(own) <= 2 for own in classes(parts))
    # 400 images are 13 shards of 30 and some more: three clients have three shards.
    assert sizes("shard", shard_size=30) == [90, 90, 90, 60, 60]


def test_classes_that_no_client_was_given_are_left_over() -> None:
    parts = deal("pathological", {"classes_per_client": 1, "class_assignment": "deterministic"}, clients=2)
    assert classes(parts) == [{0}, {2}]


def test_dirichlet_clients_are_as_far_apart_as_alpha_says() -> None:
    def most(alpha: float, name: str) -> float:
        """The largest share of a class in a client, averaged over clients."""
        parts = deal(name, {"alpha": alpha} | ({"min_size": 1} if name == "flower_dirichlet" else {}))
        return float(np.mean([np.bincount(LABELS[part].numpy()).max() / len(part) for part in parts]))

    for name in ("flower_dirichlet", "inner_dirichlet"):
        assert most(1000.0, name) < 0.3 and most(0.1, name) > 0.4
    assert {len(part) for part in deal("inner_dirichlet", {"alpha": 0.1})} == {80}
    assert max(sizes("flower_dirichlet", alpha=0.5, balanced=True)) < max(sizes("flower_dirichlet", alpha=0.5))
    assert min(sizes("flower_dirichlet", alpha=5.0, min_size=50)) >= 50


@pytest.mark.parametrize(
    ("name", "options", "clients", "said"),
    [
        ("exponential", {}, 20, 'partition = "exponential" failed'),
        ("pathological", {"classes_per_client": 6}, 5, "is greater than the number of unique classes"),
        ("shard", {"shards_per_client": 2, "shard_size": 300}, 5, "the creation of the partitions is impossible"),
        ("shard", {"shards_per_client": 81}, 5, "400 images cannot be cut into 405 shards"),
        ("shard", {"shard_size": 300}, 5, "results in empty partitions"),
        ("flower_dirichlet", {"alpha": 0.01, "min_size": 81}, 5, "max number of attempts"),
        ("linear", {}, 401, "401 clients cannot share 400 images"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(name: str, options: dict[str, Any], clients: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        deal(name, options, clients=clients)
    assert "\n" not in str(error.value)
