"""Files that are whole or absent, found again by what they were made from, and for their owner alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyhole.core.types import Tensors
from keyhole.errors import StoreError

_ACCOUNT = "account"


def cache_folder() -> Path:
    """``$KEYHOLE_CACHE``, or else ``keyhole`` in ``$XDG_CACHE_HOME``, or else ``~/.cache/keyhole``."""
    own = os.environ.get("KEYHOLE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "keyhole"


def feed(hashed: hashlib._Hash, tensor: Tensor) -> None:
    """Add a tensor's type, shape and values to a digest."""
    hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    hashed.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())


def digest(*parts: Tensors) -> str:
    """A digest of named tensors, part by part, in the order of their names."""
    hashed = hashlib.sha256()
    for part in parts:
        for name in sorted(part):
            hashed.update(name.encode())
            feed(hashed, part[name])
    return hashed.hexdigest()


@contextmanager
def held(folder: Path, name: str) -> Iterator[Path]:
    """The path of a cached file, while no other process reads or writes it; raises `StoreError`."""
    try:
        make_folder(folder)
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise unusable(folder, error) from error
        yield folder / f"{name}.safetensors"
    finally:
        os.close(lock)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the owner alone; raises `OSError`.

    What there is already keeps its mode: whoever made it may want to share what is in it.
    """
    # `Path.mkdir` gives its mode to the last folder alone.
    for place in (*reversed(folder.parents), folder):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file readable by the owner alone, all of it or nothing; raises `OSError`."""
    partial = path.with_suffix(".partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def tensors_as_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """Named tensors, with an account in words where there is one, as a safetensors file holds them."""
    from safetensors.torch import save

    # Cloned, as tensors that share memory cannot be saved.
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, metadata=metadata)


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """A safetensors file in an output folder, whole or not at all; raises `StoreError`."""
    data = tensors_as_bytes(tensors, metadata)
    try:
        make_folder(path.parent)
        write_whole(path, data)
    except OSError as error:
        raise StoreError(f"cannot write to the output folder '{path.parent}': {error.strerror}.") from error


def as_metadata(account: dict[str, Any]) -> dict[str, str]:
    """An account that JSON knows, as metadata of a safetensors file."""
    return {_ACCOUNT: json.dumps(account)}


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a safetensors file, and the account that is with them.

    Raises:
        SafetensorError, OSError, ValueError, KeyError: the file is damaged, or has no account.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        account = json.loads((file.metadata() or {})[_ACCOUNT])
        if not isinstance(account, dict):
            raise ValueError("its account is none")
        return {name: file.get_tensor(name) for name in file.keys()}, account  # noqa: SIM118  (no dictionary)


def take(stored: Tensors, name: str, like: Tensor) -> Tensor:
    """A tensor read from a file, removed from ``stored``, with the shape, type and device of ``like``.

    Raises:
        KeyError: there is none of that name.
        ValueError: it has another shape or type, or holds NaN or infinity.
    """
    tensor = stored.pop(name)
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"'{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"'{name}' holds NaN or infinity")
    # Cloned, so that the tensor lies in memory as freshly computed ones do.
    return tensor.clone().to(like.device)


def unusable(folder: Path, error: OSError) -> StoreError:
    """What to tell where the cache cannot be written."""
    return StoreError(
        f"cannot keep trained states in '{folder}' ({error.strerror}); set KEYHOLE_CACHE to a folder that can be "
        "written to."
    )
