"""Pictures as tensors, and the optional packages that come with ``keyhole[data]``."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keyhole.errors import DataError, KeyholeError, cause


def decode_cell(cell: Any, folder: Path, where: str) -> Tensor:
    """An image from a table's cell: encoded bytes, or ``{"bytes": ..., "path": ...}`` with one of the two."""
    raw, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
    if isinstance(raw, bytes):
        return decode(io.BytesIO(raw), where)
    if raw is None and isinstance(path, str):
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise DataError(f"{where} points to '{path}', outside its own folder; such files are not read.")
        return decode(file, where)
    raise DataError(f"{where} is not an image; encoded files (PNG, JPEG, ...) are needed, in bytes.")


def decode(file: io.BytesIO | Path, where: str) -> Tensor:
    """Pixels in [0, 1], float32 (c, h, w): grey images have one channel, all others become RGB."""
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    try:
        with pil.open(file) as image:
            # Cameras store portrait photos lying down, with a note to turn them.
            return _pixels(ops.exif_transpose(image), where)
    except KeyholeError:
        raise
    except Exception as error:
        raise DataError(f"{where} is not a readable image ({cause(error)}); repair or remove it.") from error


def _pixels(image: Any, where: str) -> Tensor:
    if image.mode.startswith("I;16"):
        return from_array(np.asarray(image), 65535.0)
    if image.mode in ("I", "F"):
        raise DataError(f"{where} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits.")
    grey = image.mode in ("1", "L")
    return from_array(np.asarray(image.convert("L" if grey else "RGB")), 255.0)


def from_array(array: np.ndarray, top: float) -> Tensor:
    """An array (h, w) or (h, w, c) with values in 0..top as float32 (c, h, w) in [0, 1]."""
    pixels = torch.from_numpy(np.atleast_3d(array).astype(np.float32)).permute(2, 0, 1)
    return (pixels / top).contiguous()


def need(module: str) -> Any:
    """An optional package, imported where it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise KeyholeError(
            f"this data set needs the package '{package}', which cannot be imported; install keyhole[data]."
        ) from error
