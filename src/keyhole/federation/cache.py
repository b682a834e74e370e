"""Trained states on disk: trained once, found again by what they were trained from."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from keyhole.core.keys import new_key, uniform
from keyhole.core.task import Task
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Key, Weights
from keyhole.errors import cause
from keyhole.federation.states import Federation, Progress, accuracy, rounds
from keyhole.solve.files import (
    as_metadata,
    cache_folder,
    digest,
    feed,
    held,
    read_tensors,
    take,
    tensors_as_bytes,
    unusable,
    write_whole,
)

TRAINING_VERSION = 1
"""Raise it when the same call would give other weights."""

_PARTS = ("params", "buffers")


@dataclass(frozen=True)
class Facts:
    """How a training went."""

    rounds: int
    losses: tuple[float, ...]
    """Mean training loss of each round."""
    accuracy: float
    """Share of the training images that the trained network gets right, in eval mode."""


def trained_state(
    task: Task,
    weights: Weights,
    inputs: Tensor,
    labels: Tensor,
    federation: Federation,
    key: Key,
    progress: Progress | None = None,
    *,
    together: int | None = None,
    folder: Path | None = None,
) -> tuple[Weights, Facts]:
    """What `keyhole.federation.states.rounds` end with, but what was trained before is read from the cache.

    A file is named by a digest of the initial weights, what the model makes of them, its modes, the images and labels,
    the federation, the key and `TRAINING_VERSION`. It is written after each round, so that an interrupted training
    goes on after its last whole round, to the same result. A file that is damaged, or does not hold what it should, is
    never used: a warning, and training begins anew. Of several processes that ask for one state, one trains and the
    others wait. The files can be read by their owner alone, as weights tell of the images.

    Neither the device nor ``together`` is part of the name: they change rounding only, and whoever comes first decides.

    Args:
        task: see there, as for the rest.
        weights: to begin with.
        inputs: images in the model's input space, on the weights' device.
        labels: class indices.
        federation: how to train.
        key: the training's randomness.
        progress: called after each round that is trained here.
        together: clients in one lifted step.
        folder: where to keep states, by default `keyhole.solve.files.cache_folder`.

    Raises:
        ModelError: training diverged.
        StoreError: the folder cannot be written to.
    """
    name = _name(task, weights, inputs, labels, federation, key)
    with held(folder or cache_folder(), name) as path:
        found = _load(path, weights, federation.rounds)
        losses: list[float] = []
        if found is not None:
            weights, losses, known = found
            if known is not None:
                return weights, Facts(federation.rounds, tuple(losses), known)
        steps = rounds(task, weights, inputs, labels, federation, key, done=len(losses), together=together)
        for number, weights, loss, *_ in steps:
            losses.append(loss)
            right = accuracy(task, weights, inputs, labels) if number == federation.rounds else None
            _save(path, weights, losses, right)
            if progress is not None:
                progress(number, federation.rounds, loss)
    assert right is not None
    return weights, Facts(federation.rounds, tuple(losses), right)


# Names


def _name(task: Task, weights: Weights, inputs: Tensor, labels: Tensor, federation: Federation, key: Key) -> str:
    hashed = hashlib.sha256()
    settings = {
        "version": TRAINING_VERSION,
        "federation": asdict(federation),
        "key": key.tolist(),
        "modes": [task.batchnorm, [list(map(str, drop)) for drop in task.drops]],
        "probe": probe(task, weights),
    }
    hashed.update(json.dumps(settings, sort_keys=True).encode())
    hashed.update(digest(*weights).encode())
    for tensor in (inputs, labels):
        feed(hashed, tensor)
    return hashed.hexdigest()


def probe(task: Task, weights: Weights) -> list[str]:
    """What the model and its loss make of weights: equal weights do not mean equal forward passes."""
    # In float64, so that the rounded values do not depend on threads or device.
    wide = Weights(*(map_tensors(lambda t: t.double() if t.is_floating_point() else t, part) for part in weights))
    device = next(iter(wide.params.values())).device
    inputs = uniform(new_key(0), (2, *task.input_shape), torch.float64).to(device)
    logits = task.logits(wide, inputs)
    losses = task.loss(logits, torch.eye(task.num_classes, dtype=torch.float64, device=device)[:2])
    return [f"{value:.4g}" for value in (*logits.flatten().tolist(), *losses.flatten().tolist())]


# Files


def _save(path: Path, weights: Weights, losses: list[float], right: float | None) -> None:
    """Write atomically, readable by the owner alone."""
    named = {
        f"{part}/{name}": tensor
        for part, tensors in zip(_PARTS, weights, strict=True)
        for name, tensor in tensors.items()
    }
    account = {"losses": losses, "accuracy": right, "digest": digest(*weights)}
    try:
        write_whole(path, tensors_as_bytes(named, as_metadata(account)))
    except OSError as error:
        raise unusable(path.parent, error) from error


def _load(path: Path, like: Weights, count: int) -> tuple[Weights, list[float], float | None] | None:
    """Weights, losses so far, and accuracy where training is complete; `None` where there is nothing to trust."""
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        stored, account = read_tensors(path)
        weights = Weights(
            *(
                {name: take(stored, f"{part}/{name}", tensor) for name, tensor in tensors.items()}
                for part, tensors in zip(_PARTS, like, strict=True)
            )
        )
        if stored:
            raise ValueError(f"it holds '{next(iter(stored))}', which the model has not")
        losses, right = [float(loss) for loss in account["losses"]], account["accuracy"]
        if account["digest"] != digest(*weights):
            raise ValueError("its values are not those that were written")
        if not 1 <= len(losses) <= count or (right is not None) != (len(losses) == count):
            raise ValueError(f"it tells of {len(losses)} rounds")
        return weights, losses, None if right is None else float(right)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({cause(error)}); the state is trained anew.", stacklevel=3)
        return None
