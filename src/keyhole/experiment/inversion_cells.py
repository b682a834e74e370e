"""What attacker and judge of a model inversion share: the networks, and a file for what each attack made of each.

Cells are files, ``inversions/DEFENSE/seed-S/round-R-PLACE-ATTACK.safetensors``; what is there is not made again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyhole.core.inversion import Target
from keyhole.core.task import Task, weights_of
from keyhole.core.tensors import map_tensors
from keyhole.core.trial import Spec
from keyhole.core.types import Weights
from keyhole.errors import KeyholeError, StoreError, cause
from keyhole.solve.files import as_metadata, read_tensors, write_tensors
from keyhole.zoo.models import load_state

UNTRAINED = "untrained"
"""The round of a network that learned nothing."""


@dataclass(frozen=True, eq=False)
class Network:
    """The global network of one round: all of a federation that comes to an attacker."""

    defense: int
    """Index in the plan."""
    seed: int
    round: int | str
    """A number, or `UNTRAINED`."""
    name: str
    """For people."""
    task: Task
    """The architecture as clients under the defense train it, evaluating."""
    weights: Weights | Path
    """Where they are kept, if they are not here."""
    folder: Path
    """For what is made of it."""

    def target(self, device: torch.device) -> Target:
        """The network as an attack gets it."""
        weights = self.weights
        if isinstance(weights, Path):
            model = copy.deepcopy(self.task.model)
            load_state(model, weights)
            weights = weights_of(model)
        return Target(self.task, Weights(*(map_tensors(lambda t: t.to(device), part) for part in weights)))

    def cell(self, place: int, spec: Spec) -> Path:
        """The file of what an attack made of it.

        Args:
            place: of the attack in the plan.
            spec: the attack.
        """
        at = self.round if isinstance(self.round, str) else f"{self.round:03d}"
        return self.folder / f"round-{at}-{place}-{spec.name}.safetensors"


def grouped(networks: Iterable[Network], *names: str) -> list[list[Network]]:
    """Networks that are alike in these fields, all in the order in which they came."""
    found: dict[tuple[Any, ...], list[Network]] = {}
    for network in networks:
        found.setdefault(tuple(getattr(network, name) for name in names), []).append(network)
    return list(found.values())


def taken(target: Target, images: Tensor) -> float:
    """Share of images (k, n, c, h, w) that a network takes for the class they were made to show."""
    classes, each = images.shape[:2]
    with torch.no_grad():
        guesses = torch.cat([target.logits(part) for part in torch.split(images.flatten(0, 1), 256)]).argmax(-1)
    labels = torch.arange(classes, device=guesses.device).repeat_interleave(each)
    return float((guesses == labels).double().mean())


def write_cell(path: Path, tensors: dict[str, Tensor], account: dict[str, Any]) -> None:
    """Write what was made, and how; raises `StoreError`."""
    write_tensors(path, {name: tensor.float() for name, tensor in tensors.items()}, as_metadata(account))


def write_failed(path: Path, identity: str, error: KeyholeError) -> None:
    """Write that nothing could be made, and why."""
    write_cell(path, {"failed": torch.zeros(1)}, {"detail": str(error), "identity": identity})


def read_cell(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was made, and how; raises `StoreError` where the file is damaged."""
    from safetensors import SafetensorError

    try:
        return read_tensors(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"'{path}' is damaged ({cause(error)}); remove it, and run the same command again.") from error


def is_made(path: Path, identity: str) -> bool:
    """Whether a cell is done; a damaged file, or one made of another network or public images, is made again."""
    if not path.exists():
        return False
    try:
        _, account = read_cell(path)
    except StoreError:
        return False
    return bool(account.get("identity") == identity)
