"""Where images come from: Parquet files, folders of images, and the Hugging Face hub.

A `Source` knows every label but decodes only the images that it is asked for, so a large data set costs what its pools
cost. Local files are read in place, with pyarrow and PIL: the disk cache of Hugging Face `datasets` would leave a
second copy of the user's private images in their home. Only hub ids go through `datasets.load_dataset`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from keyhole.errors import ConfigError, DataError, UnknownName, cause
from keyhole.zoo.decoding import decode, decode_cell, need

T = TypeVar("T")

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before any image is decoded: what a factory in `DATASETS` returns."""

    labels: np.ndarray
    """Class index of every row, int64 of shape (n,)."""
    num_classes: int
    read: Callable[[Sequence[int]], list[Tensor]]
    """From row numbers to pixels in [0, 1], float32 of shape (c, h, w); sizes may differ between images."""
    mean: tuple[float, ...] | None = None
    """Published mean of each channel, where there is one."""
    std: tuple[float, ...] | None = None
    size: int | None = None
    """Side to resize to unless the user asks for another; `None` keeps the native size."""


class Choice(NamedTuple):
    """Which part of a table is meant; `None` lets Keyhole find out."""

    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def open_path(path: Path, choice: Choice) -> Source:
    """A Parquet file, a folder of Parquet files, or a folder with one subfolder of images for each class."""
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"data file '{path}' is not Parquet; give a .parquet file, or a folder.")
        return _parquet([path], path.parent, str(path), choice)
    inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
    if not inside:
        raise DataError(f"data folder '{path}' is empty.")
    tables = [file for file in inside if file.suffix.lower() == ".parquet"]
    return _parquet(tables, path, str(path), choice) if tables else _image_folder(path, inside, choice)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_hub(hub_id: str, choice: Choice) -> Source:
    """A data set of the hub: the copy under ``$KEYHOLE_DATA`` where there is one, else from the network."""
    local = _local_copy(hub_id)
    if local is not None:
        return open_path(local, choice)
    datasets = need("datasets")
    try:
        with _silent("datasets", "huggingface_hub"):
            loaded = datasets.load_dataset(hub_id)
    except Exception as error:
        raise DataError(
            f"'{hub_id}' is no local path, and the Hugging Face hub did not give it ({cause(error)}); "
            "check the name and the connection, or set KEYHOLE_DATA to a folder that holds a copy."
        ) from error
    part = _pick_split(loaded, choice.split, hub_id)
    undecoded = part.with_format("arrow")

    def column(label: str) -> list[Any]:
        return undecoded.select_columns([label])[:].column(label).to_pylist()

    def cells(image: str, rows: Sequence[int]) -> list[tuple[Any, Path]]:
        values = undecoded.select_columns([image]).select(rows)[:].column(image)
        return [(value, Path()) for value in values.to_pylist()]

    return _table_source(_Table(hub_id, part.features, column, cells), choice)


def open_local(name: str, choice: Choice) -> Source:
    """A data set that no hub has, under ``$KEYHOLE_DATA``."""
    local = _local_copy(name)
    if local is None:
        raise DataError(
            f"data set '{name}' is read from a folder of yours; set KEYHOLE_DATA to one that holds {name}/."
        )
    return open_path(local, choice)


def _local_copy(hub_id: str) -> Path | None:
    """The folder or file of this data set under ``$KEYHOLE_DATA``."""
    given = os.environ.get("KEYHOLE_DATA")
    if not given:
        return None
    root = Path(given).expanduser()
    if not root.is_dir():
        raise DataError(f"KEYHOLE_DATA is '{given}', which is not a folder; correct or unset it.")
    for copy in (root / hub_id, root / hub_id.rpartition("/")[2]):
        if copy.exists():
            return copy
    return None


@contextmanager
def _silent(*libraries: str) -> Iterator[None]:
    """Hold back what libraries log: many lines on their retries would come before the one sentence of our error."""
    loggers = [logging.getLogger(library) for library in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Splits


def _split_word(path: Path) -> str | None:
    """The split a path speaks of, its last part first: ``train-00000-of-00001.parquet`` is train."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _pick_split(splits: Mapping[str, T], wanted: str | None, name: str) -> T:
    if wanted is None:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    if wanted not in splits:
        raise UnknownName("split", wanted, splits, f"'{name}'")
    return splits[wanted]


# Parquet files


def _parquet(files: list[Path], root: Path, name: str, choice: Choice) -> Source:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_word(file.relative_to(root)) or "train", []).append(file)
    chosen = _pick_split(splits, choice.split, name)
    datasets, parquet = need("datasets"), need("pyarrow.parquet")
    schemas = []
    for file in chosen:
        with _readable(file):
            schemas.append(parquet.read_schema(file))
        if schemas[-1].names != schemas[0].names:
            raise DataError(f"Parquet files '{chosen[0]}' and '{file}' have different columns; give one of them.")
    with _readable(chosen[0]):
        features = datasets.Features.from_arrow_schema(schemas[0])

    def column(label: str) -> list[Any]:
        values: list[Any] = []
        for file in chosen:
            with _readable(file), parquet.ParquetFile(file) as opened:
                values += opened.read(columns=[label]).column(label).to_pylist()
        return values

    def cells(image: str, rows: Sequence[int]) -> list[tuple[Any, Path]]:
        found: dict[int, tuple[Any, Path]] = {}
        start = 0
        for file in chosen:
            with _readable(file), parquet.ParquetFile(file) as opened:
                for group in range(opened.num_row_groups):
                    end = start + opened.metadata.row_group(group).num_rows
                    wanted = [row for row in rows if start <= row < end]
                    if wanted:
                        values = opened.read_row_group(group, columns=[image]).column(image)
                        found.update((row, (values[row - start].as_py(), file.parent)) for row in wanted)
                    start = end
        return [found[row] for row in rows]

    return _table_source(_Table(name, features, column, cells), choice)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, need("pyarrow").ArrowException) as error:
        raise DataError(f"cannot read '{file}' as Parquet, it may be damaged or cut off ({cause(error)}).") from error


# Image folders


def _image_folder(folder: Path, files: list[Path], choice: Choice) -> Source:
    """One subfolder for each class, perhaps below ``train``, ``test``...; classes are numbered as sorted."""
    if choice.image_column or choice.label_column:
        raise ConfigError(
            f"'{folder}' is a folder of images and has no columns; remove data.image_column and data.label_column."
        )
    paths = [file.relative_to(folder) for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not paths:
        accepted = ", ".join(_IMAGE_SUFFIXES)
        raise DataError(f"data folder '{folder}' holds neither Parquet files nor images ({accepted}).")
    # A first level is one of splits only if all of it is, and the classes are one level down.
    split_level = all(len(path.parts) > 2 and path.parts[0].lower() in _SPLIT_WORDS for path in paths)
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_SPLIT_WORDS[path.parts[0].lower()] if split_level else "train", []).append(path)
    paths = _pick_split(splits, choice.split, str(folder))
    loose = next((path for path in paths if len(path.parts) < 2), None)
    if loose is not None:
        raise DataError(f"image '{folder / loose}' is in no class; an image folder needs one subfolder for each class.")
    names = [path.parts[1 if split_level else 0] for path in paths]
    classes = {name: index for index, name in enumerate(sorted(set(names)))}
    labels = np.array([classes[name] for name in names], dtype=np.int64)

    def read(rows: Sequence[int]) -> list[Tensor]:
        return [decode(folder / paths[row], f"'{folder / paths[row]}'") for row in rows]

    return Source(labels, len(classes), read)


# Tables: Parquet and the hub


class _Table(NamedTuple):
    """Columns by name, before it is known which are needed."""

    name: str
    features: Mapping[str, Any]
    """What `datasets` makes of each column."""
    column: Callable[[str], list[Any]]
    """All values of a column."""
    cells: Callable[[str, Sequence[int]], list[tuple[Any, Path]]]
    """Some values of a column, undecoded, each with the folder that relative paths in it start from."""


def _table_source(table: _Table, choice: Choice) -> Source:
    datasets = need("datasets")
    image = _pick_column(table, "image", choice.image_column, datasets.Image, _IMAGE_NAMES)
    label = _pick_column(table, "label", choice.label_column, datasets.ClassLabel, _LABEL_NAMES)
    labels, num_classes = _class_indices(table, label, table.column(label))

    def read(rows: Sequence[int]) -> list[Tensor]:
        cells = table.cells(image, rows)
        return [
            decode_cell(cell, folder, f"row {row} of column '{image}' in '{table.name}'")
            for row, (cell, folder) in zip(rows, cells, strict=True)
        ]

    return Source(labels, num_classes, read)


def _pick_column(table: _Table, kind: str, given: str | None, feature: type, usual: tuple[str, ...]) -> str:
    columns = ", ".join(table.features)
    if given is not None:
        if given not in table.features:
            raise DataError(f"data.{kind}_column is '{given}', but the columns of '{table.name}' are: {columns}.")
        return given
    typed = [column for column, declared in table.features.items() if isinstance(declared, feature)]
    named = [column for column in usual if column in table.features]
    for found in (typed, named):
        if len(found) == 1:
            return found[0]
    why = "several columns could be it" if typed or named else f"none is called {' or '.join(usual)}"
    raise DataError(
        f"cannot tell the {kind} column of '{table.name}', because {why}; its columns are: {columns}. "
        f"Set data.{kind}_column."
    )


def _class_indices(table: _Table, column: str, values: list[Any]) -> tuple[np.ndarray, int]:
    """Labels as 0..k-1, and k: integers as they are, strings in sorted order."""
    if not values:
        raise DataError(f"data set '{table.name}' has no rows.")
    where = f"label column '{column}' of '{table.name}'"
    kinds = {type(value) for value in values}
    if kinds == {str}:
        classes = {text: index for index, text in enumerate(sorted(set(values)))}
        return np.array([classes[value] for value in values], dtype=np.int64), len(classes)
    if not kinds <= {int, bool}:
        found = " and ".join(sorted("missing values" if kind is type(None) else kind.__name__ for kind in kinds))
        raise DataError(f"{where} holds {found}; class numbers or class names are needed, for every row.")
    declared = getattr(table.features[column], "num_classes", None)
    count = int(max(values)) + 1 if declared is None else declared
    if min(values) < 0 or max(values) >= count:
        limit = "0 or above" if declared is None else f"0 to {count - 1}, as its header declares"
        raise DataError(
            f"{where} holds {min(values)} to {max(values)}; classes must be {limit} (-1 often marks unlabelled rows)."
        )
    return np.array(values, dtype=np.int64), count
