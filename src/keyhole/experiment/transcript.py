"""A transcript: what the server of a real federation sent and got, round by round, as `keyhole.fl.Recorder` writes it.

::

    transcript.json                  what this is, its version, the strategy, why it ended early
    round-0001/round.json            config sent, and for each client: images, metrics, files, or why it has none
    round-0001/weights.safetensors   global weights as sent (weights-2 and so on where clients got different ones)
    round-0001/client-42.safetensors how far client 42 moved, sent minus returned: what the server subtracts

A round's folder appears whole or not at all. Everything is read with safetensors and JSON; pickles are never loaded.
This file needs no Flower.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.core.types import Observation, Tensors, Weights
from keyhole.errors import ConfigError, DataError, cause

KIND = "keyhole transcript"
VERSION = 1
"""Raise it when older versions of Keyhole could not read what is written."""

TRANSCRIPT, ROUND = "transcript.json", "round.json"

_TYPES = frozenset(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    + [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
"""Of tensors in files; others, such as the 8-bit floats, cannot be computed with."""


def round_folder(number: int) -> str:
    """Name of a round's folder."""
    return f"round-{number:04d}"


def client_file(client: str) -> str:
    """Name of a client's file, in a transcript or among the secrets of a test run."""
    return f"client-{client}.safetensors"


def as_json(value: Any) -> bytes:
    """JSON as it is written in transcripts."""
    return json.dumps(value, indent=1).encode()


@dataclass(frozen=True, eq=False)
class Recorded:
    """One client's update in one round."""

    round: int
    client: str
    weights: Weights
    """What the client was sent."""
    update: Tensors
    """Parameters: what the server subtracts."""
    examples: int | None
    """How many images the client says it trained on, at least 1."""
    config: dict[str, Any]
    """What the server told it, such as a learning rate."""
    moved: Tensors = field(default_factory=dict)
    """Buffers, such as BatchNorm's running statistics: sent minus returned, of those that came back."""
    parts: tuple[Recorded, ...] = ()
    """Whose mean it is, as secure aggregation shows it; empty for a client's own update."""
    statistics: Tensors | None = None
    """Mean and variance of each BatchNorm layer's input over the batch, where they were worked out."""

    @property
    def observation(self) -> Observation:
        """What an attacker at the server sees."""
        return Observation(weights=self.weights, update=self.update, statistics=self.statistics)

    @property
    def name(self) -> str:
        """Whose update it is, in words."""
        return f"round {self.round}, " + (f"{self.client} clients" if self.parts else f"client {self.client}")


@dataclass(frozen=True, eq=False)
class Transcript:
    """A run as its server saw it."""

    about: dict[str, Any]
    """What ``transcript.json`` says."""
    updates: tuple[Recorded, ...]
    """By round, then by client."""
    missing: tuple[str, ...]
    """Clients without an update that can be read, and why."""
    recorded: int = 0
    """Updates that were recorded, read or not."""
    unread: frozenset[int] = frozenset()
    """Rounds in which an update came that cannot be read, so that the round's sum is not known."""
    gaps: tuple[tuple[int, int], ...] = ()
    """Rounds before the last one that are not there, each run of them as its first and last."""


class NotFinite(DataError):
    """A file holds NaN or infinity."""


class Partial(DataError):
    """A client returned only some of the arrays that it was sent."""


@dataclass(frozen=True, eq=False)
class Secret:
    """What a client of a test run trained on, in order."""

    inputs: Tensor
    """In the model's input space, (n, *shape)."""
    labels: Tensor
    """int64 (n,)."""


def read_transcript(
    folder: Path,
    model: nn.Module,
    rounds: Collection[int] | None = None,
    clients: Collection[str] | None = None,
) -> Transcript:
    """Read and check a transcript.

    Args:
        folder: what `keyhole.fl.Recorder` wrote.
        model: what was trained, for names and shapes.
        rounds: those that are read; by default all. Files of others are not even looked at.
        clients: likewise.

    Raises:
        DataError: it is no transcript, of a newer Keyhole or another model, cut short, holds pickles, or nothing of it
            is an update to read. Updates with NaN and parts of updates are listed as missing.
    """
    about = _json(folder / TRANSCRIPT, f"'{folder}' is no transcript")
    if about.get("kind") != KIND:
        raise DataError(f"'{folder / TRANSCRIPT}' does not describe a transcript of Keyhole.")
    version = about.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataError(
            f"transcript '{folder}' has version {version!r}, of a newer Keyhole; this one reads up to {VERSION}."
        )
    updates: list[Recorded] = []
    missing: list[str] = []
    unread: set[int] = set()
    numbers: set[int] = set()
    recorded = chosen = 0
    for place in sorted(folder.glob("round-[0-9]*")):
        if not place.is_dir() or place.suffix:
            continue
        told, number = _told(place)
        numbers.add(number)
        recorded += sum("error" not in one for one in told["clients"])
        if rounds is not None and number not in rounds:
            continue
        wanted = [one for one in told["clients"] if clients is None or str(one.get("client")) in clients]
        chosen += len(wanted)
        found, without, whole_round = _read_round(place, number, told, wanted, model)
        updates += found
        missing += without
        if not whole_round:
            unread.add(number)
    if recorded and not chosen:
        raise ConfigError("no recorded update has a round and client that rounds and clients accept.")
    if not updates:
        why = f": {missing[0].splitlines()[0].rstrip('.')}" if missing else ""
        raise DataError(f"transcript '{folder}' holds no update of a complete round{why}.")
    there = sorted({0, *numbers})
    gaps = tuple((last + 1, after - 1) for last, after in pairwise(there) if after > last + 1)
    return Transcript(about, tuple(updates), tuple(missing), recorded, frozenset(unread), gaps)


def read_secret(folder: Path, number: int, client: str) -> Secret | None:
    """What `keyhole.fl.record_batches` kept of a client's round; `None` where it kept nothing."""
    path = folder / round_folder(number) / client_file(client)
    if not path.exists():
        return None
    tensors = read_tensors(path, "secrets")
    if set(tensors) != {"inputs", "labels"} or len(tensors["inputs"]) != len(tensors["labels"]):
        raise DataError(f"secrets '{path}' need 'inputs' and as many 'labels'.")
    return Secret(tensors["inputs"], tensors["labels"].long())


def read_tensors(path: Path, what: str, size: int | None = None) -> Tensors:
    """A safetensors file, checked for its length and for values that are not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{what} file '{path}' is missing: the {what} is cut short.") from error
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        # A pickle begins with its protocol, and what torch.save writes is a zip file with one inside.
        if data[:1] == b"\x80" or data[:4] == b"PK\x03\x04":
            raise DataError(f"{what} file '{path}' is a pickle, which could run code and is never loaded.") from error
        raise DataError(f"{what} file '{path}' is damaged or cut short ({cause(error)}).") from error
    if size is not None and len(data) != size:
        raise DataError(f"{what} file '{path}' is cut short or was exchanged: {len(data)} bytes, not {size}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise DataError(f"{what} file '{path}': '{name}' is of type {tensor.dtype}, which is not read.")
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"{what} file '{path}': '{name}' holds NaN or infinity.")
    return tensors


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{what}: it has no {path.name}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is damaged or cut short ({cause(error)}).") from error
    if not isinstance(found, dict):
        raise DataError(f"'{path}' is damaged: it holds no JSON object.")
    return found


def _told(place: Path) -> tuple[dict[str, Any], int]:
    """What a round's list says, and the round's number."""
    told = _json(place / ROUND, f"round '{place}' is cut short")
    try:
        clients = told["clients"]
        if not (isinstance(clients, list) and all(isinstance(one, dict) for one in clients)):
            raise ValueError("its clients are no list of objects")
        number = int(told["round"])
        own = round_folder(number)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"'{place / ROUND}' is damaged ({cause(error)}).") from error
    if own != place.name:
        raise DataError(f"'{place / ROUND}' is of the folder '{own}'; one of the two was changed.")
    return told, number


def _read_round(
    place: Path, number: int, told: dict[str, Any], wanted: list[dict[str, Any]], model: nn.Module
) -> tuple[list[Recorded], list[str], bool]:
    """Updates, clients without one and why, and whether all that came could be read."""
    shared: dict[str, Weights] = {}
    updates: list[Recorded] = []
    missing: list[str] = []
    complete = True
    try:
        sizes = dict(told["files"])
        for one in wanted:
            client, examples = str(one["client"]), one.get("examples")
            if "error" in one:
                missing.append(f"round {number}, client {client}: {one['error']}")
                continue
            if not (examples is None or whole(examples)):
                missing.append(f"round {number}, client {client}: it says that it trained on {examples!r} images.")
                complete = False
                continue
            name = str(one["weights"])
            for used in (name, str(one["update"])):
                if used not in sizes or "/" in used:
                    raise ValueError(f"'{used}' is not among its files")
            try:
                if name not in shared:
                    shared[name] = _weights(place / name, int(sizes[name]), model)
                update, moved = _update(place / one["update"], int(sizes[one["update"]]), model)
            except (NotFinite, Partial) as error:
                missing.append(f"round {number}, client {client}: {error}")
                complete = False
                continue
            known = None if examples is None else int(examples)
            config = dict(one.get("config", {}))
            updates.append(Recorded(number, client, shared[name], update, known, config, moved))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"'{place / ROUND}' is damaged ({cause(error)}).") from error
    return sorted(updates, key=lambda one: one.client), missing, complete


def whole(number: Any) -> bool:
    """Whether something read from JSON is a whole number from 1 on, and one that a float can hold."""
    return not isinstance(number, bool) and isinstance(number, int | float) and 1 <= number < 2**53 and number % 1 == 0


def _weights(path: Path, size: int, model: nn.Module) -> Weights:
    tensors = read_tensors(path, "transcript", size)
    expected = model.state_dict()
    _same_names(path, set(tensors), set(expected))
    for name, tensor in tensors.items():
        _same_shape(path, name, tensor, expected[name])
    params = {name for name, _ in model.named_parameters()}
    return Weights(
        {name: tensors[name].to(expected[name].dtype) for name, _ in model.named_parameters()},
        {name: tensors[name] for name, _ in model.named_buffers() if name in tensors and name not in params},
    )


def _update(path: Path, size: int, model: nn.Module) -> tuple[Tensors, Tensors]:
    """How far parameters moved, and those buffers that came back."""
    tensors = read_tensors(path, "transcript", size)
    expected = dict(model.named_parameters())
    missing = sorted(set(expected) - set(tensors))
    if missing and set(tensors) <= set(model.state_dict()):
        raise Partial(
            f"it returned only some of the arrays that it was sent ('{missing[0]}' is missing), and a part of an "
            "update is not attacked; record a run whose clients return the whole model."
        )
    if missing:
        raise DataError(f"transcript file '{path}' lacks '{missing[0]}'; it is of another model.")
    for name, parameter in expected.items():
        _same_shape(path, name, tensors[name], parameter)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in tensors and name not in expected}
    for name, buffer in buffers.items():
        _same_shape(path, name, tensors[name], buffer)
    update = {name: tensors[name].to(parameter.dtype) for name, parameter in expected.items()}
    return update, {name: tensors[name] for name in buffers}


def _same_names(path: Path, found: set[str], expected: set[str]) -> None:
    for name in sorted(expected - found):
        raise DataError(f"transcript file '{path}' lacks '{name}'; it is of another model.")
    for name in sorted(found - expected):
        raise DataError(f"transcript file '{path}' has '{name}', which the model has not; it is of another model.")


def _same_shape(path: Path, name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        shapes = f"{tuple(tensor.shape)}, the model's has {tuple(expected.shape)}"
        raise DataError(f"transcript file '{path}': '{name}' has shape {shapes}; it is of another model.")
