"""Images and labels in four disjoint pools: secrets, tuning, public knowledge and retrieval candidates."""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from keyhole.core.keys import fold_in, new_key, permutation
from keyhole.core.registry import DATASETS
from keyhole.errors import ConfigError, DataError, UnknownName, check_range
from keyhole.zoo.decoding import from_array, need
from keyhole.zoo.sources import Choice, Source, open_hub, open_local, open_path

_POOLS = ("target", "tune", "public", "candidates", "train")
_CANDIDATES = 1000
_STD_FLOOR = 1e-3
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    """Five disjoint pools of one source, and how its pixels are normalised."""

    name: str
    target: Pool
    """Private images, which attacks try to recover."""
    tune: Pool
    """Private images on which hyper-parameters may be chosen."""
    public: Pool
    """Images that attacker and defender both have."""
    candidates: Pool
    """Images among which a reconstruction must be recognised."""
    train: Pool
    """Further images that networks are trained on; empty unless asked for."""
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


def load_data(
    name: str,
    *,
    target: int = 64,
    tune: int = 12,
    public: int = 24,
    candidates: int | None = None,
    train: int = 0,
    seed: int = 0,
    size: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: Sequence[int] | None = None,
) -> Data:
    """Draw five disjoint pools from a data set.

    One seeded permutation of the rows is cut into target, tune, public, candidates and train, in this order: other
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
        train: most images for training; fewer where the data set has no more.
        seed: which permutation.
        size: side in pixels to resize to: bilinear, antialiased when shrinking, without regard to the aspect
            ratio.
        split: ``train``, ``test``, ...; by default ``train`` where there is one, else the first.
        image_column: for Parquet and hub data whose image column cannot be told.
        label_column: likewise.
        mean: mean of each channel in [0, 1]; by default the published one, else that of the public pool
            (never of the targets, which the attacker does not know).
        std: standard deviation of each channel, above 0; by default like ``mean``.
        classes: only images of these classes, which are then numbered in this order; `None` takes all.

    Raises:
        DataError: the data cannot be read, or has too few rows.
        UnknownName: nothing is called like this.
    """
    check_range("data.target", target, 1)
    check_range("data.tune", tune, 0)
    check_range("data.public", public, 1)
    check_range("data.candidates", candidates or 0, 0)
    check_range("data.train", train, 0)
    check_range("data.size", 1 if size is None else size, 1)
    source = _open(name, Choice(split, image_column, label_column))
    rows = np.arange(len(source.labels))
    if classes is not None:
        source, rows = _of_classes(name, source, classes)
    if source.num_classes < 2:
        raise DataError(f"data set '{name}' has one class only; an audit needs at least 2.")
    counts = _counts(name, len(source.labels), (target, tune, public), candidates)
    counts = (*counts, min(train, len(source.labels) - sum(counts)))
    order = permutation(fold_in(new_key(seed), "pools"), len(source.labels))[: sum(counts)].tolist()
    images = _stack(name, source.read(order), size or source.size)
    labels = torch.from_numpy(source.labels[order])
    pools = dict(zip(_POOLS, _cut(images, labels, rows[order].tolist(), counts), strict=True))
    if mean is None:
        mean = source.mean or _mean(pools["public"])
    if std is None:
        std = source.std or _std(pools["public"])
    channels = images.shape[1]
    mean, std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    digest = _digest([pool for pool in pools.values() if pool is not pools["train"] or len(pool)], mean, std)
    return Data(name=name, **pools, num_classes=source.num_classes, mean=mean, std=std, digest=digest)


def load_pool(
    name: str,
    *,
    classes: Sequence[int] | None = None,
    split: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Pool:
    """Images of a data set, of some of its classes; labels stay as the set has them.

    Args:
        name: see `load_data`, as for the rest.
        classes: only images of these classes; `None` takes all.
        split: ``train``, ``test``, ...
        size: side in pixels to resize to.
        limit: most images, at least 1, drawn at random; `None` takes all.
        seed: which draw, and their order.
        image_column: for Parquet and hub data whose image column cannot be told.
        label_column: likewise.
    """
    check_range("limit", 1 if limit is None else limit, 1)
    source = _open(name, Choice(split, image_column, label_column))
    rows = np.arange(len(source.labels))
    if classes is not None:
        known = source.labels
        source, rows = _of_classes(name, source, classes)
        source = replace(source, labels=known[rows])
    order = permutation(fold_in(new_key(seed), "pool"), len(rows))[:limit].tolist()
    images = _stack(name, source.read(order), size or source.size)
    return Pool(images, torch.from_numpy(source.labels[order]), tuple(rows[order].tolist()))


def _of_classes(name: str, source: Source, classes: Sequence[int]) -> tuple[Source, np.ndarray]:
    """The images of some classes, numbered by their place in ``classes``, and their rows in the whole source."""
    wrong = [label for label in classes if not 0 <= label < source.num_classes]
    if wrong or len(set(classes)) < len(classes) or not classes:
        raise ConfigError(
            f"classes {list(classes)} of data set '{name}' must be different numbers from 0 to "
            f"{source.num_classes - 1}, at least one."
        )
    rows = np.flatnonzero(np.isin(source.labels, classes))
    if not len(rows):
        raise DataError(f"data set '{name}' has no image of the classes {list(classes)}.")
    number = {label: place for place, label in enumerate(classes)}
    labels = np.array([number[label] for label in source.labels[rows].tolist()], dtype=np.int64)

    def read(chosen: Sequence[int]) -> list[Tensor]:
        return source.read(rows[list(chosen)].tolist())

    return replace(source, labels=labels, num_classes=len(classes), read=read), rows


def _open(name: str, choice: Choice) -> Source:
    """Find a data set by registered name, local path or hub id, in this order, and read its labels."""
    if name in DATASETS:
        given = {option: value for option, value in choice._asdict().items() if value is not None}
        accepted = DATASETS.card(name).signature().parameters
        for option in given:
            if option not in accepted:
                raise ConfigError(
                    f"data.{option} has no meaning for '{name}', which has no splits or columns; remove it."
                )
        return DATASETS.build(name, **given)
    path = Path(name).expanduser()
    if path.exists():
        return open_path(path, choice)
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return open_hub(name, choice)
    if "/" in name or path.suffix == ".parquet":
        raise DataError(
            f"data path '{name}' does not exist; give a Parquet file, a folder of Parquet files, a folder with "
            "one subfolder of images for each class, or a Hugging Face id such as 'uoft-cs/cifar10'."
        )
    raise UnknownName("data set", name, [card.name for card in DATASETS])


# Pools


def _counts(name: str, rows: int, first: tuple[int, ...], candidates: int | None) -> tuple[int, ...]:
    if candidates is None:
        candidates = _CANDIDATES if rows - sum(first) >= _CANDIDATES else 0
    counts = (*first, candidates)
    if sum(counts) > rows:
        wanted = " + ".join(f"{pool} {count}" for pool, count in zip(_POOLS, counts, strict=False))
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
        _check_fits(name, len(same) * channels, size)
        same = [_resize(image, size) for image in same]
    shapes = sorted({tuple(image.shape[1:]) for image in same})
    if len(shapes) > 1:
        (h, w), (h2, w2) = shapes[0], shapes[-1]
        raise DataError(
            f"images of '{name}' differ in size, from {h}x{w} to {h2}x{w2} pixels; set data.size to resize them."
        )
    return torch.stack(same)


def _check_fits(name: str, planes: int, size: int) -> None:
    """Raises `DataError` where resized images, as single-precision numbers, are larger than this machine's memory."""
    needed, there = 4 * planes * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DataError(
            f"images of '{name}' at {size}x{size} pixels take {needed / 1e9:,.0f} GB, more than this machine has "
            f"({there / 1e9:,.0f} GB); lower data.size, or the number of images."
        )


def _resize(image: Tensor, size: int) -> Tensor:
    if image.shape[1:] == (size, size):
        return image
    shrinks = size < max(image.shape[1:])
    resized = interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)
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
    if not all(math.isfinite(v) for v in values) or (option == "std" and min(values) <= 0):
        above = " above 0" if option == "std" else ""
        raise DataError(f"data.{option} is {tuple(values)}; finite numbers{above} are needed.")
    return tuple(float(v) for v in values)


def _digest(pools: list[Pool], mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    hashed = hashlib.sha256()
    for pool in pools:
        hashed.update(f"{tuple(pool.images.shape)}".encode())
        hashed.update(pool.images.numpy().tobytes())
        hashed.update(pool.labels.numpy().tobytes())
    hashed.update(struct.pack(f"<{len(mean) + len(std)}d", *mean, *std))
    return hashed.hexdigest()[:16]


# Registered sets


def _from_memory(images: np.ndarray, top: float) -> Callable[[Sequence[int]], list[Tensor]]:
    return lambda rows: [from_array(images[row], top) for row in rows]


@DATASETS.add(name="faces", paper="Huang et al. 2007", url="https://scikit-image.org/docs/stable/api/skimage.data.html")
def faces() -> Source:
    """100 grey faces, each a class of its own, enlarged from 25x25 to 32x32 pixels; comes with scikit-image.

    The first half of `skimage.data.lfw_subset` (the other half shows no faces). Labels only name the picture,
    so that an attack has 100 classes to tell apart: the identities are not part of the file.

    Reference: Huang, Ramesh, Berg and Learned-Miller, "Labeled Faces in the Wild", 2007,
    http://vis-www.cs.umass.edu/lfw/.
    """
    images = np.asarray(need("skimage.data").lfw_subset())[:100]
    return Source(np.arange(100, dtype=np.int64), 100, _from_memory(images, 1.0), size=32)


@DATASETS.add(name="digits", paper="Alpaydin and Kaynak 1998", url="https://doi.org/10.24432/C50P49")
def digits() -> Source:
    """1,797 handwritten digits of 8x8 pixels in 17 grey levels, 10 classes; comes with scikit-learn.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49.
    """
    bunch = need("sklearn.datasets").load_digits()
    return Source(bunch.target.astype(np.int64), 10, _from_memory(bunch.images, 16.0))


@DATASETS.add(name="mnist", paper="LeCun et al. 1998", url="https://huggingface.co/datasets/ylecun/mnist")
def mnist(*, split: str | None = None, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Handwritten digits, 28x28 grey, 10 classes, 60,000 for training and 10,000 for test.

    Reference: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
    1998, https://doi.org/10.1109/5.726791. Mean and std are those of invertinggradients (Geiping et al.
    2020).
    """
    source = open_hub("ylecun/mnist", Choice(split, image_column, label_column))
    return replace(source, mean=(0.1306637,), std=(0.3081078,))


@DATASETS.add(name="fashion_mnist", paper="Xiao et al. 2017", arxiv="1708.07747")
def fashion_mnist(
    *, split: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Pictures of clothes, 28x28 grey, 10 classes, 60,000 for training and 10,000 for test.

    Reference: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017, https://arxiv.org/abs/1708.07747.
    """
    source = open_hub("zalando-datasets/fashion_mnist", Choice(split, image_column, label_column))
    return replace(source, mean=(0.2860406,), std=(0.3530242,))


@DATASETS.add(name="cifar10", paper="Krizhevsky 2009", url="https://huggingface.co/datasets/uoft-cs/cifar10")
def cifar10(*, split: str | None = None, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Small colour photographs, 32x32, 10 classes, 50,000 for training and 10,000 for test.

    Reference: Krizhevsky, "Learning multiple layers of features from tiny images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html. Mean and std are those of invertinggradients (Geiping et al.
    2020).
    """
    source = open_hub("uoft-cs/cifar10", Choice(split, image_column, label_column))
    return replace(source, mean=(0.4914672, 0.4822617, 0.4467701), std=(0.2470322, 0.2434851, 0.2615878))


@DATASETS.add(name="orl_faces", paper="Samaria and Harter 1994", url="https://doi.org/10.1109/ACV.1994.341300")
def orl_faces(*, split: str | None = None, image_column: str | None = None, label_column: str | None = None) -> Source:
    """400 grey faces of 92x112 pixels, 10 of each of 40 people; read from ``$KEYHOLE_DATA/orl_faces``.

    Reference: Samaria and Harter, "Parameterisation of a stochastic model for human face identification", 1994,
    https://doi.org/10.1109/ACV.1994.341300.
    """
    return open_local("orl_faces", Choice(split, image_column, label_column))
