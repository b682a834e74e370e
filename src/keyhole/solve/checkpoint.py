"""The state of an unfinished group on disk: tensors in order, and an account in JSON. Never a pickle."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from keyhole.solve.files import tensors_as_bytes, write_whole

_ACCOUNT = "account"


def save_checkpoint(path: Path, tensors: Sequence[Tensor], account: str) -> None:
    """Write atomically, readable by the owner alone: iterates of an attack may already show the secret."""
    named = {f"{i:08d}": tensor for i, tensor in enumerate(tensors)}
    write_whole(path, tensors_as_bytes(named, {_ACCOUNT: account}))


def load_checkpoint(path: Path, device: torch.device) -> tuple[list[Tensor], str] | None:
    """What `save_checkpoint` wrote, or `None` where there is nothing (a group then begins anew)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            account = (file.metadata() or {}).get(_ACCOUNT, "")
            # Cloned, so that the tensors lie in memory as freshly computed ones do.
            tensors = [file.get_tensor(name).clone().to(device) for name in sorted(file.keys())]
    except SafetensorError as error:
        warnings.warn(f"{path} is damaged ({error}); its group begins anew.", stacklevel=2)
        path.unlink()
        return None
    return tensors, account
