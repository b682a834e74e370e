"""Images and labels in four disjoint pools: secrets, tuning, public knowledge and retrieval candidates.

A `Source` knows every label but decodes only the images that a seed chooses, so a large data set costs what
its pools cost. Local files are read in place, with pyarrow and PIL: the disk cache of Hugging Face `datasets`
would leave a second copy of the user's private images in their home. Only hub ids go through
`datasets.load_dataset`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from keyhole.core.keys import fold_in, new_key, permutation
from keyhole.core.registry import DATASETS
from keyhole.errors import ConfigError, DataError, KeyholeError, UnknownName, check_range

T = TypeVar("T")

_POOLS = ("target", "tune", "public", "candidates")
_CANDIDATES = 1000
_STD_FLOOR = 1e-3
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, eq=False)
class Pool:
    """Some images of a source, with their labels."""

    images: Tensor
    """Pixels in [0, 1], float32 of shape (n, c, h, w)."""
    labels: Tensor
    """Class indices, int64 of shape (n,)."""
    rows: tuple[int, ...]
    """Row numbers in the source, one for each image."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Data:
    """Four disjoint pools of one source, and how its pixels are normalised."""

    name: str
    target: Pool
    """Private images, which attacks try to recover."""
    tune: Pool
    """Private images on which hyper-parameters may be chosen."""
    public: Pool
    """Images that attacker and defender both have."""
    candidates: Pool
    """Images among which a reconstruction must be recognised."""
    num_classes: int
    mean: tuple[float, ...]
    """Mean pixel of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel; at least 1e-3 where it was computed from the public pool."""
    digest: str
    """First 16 hex digits of SHA-256 over the pixels and labels of all pools, and over mean and std."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return tuple(self.target.images.shape[1:])


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


def load_data(
    name: str,
    *,
    target: int = 64,
    tune: int = 12,
    public: int = 24,
    candidates: int | None = None,
    seed: int = 0,
    size: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Data:
    """Draw four disjoint pools from a data set.

    One seeded permutation of the rows is cut into target, tune, public and candidates, in this order: other
    sizes of the later pools leave the earlier ones as they are.

    Args:
        name: a registered data set, a local path (Parquet file, folder of Parquet files, folder with one
            subfolder of images for each class) or a Hugging Face hub id such as ``uoft-cs/cifar10``.
            Registered sets of the hub, and hub ids, are first looked for in the folder ``$KEYHOLE_DATA``,
            where that is set.
        target: number of private images, at least 1.
        tune: number of images for tuning.
        public: number of public images, at least 1.
        candidates: number of retrieval candidates; `None` takes 1000 where so many rows are left, else none.
        seed: which permutation.
        size: side in pixels to resize to: bilinear, antialiased when shrinking, without regard to the aspect
            ratio.
        split: ``train``, ``test``, ...; by default ``train`` where there is one, else the first.
        image_column: for Parquet and hub data whose image column cannot be told.
        label_column: likewise.
        mean: mean of each channel in [0, 1]; by default the published one, else that of the public pool
            (never of the targets, which the attacker does not know).
        std: standard deviation of each channel, above 0; by default like ``mean``.

    Raises:
        DataError: the data cannot be read, or has too few rows.
        UnknownName: nothing is called like this.
    """
    check_range("data.target", target, 1)
    check_range("data.tune", tune, 0)
    check_range("data.public", public, 1)
    check_range("data.candidates", 0 if candidates is None else candidates, 0)
    check_range("data.size", 1 if size is None else size, 1)
    source = open_source(name, Choice(split, image_column, label_column))
    if source.num_classes < 2:
        raise DataError(f"data set '{name}' has one class only; an audit needs at least 2.")
    counts = _counts(name, len(source.labels), (target, tune, public), candidates)
    order = permutation(fold_in(new_key(seed), "pools"), len(source.labels))[: sum(counts)].tolist()
    images = _stack(name, source.read(order), source.size if size is None else size)
    labels = torch.from_numpy(source.labels[order].astype(np.int64))
    pools = dict(zip(_POOLS, _cut(images, labels, order, counts), strict=True))
    channels = images.shape[1]
    mean = source.mean if mean is None else mean
    mean = _per_channel("mean", _mean(pools["public"]) if mean is None else mean, channels)
    std = source.std if std is None else std
    std = _per_channel("std", _std(pools["public"]) if std is None else std, channels)
    digest = _digest(list(pools.values()), mean, std)
    return Data(name=name, **pools, num_classes=source.num_classes, mean=mean, std=std, digest=digest)


def open_source(name: str, choice: Choice | None = None) -> Source:
    """Find a data set by registered name, local path or hub id, in this order, and read its labels."""
    choice = choice or Choice()
    if name in DATASETS:
        card = DATASETS.card(name)
        given = {option: value for option, value in choice._asdict().items() if value is not None}
        for option in given:
            if option not in card.signature().parameters:
                raise ConfigError(
                    f"data.{option} has no meaning for '{name}', which has no splits or columns; remove it."
                )
        source: Source = DATASETS.build(name, **given)
        return source
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, choice)
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return _hub(name, choice)
    if "/" in name or path.suffix == ".parquet":
        raise DataError(
            f"data path '{name}' does not exist; give a Parquet file, a folder of Parquet files, a folder "
            "with "
            "one subfolder of images for each class, or a Hugging Face id such as 'uoft-cs/cifar10'."
        )
    raise UnknownName("data set", name, [card.name for card in DATASETS])


# Pools


def _counts(name: str, rows: int, first: tuple[int, ...], candidates: int | None) -> tuple[int, ...]:
    if candidates is None:
        candidates = _CANDIDATES if rows - sum(first) >= _CANDIDATES else 0
    counts = (*first, candidates)
    if sum(counts) > rows:
        wanted = " + ".join(f"{pool} {count}" for pool, count in zip(_POOLS, counts, strict=True))
        raise DataError(
            f"data set '{name}' has {rows} images, but {wanted} = {sum(counts)} are asked for; lower one of them."
        )
    return counts


def _cut(images: Tensor, labels: Tensor, order: list[int], counts: tuple[int, ...]) -> Iterator[Pool]:
    start = 0
    for count in counts:
        part = slice(start, start + count)
        # Clones, so that a pool written to or stored does not carry the other pools along.
        yield Pool(images[part].clone(), labels[part].clone(), tuple(order[part]))
        start += count


def _stack(name: str, images: list[Tensor], size: int | None) -> Tensor:
    channels = max(image.shape[0] for image in images)
    # A few grey pictures among colour ones are common (ImageNet); equal channels show the same picture.
    same = [image.expand(channels, -1, -1) for image in images]
    if size is not None:
        same = [_resize(image, size) for image in same]
    shapes = sorted({tuple(image.shape[1:]) for image in same})
    if len(shapes) > 1:
        (h, w), (h2, w2) = shapes[0], shapes[-1]
        raise DataError(
            f"images of '{name}' differ in size, from {h}x{w} to {h2}x{w2} pixels; set data.size to resize them."
        )
    return torch.stack(same)


def _resize(image: Tensor, size: int) -> Tensor:
    if tuple(image.shape[1:]) == (size, size):
        return image
    shrinks = size < max(image.shape[1:])
    to = (size, size)
    resized = interpolate(image[None], size=to, mode="bilinear", align_corners=False, antialias=shrinks)
    return resized[0].clamp(0.0, 1.0)


def _mean(pool: Pool) -> tuple[float, ...]:
    # Rounded, because the last bits of a sum depend on the number of threads and would change the digest.
    return tuple(round(m, 7) for m in pool.images.double().mean(dim=(0, 2, 3)).tolist())


def _std(pool: Pool) -> tuple[float, ...]:
    spread = pool.images.double().std(dim=(0, 2, 3), correction=0)
    return tuple(max(round(s, 7), _STD_FLOOR) for s in spread.tolist())


def _per_channel(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) != channels:
        raise DataError(
            f"data.{option} has {len(values)} numbers for images with {channels} channels; give one for each."
        )
    if not all(np.isfinite(v) for v in values) or (option == "std" and min(values) <= 0):
        above = " above 0" if option == "std" else ""
        raise DataError(f"data.{option} is {tuple(values)}; finite numbers{above} are needed.")
    return tuple(float(v) for v in values)


def _digest(pools: list[Pool], mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    hashed = hashlib.sha256()
    for pool in pools:
        hashed.update(f"{tuple(pool.images.shape)}".encode())
        hashed.update(pool.images.contiguous().numpy().tobytes())
        hashed.update(pool.labels.numpy().tobytes())
    hashed.update(struct.pack(f"<{len(mean) + len(std)}d", *mean, *std))
    return hashed.hexdigest()[:16]


# Tables: local Parquet and the hub


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
    datasets = _need("datasets")
    image = _pick_column(table, "image", choice.image_column, datasets.Image, _IMAGE_NAMES)
    label = _pick_column(table, "label", choice.label_column, datasets.ClassLabel, _LABEL_NAMES)
    labels, num_classes = _class_indices(table, label, table.column(label))

    def read(rows: Sequence[int]) -> list[Tensor]:
        cells = table.cells(image, rows)
        return [
            _decode_cell(cell, folder, f"row {row} of column '{image}' in '{table.name}'")
            for row, (cell, folder) in zip(rows, cells, strict=True)
        ]

    return Source(labels, num_classes, read)


def _pick_column(table: _Table, kind: str, given: str | None, feature: type, usual: tuple[str, ...]) -> str:
    columns = ", ".join(table.features)
    if given is not None:
        if given not in table.features:
            raise DataError(f"data.{kind}_column is '{given}', but the columns of '{table.name}' are: {columns}.")
        return given
    typed = [column for column, kind_of in table.features.items() if isinstance(kind_of, feature)]
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
    where = f"label column '{column}' of '{table.name}'"
    kinds = {type(value) for value in values}
    if not values:
        raise DataError(f"data set '{table.name}' has no rows.")
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


def _local(path: Path, choice: Choice) -> Source:
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


def _parquet(files: list[Path], root: Path, name: str, choice: Choice) -> Source:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_word(file.relative_to(root)) or "train", []).append(file)
    chosen = _pick_split(splits, choice.split, name)
    datasets, parquet = _need("datasets"), _need("pyarrow.parquet")
    schemas = []
    for file in chosen:
        with _readable(file):
            schemas.append(parquet.read_schema(file))
    for file, schema in zip(chosen, schemas, strict=True):
        if schema.names != schemas[0].names:
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
    except (OSError, ValueError, KeyError, TypeError, _need("pyarrow").ArrowException) as error:
        raise DataError(f"cannot read '{file}' as Parquet, it may be damaged or cut off ({_cause(error)}).") from error


def _hub(hub_id: str, choice: Choice) -> Source:
    local = _local_copy(hub_id)
    if local is not None:
        return _local(local, choice)
    datasets = _need("datasets")
    try:
        loaded = datasets.load_dataset(hub_id)
    except Exception as error:
        raise DataError(
            f"'{hub_id}' is no local path, and the Hugging Face hub did not give it ({_cause(error)}); "
            "check the "
            "name and the connection, or set KEYHOLE_DATA to a folder that holds a copy."
        ) from error
    part = _pick_split(loaded, choice.split, hub_id)
    undecoded = part.with_format("arrow")

    def column(label: str) -> list[Any]:
        values: list[Any] = undecoded.select_columns([label])[:].column(label).to_pylist()
        return values

    def cells(image: str, rows: Sequence[int]) -> list[tuple[Any, Path]]:
        values = undecoded.select_columns([image]).select(rows)[:].column(image)
        return [(value, Path()) for value in values.to_pylist()]

    return _table_source(_Table(hub_id, part.features, column, cells), choice)


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
    if not split_level and choice.split not in (None, "train"):
        raise UnknownName("split", str(choice.split), ["train"], f"'{folder}'")
    if split_level:
        splits: dict[str, list[Path]] = {}
        for path in paths:
            splits.setdefault(_SPLIT_WORDS[path.parts[0].lower()], []).append(path)
        paths = _pick_split(splits, choice.split, str(folder))
    level = 1 if split_level else 0
    loose = next((path for path in paths if len(path.parts) < level + 2), None)
    if loose is not None:
        raise DataError(f"image '{folder / loose}' is in no class; an image folder needs one subfolder for each class.")
    classes = {name: index for index, name in enumerate(sorted({path.parts[level] for path in paths}))}
    labels = np.array([classes[path.parts[level]] for path in paths], dtype=np.int64)

    def read(rows: Sequence[int]) -> list[Tensor]:
        return [_decode(folder / paths[row], f"'{folder / paths[row]}'") for row in rows]

    return Source(labels, len(classes), read)


# Pixels


def _decode_cell(cell: Any, folder: Path, where: str) -> Tensor:
    """An image from a table's cell: encoded bytes, or ``{"bytes": ..., "path": ...}`` with one of the two."""
    raw, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
    if isinstance(raw, bytes):
        return _decode(io.BytesIO(raw), where)
    if raw is None and isinstance(path, str):
        return _decode(folder / path, where)
    raise DataError(f"{where} is not an image; encoded files (PNG, JPEG, ...) are needed, in bytes.")


def _decode(file: io.BytesIO | Path, where: str) -> Tensor:
    pil, ops = _need("PIL.Image"), _need("PIL.ImageOps")
    try:
        with pil.open(file) as image:
            # Cameras store portrait photos lying down, with a note to turn them.
            return _pixels(ops.exif_transpose(image), where)
    except KeyholeError:
        raise
    except Exception as error:
        raise DataError(f"{where} is not a readable image ({_cause(error)}); repair or remove it.") from error


def _pixels(image: Any, where: str) -> Tensor:
    """Pixels in [0, 1], float32 (c, h, w): grey images have one channel, all others become RGB."""
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535.0)[None]
    if image.mode in ("I", "F"):
        raise DataError(f"{where} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits.")
    grey = image.mode in ("1", "L")
    return _unit(np.asarray(image.convert("L" if grey else "RGB")), 255.0)


def _unit(array: np.ndarray, top: float) -> Tensor:
    """An array (h, w) or (h, w, c) with values in 0..top as float32 (c, h, w) in [0, 1]."""
    pixels = torch.from_numpy(np.atleast_3d(array).astype(np.float32)).permute(2, 0, 1)
    return (pixels / top).contiguous()


# Names


def _from_memory(images: np.ndarray, top: float) -> Callable[[Sequence[int]], list[Tensor]]:
    return lambda rows: [_unit(images[row], top) for row in rows]


@DATASETS.add(name="faces", paper="Huang et al. 2007", url="https://scikit-image.org/docs/stable/api/skimage.data.html")
def faces() -> Source:
    """100 grey faces, each a class of its own, enlarged from 25x25 to 32x32 pixels; comes with scikit-image.

    The first half of `skimage.data.lfw_subset` (the other half shows no faces). Labels only name the picture,
    so that an attack has 100 classes to tell apart: the identities are not part of the file.

    Reference: Huang, Ramesh, Berg and Learned-Miller, "Labeled Faces in the Wild", 2007,
    http://vis-www.cs.umass.edu/lfw/.
    """
    images = np.asarray(_need("skimage.data").lfw_subset())[:100]
    return Source(np.arange(100, dtype=np.int64), 100, _from_memory(images, 1.0), size=32)


@DATASETS.add(name="digits", paper="Alpaydin and Kaynak 1998", url="https://doi.org/10.24432/C50P49")
def digits() -> Source:
    """1,797 handwritten digits of 8x8 pixels in 17 grey levels, 10 classes; comes with scikit-learn.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49.
    """
    bunch = _need("sklearn.datasets").load_digits()
    return Source(bunch.target.astype(np.int64), 10, _from_memory(bunch.images, 16.0))


@DATASETS.add(
    name="mnist",
    paper="LeCun et al. 1998",
    url="https://huggingface.co/datasets/ylecun/mnist",
    facts={"hub": "ylecun/mnist"},
)
def mnist(*, split: str | None = None, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Handwritten digits, 28x28 grey, 10 classes, 60,000 for training and 10,000 for test.

    Reference: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    1998, https://doi.org/10.1109/5.726791. Mean and std are those of invertinggradients (Geiping et al.
    2020).
    """
    source = _hub("ylecun/mnist", Choice(split, image_column, label_column))
    return replace(source, mean=(0.1306637,), std=(0.3081078,))


@DATASETS.add(
    name="fashion_mnist",
    paper="Xiao et al. 2017",
    arxiv="1708.07747",
    facts={"hub": "zalando-datasets/fashion_mnist"},
)
def fashion_mnist(
    *, split: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Pictures of clothes, 28x28 grey, 10 classes, 60,000 for training and 10,000 for test.

    Reference: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747.
    """
    source = _hub("zalando-datasets/fashion_mnist", Choice(split, image_column, label_column))
    return replace(source, mean=(0.2860406,), std=(0.3530242,))


@DATASETS.add(
    name="cifar10",
    paper="Krizhevsky 2009",
    url="https://huggingface.co/datasets/uoft-cs/cifar10",
    facts={"hub": "uoft-cs/cifar10"},
)
def cifar10(*, split: str | None = None, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Small colour photographs, 32x32, 10 classes, 50,000 for training and 10,000 for test.

    Reference: Krizhevsky, "Learning multiple layers of features from tiny images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html. Mean and std are those of invertinggradients (Geiping et al.
    2020).
    """
    source = _hub("uoft-cs/cifar10", Choice(split, image_column, label_column))
    return replace(source, mean=(0.4914672, 0.4822617, 0.4467701), std=(0.2470322, 0.2434851, 0.2615878))


def _need(module: str) -> Any:
    """An optional package, imported where it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise KeyholeError(
            f"this data set needs the package '{package}', which cannot be imported; install keyhole[data]."
        ) from error


def _cause(error: BaseException) -> str:
    """The first line of an error, for a sentence that must stay one."""
    first = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
