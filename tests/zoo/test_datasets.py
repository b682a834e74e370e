"""Data sets: the four pools, every kind of source, and one clear sentence for each kind of bad input."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from keyhole.core.registry import DATASETS
from keyhole.errors import ConfigError, DataError, KeyholeError, UnknownName
from keyhole.zoo import decoding, sources
from keyhole.zoo.datasets import Data, _of_classes, load_data, load_pool

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
hub = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

torch.set_num_threads(1)

LOCAL = pytest.mark.skipif(
    not os.environ.get("KEYHOLE_DATA"), reason="set KEYHOLE_DATA to a folder with mnist, cifar10, ..."
)
POOLS = ("target", "tune", "public", "candidates")
SMALL = {"target": 3, "tune": 2, "public": 4}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable, and no network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network in tests\nsecond line")

    monkeypatch.delenv("KEYHOLE_DATA", raising=False)
    monkeypatch.setattr(hub, "load_dataset", refuse)


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Any:
    """A picture (width, height) that no other number gives."""
    rng = np.random.default_rng(number)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def features(image: str = "image", label: str = "label", classes: int = 3) -> dict[str, Any]:
    names = [f"class{i}" for i in range(classes)]
    return {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}


def table(
    labels: list[Any],
    *,
    image: str = "image",
    label: str = "label",
    cells: list[Any] | None = None,
    declared: Any = None,
) -> Any:
    """A table as the hub stores it; ``declared`` is what Hugging Face writes into the file's header."""
    if cells is None:
        cells = [{"bytes": png(picture(i)), "path": f"{i}.png"} for i in range(len(labels))]
    made = pa.table({image: cells, label: labels})
    if declared is not None:
        header = json.dumps({"info": {"features": declared}})
        made = made.replace_schema_metadata({"huggingface": header})
    return made


def write(path: Path, made: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, **options)
    return path


def write_folder(root: Path, counts: dict[str, int], **options: Any) -> Path:
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            picture(number, **options).save(root / name / f"{number:02d}.png")
            number += 1
    return root


def raw(image: torch.Tensor) -> Any:
    """Pixels as a file holds them: bytes of shape (h, w, c)."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def check_pools(data: Data) -> None:
    rows = [row for pool in POOLS for row in getattr(data, pool).rows]
    assert len(rows) == len(set(rows))
    for name in POOLS:
        pool = getattr(data, name)
        assert pool.images.shape == (len(pool), *data.image_shape)
        assert pool.images.dtype == torch.float32 and pool.labels.dtype == torch.int64
        assert pool.labels.shape == (len(pool),)
        assert pool.images.numel() == 0 or (pool.images.min() >= 0 and pool.images.max() <= 1)
        assert bool(((pool.labels >= 0) & (pool.labels < data.num_classes)).all())
    assert len(data.mean) == len(data.std) == data.image_shape[0]
    assert len(data.digest) == 16 and int(data.digest, 16) >= 0


def same(a: Data, b: Data) -> bool:
    return a.digest == b.digest and all(
        getattr(a, p).rows == getattr(b, p).rows and torch.equal(getattr(a, p).images, getattr(b, p).images)
        for p in POOLS
    )


# The pools


def test_faces() -> None:
    data = load_data("faces")
    check_pools(data)
    assert [len(getattr(data, pool)) for pool in POOLS] == [64, 12, 24, 0]
    assert data.image_shape == (1, 32, 32) and data.num_classes == 100
    every = [label for pool in POOLS for label in getattr(data, pool).labels.tolist()]
    assert sorted(every) == list(range(100))
    assert tuple(data.target.labels.tolist()) == data.target.rows
    from skimage.data import lfw_subset

    small = torch.tensor(lfw_subset()[data.target.rows[0]], dtype=torch.float32)[None, None]
    expected = interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(data.target.images[0], expected)
    assert load_data("faces", size=25).image_shape == (1, 25, 25)


def test_digits() -> None:
    data = load_data("digits")
    check_pools(data)
    assert [len(getattr(data, pool)) for pool in POOLS] == [64, 12, 24, 1000]
    assert data.image_shape == (1, 8, 8) and data.num_classes == 10
    from sklearn.datasets import load_digits

    bunch = load_digits()
    row = data.target.rows[5]
    assert data.target.labels[5] == bunch.target[row]
    assert torch.equal(data.target.images[5, 0] * 16, torch.tensor(bunch.images[row], dtype=torch.float32))
    assert load_data("digits", size=16).image_shape == (1, 16, 16)


def test_one_seed_gives_one_answer_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    first = load_data("digits", seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
    assert same(first, load_data("digits", seed=3))
    other = load_data("digits", seed=4)
    assert other.digest != first.digest and other.target.rows != first.target.rows


def test_rows_are_pinned_across_machines() -> None:
    assert load_data("faces").target.rows[:6] == (80, 85, 10, 61, 37, 51)


def test_later_pools_do_not_move_earlier_ones() -> None:
    a, b = load_data("digits", candidates=0), load_data("digits", candidates=50, public=30)
    assert a.target.rows == b.target.rows and a.tune.rows == b.tune.rows
    assert a.public.rows == b.public.rows[:24]
    assert len(a.candidates) == 0 and a.candidates.images.shape == (0, 1, 8, 8)


def test_digest_sees_pixels_labels_and_normalisation(tmp_path: Path) -> None:
    plain = table([0, 1, 2] * 4)
    base = load_data(str(write(tmp_path / "a.parquet", plain)), **SMALL)
    labels = load_data(str(write(tmp_path / "b.parquet", table([1, 0, 2] * 4))), **SMALL)
    cells = plain["image"].to_pylist()
    cells[base.tune.rows[0]]["bytes"] = png(picture(77))
    pixels = load_data(str(write(tmp_path / "c.parquet", table([0, 1, 2] * 4, cells=cells))), **SMALL)
    moved = load_data(str(tmp_path / "a.parquet"), **SMALL, mean=(0.5, 0.5, 0.5))
    assert len({base.digest, labels.digest, pixels.digest, moved.digest}) == 4
    assert pixels.mean == base.mean
    renamed = load_data(str(write(tmp_path / "d.parquet", plain)), **SMALL)
    assert renamed.digest == base.digest


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"target": 65}, "target 65 + tune 12 + public 24 + candidates 0 = 101"),
        ({"candidates": 1}, "candidates 1 = 101"),
    ],
)
def test_too_few_rows(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match="has 100 images") as error:
        load_data("faces", **sizes)  # type: ignore[arg-type]
    assert said in str(error.value)


@pytest.mark.parametrize("sizes", [{"target": 0}, {"public": 0}, {"tune": -1}, {"candidates": -1}, {"size": 0}])
def test_sizes_out_of_range(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(sizes))}"):
        load_data("faces", **sizes)  # type: ignore[arg-type]


# Normalisation


def test_mean_and_std_come_from_the_public_pool() -> None:
    data = load_data("digits")
    torch.testing.assert_close(torch.tensor(data.mean), data.public.images.mean().reshape(1))
    torch.testing.assert_close(torch.tensor(data.std), data.public.images.std(correction=0).reshape(1))
    given = load_data("digits", mean=(0.25,), std=(0.5,))
    assert (given.mean, given.std) == ((0.25,), (0.5,))


def test_std_has_a_floor(tmp_path: Path) -> None:
    cells = [{"bytes": png(Image.new("L", (4, 4), 90)), "path": None}] * 10
    data = load_data(str(write(tmp_path / "flat.parquet", table([0, 1] * 5, cells=cells))), **SMALL)
    assert data.std == (1e-3,)


@pytest.mark.parametrize(
    "given",
    [{"mean": (0.5, 0.5)}, {"mean": ()}, {"std": (0.0,)}, {"std": (-1.0,)}, {"mean": (float("nan"),)}],
)
def test_bad_mean_or_std(given: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(given))} "):
        load_data("digits", **given)


# Parquet


@pytest.mark.parametrize("declared", [None, features()])
def test_parquet_in_the_hubs_format(tmp_path: Path, declared: Any) -> None:
    labels = [0, 2, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2]
    path = write(tmp_path / "set.parquet", table(labels, declared=declared), row_group_size=5)
    data = load_data(str(path), **SMALL)
    check_pools(data)
    assert data.num_classes == 3 and data.image_shape == (3, 5, 6)
    for pool in (data.target, data.tune, data.public):
        assert pool.labels.tolist() == [labels[row] for row in pool.rows]
        for image, row in zip(pool.images, pool.rows, strict=True):
            assert np.array_equal(raw(image), np.asarray(picture(row)))


def test_declared_classes_count_even_where_no_row_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table([0, 1] * 6, declared=features(classes=7)))
    assert load_data(str(path), **SMALL).num_classes == 7


def test_string_labels_are_sorted_and_plain_bytes_are_images(tmp_path: Path) -> None:
    cells = [png(picture(i)) for i in range(12)]
    labels = ["dog", "cat", "eel"] * 4
    data = load_data(str(write(tmp_path / "a.parquet", table(labels, cells=cells))), **SMALL)
    assert data.num_classes == 3
    assert data.target.labels.tolist() == [["cat", "dog", "eel"].index(labels[row]) for row in data.target.rows]


def test_images_stored_by_path(tmp_path: Path) -> None:
    for i in range(12):
        picture(i).save(tmp_path / f"{i}.png")
    cells = [{"bytes": None, "path": f"{i}.png"} for i in range(12)]
    data = load_data(str(write(tmp_path / "a.parquet", table([0, 1] * 6, cells=cells))), **SMALL)
    assert np.array_equal(raw(data.target.images[0]), np.asarray(picture(data.target.rows[0])))


def test_folder_of_parquet_files_with_splits(tmp_path: Path) -> None:
    parts = [table([0, 1] * 4, cells=[png(picture(10 * n + i)) for i in range(8)]) for n in range(3)]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", parts[0])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", parts[1])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", parts[2])
    (tmp_path / "README.md").write_text("about")
    train = load_data(str(tmp_path), target=10, tune=2, public=4)
    row = train.target.rows[0]
    expected = picture(row if row < 8 else row + 2)
    assert np.array_equal(raw(train.target.images[0]), np.asarray(expected))
    test = load_data(str(tmp_path), target=4, tune=1, public=3, split="test")
    assert sorted(test.target.rows + test.tune.rows + test.public.rows) == list(range(8))
    with pytest.raises(UnknownName, match="'tset'.*did you mean 'test'"):
        load_data(str(tmp_path), **SMALL, split="tset")


def test_first_split_where_there_is_no_train(tmp_path: Path) -> None:
    write(tmp_path / "validation.parquet", table([0, 1] * 6))
    assert len(load_data(str(tmp_path), **SMALL).target) == 3


def test_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    declared = {**features("photo", "coarse"), "fine_label": features()["label"]}
    made = table([0, 1] * 6, image="photo", label="coarse", declared=declared)
    made = made.append_column("fine_label", pa.array([2, 0] * 6))
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": declared}})})
    path = write(tmp_path / "a.parquet", made)
    found = load_data(str(path), **SMALL)
    assert found.target.labels.tolist() == [[2, 0][row % 2] for row in found.target.rows]
    coarse = load_data(str(path), **SMALL, label_column="coarse")
    assert coarse.target.labels.tolist() == [row % 2 for row in coarse.target.rows]


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (table([0, 1] * 6, image="photo"), {}, "none is called image or img.*photo, label.*image_column"),
        (table([0, 1] * 6, label="y"), {}, "label column.*columns are: image, y.*label_column"),
        (table([0, 1] * 6), {"image_column": "pic"}, "'pic'.*image, label"),
        (table([0, 1] * 6), {"label_column": "y"}, "'y'.*image, label"),
        (
            table([0, 1] * 6).append_column("labels", pa.array([0, 1] * 6)),
            {},
            "several columns.*image, label, labels",
        ),
        (table([0.5, 1.0] * 6), {}, "holds float; class numbers or class names"),
        (table([0, None] * 6), {}, "holds int and missing values"),
        (table([0, -1] * 6), {}, "-1 to 0"),
        (table([0, 5] * 6, declared=features()), {}, "0 to 5; classes must be 0 to 2"),
        (table([0] * 12), {}, "one class only"),
        (table([0, 1] * 6), {"image_column": "label"}, "row .* of column 'label'.*not an image"),
        (table([0, 1] * 6, cells=[b"no picture"] * 12), {}, "not a readable image"),
        (table([0, 1] * 6, cells=[png(picture(1))[:60]] * 12), {}, "not a readable image"),
        (table([0, 1] * 6, cells=[{"bytes": None, "path": "gone.png"}] * 12), {}, "not a readable image"),
        (table([0, 1] * 6).slice(0, 0), {}, "has no rows"),
    ],
)
def test_bad_tables(tmp_path: Path, made: Any, options: dict[str, str], said: str) -> None:
    path = write(tmp_path / "a.parquet", made)
    with pytest.raises(DataError, match=said) as error:
        load_data(str(path), **SMALL, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 200, -20])
def test_damaged_parquet(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.parquet", table([0, 1] * 6))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="a.parquet.*damaged or cut off"):
        load_data(str(path), **SMALL)


def test_damaged_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table([0, 1] * 6), compression="gzip")
    raw = bytearray(path.read_bytes())
    raw[4 : len(raw) // 2] = b"\xff" * (len(raw) // 2 - 4)
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="a.parquet.*damaged or cut off"):
        load_data(str(path), **SMALL)


def test_files_of_one_split_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", table([0, 1] * 6))
    write(tmp_path / "b.parquet", table([0, 1] * 6, image="img"))
    with pytest.raises(DataError, match="different columns"):
        load_data(str(tmp_path), **SMALL)


# Image folders and pixels


def test_image_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"b": 5, "a": 7})
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / ".DS_Store").write_bytes(b"x")
    data = load_data(str(tmp_path / "set"), **SMALL)
    check_pools(data)
    assert data.num_classes == 2 and data.image_shape == (3, 5, 6)
    # "a" comes first in the listing, and was written second.
    assert data.target.labels.tolist() == [int(row >= 7) for row in data.target.rows]
    for split in ("train", "test"):
        write_folder(tmp_path / "parts" / split, {"b": 6, "a": 6})
    train = load_data(str(tmp_path / "parts"), **SMALL)
    test = load_data(str(tmp_path / "parts"), **SMALL, split="test")
    assert train.target.rows == test.target.rows and train.digest == test.digest
    with pytest.raises(UnknownName, match="split 'test'"):
        load_data(str(tmp_path / "set"), **SMALL, split="test")
    with pytest.raises(ConfigError, match="no columns"):
        load_data(str(tmp_path / "set"), **SMALL, label_column="label")


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("LA", 3)]
)
def test_modes(tmp_path: Path, mode: str, channels: int) -> None:
    data = load_data(str(write_folder(tmp_path / mode.replace(";", ""), {"a": 6, "b": 6}, mode=mode)), **SMALL)
    check_pools(data)
    assert data.image_shape == (channels, 5, 6)
    row = data.target.rows[0]
    original = picture(row, mode)
    if mode == "I;16":
        expected = np.asarray(original).astype(np.float32) / 65535
    else:
        expected = np.asarray(original.convert("L" if channels == 1 else "RGB")).astype(np.float32) / 255
    found = data.target.images[0].permute(1, 2, 0).squeeze(-1).numpy()
    np.testing.assert_allclose(found, expected.squeeze(), rtol=1e-6)


def test_grey_among_colour_becomes_colour(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": 6, "b": 6})
    picture(50, "L").save(folder / "a" / "00.png")
    data = load_data(str(folder), target=8, tune=0, public=4)
    everything = torch.cat([data.target.images, data.public.images])
    grey = everything[(data.target.rows + data.public.rows).index(0)]
    assert data.image_shape[0] == 3 and torch.equal(grey[0], grey[1])


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": 6, "b": 6})
    picture(0, size=(9, 12)).save(folder / "a" / "00.png")
    with pytest.raises(DataError, match="from 5x6 to 12x9 pixels; set data.size"):
        load_data(str(folder), target=8, tune=0, public=4)
    assert load_data(str(folder), target=8, tune=0, public=4, size=4).image_shape == (3, 4, 4)


def test_unreadable_image_and_loose_image(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": 6, "b": 6})
    file = folder / "a" / "00.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="00.png' is not a readable image"):
        load_data(str(folder), target=8, tune=0, public=4)
    file.rename(folder / "00.png")
    with pytest.raises(DataError, match="00.png' is in no class"):
        load_data(str(folder), **SMALL)


# Names


def test_paths_that_lead_nowhere(tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "a.txt").write_text("x")
    for path, said in [
        (str(empty), "is empty"),
        (str(text), "neither Parquet files nor images"),
        (str(text / "a.txt"), "is not Parquet"),
        (str(tmp_path / "missing"), "does not exist"),
        ("./missing", "does not exist"),
        ("text/missing", "does not exist"),
        ("missing.parquet", "does not exist"),
    ]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=said) as error:
            load_data(path, **SMALL)
        assert path in str(error.value) and "\n" not in str(error.value)


def test_unknown_name(no_hub: None) -> None:
    with pytest.raises(UnknownName, match="data set 'face'; did you mean 'faces'.*Accepted: cifar10, digits"):
        load_data("face")


def test_bundled_sets_have_no_splits() -> None:
    with pytest.raises(ConfigError, match="data.split has no meaning for 'faces'"):
        load_data("faces", split="test")


def test_hub_out_of_reach(no_hub: None) -> None:
    for name in ("cifar10", "some-one/some.thing"):
        with pytest.raises(DataError, match="ConnectionError: no network in tests.*KEYHOLE_DATA") as error:
            load_data(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["datasets", "huggingface_hub"])
@pytest.mark.parametrize("works", [False, True])
def test_libraries_log_nothing_while_the_hub_is_asked(
    no_hub: None, monkeypatch: pytest.MonkeyPatch, library: str, works: bool
) -> None:
    logger = logging.getLogger(library)
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    def retry(name: str) -> Any:
        logging.getLogger(f"{library}.utils._http").warning("Retrying in 8s [Retry 5/5].")
        if not works:
            raise ConnectionError("no network in tests")
        schema = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["x", "y"])})
        columns = {"image": [picture(i) for i in range(12)], "label": [0, 1] * 6}
        return hub.DatasetDict({"train": hub.Dataset.from_dict(columns, features=schema)})

    monkeypatch.setattr(logger, "handlers", [Ear()])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(hub, "load_dataset", retry)
    level = logger.level
    if works:
        load_data("some-one/some.thing", **SMALL)
    else:
        with pytest.raises(DataError, match="no network in tests"):
            load_data("some-one/some.thing")
    assert heard == [] and logger.level == level
    logger.warning("as before")
    assert heard == ["as before"]


def test_hub_id(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"img": [picture(i) for i in range(12)], "label": [0, 1, 2] * 4}
    schema = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=["x", "y", "z"])})
    asked: list[str] = []

    def give(name: str) -> Any:
        asked.append(name)
        made = hub.Dataset.from_dict(columns, features=schema)
        return hub.DatasetDict({"test": made.select(range(9, 12)), "train": made})

    monkeypatch.setattr(hub, "load_dataset", give)
    data = load_data("some-one/some.thing", **SMALL)
    check_pools(data)
    assert asked == ["some-one/some.thing"] and data.num_classes == 3
    for image, label, row in zip(data.target.images, data.target.labels, data.target.rows, strict=True):
        assert label == row % 3
        assert np.array_equal(raw(image), np.asarray(picture(row)))
    with pytest.raises(DataError, match="has 3 images"):
        load_data("some-one/some.thing", **SMALL, split="test")
    named = load_data("cifar10", **SMALL)
    assert asked[-1] == "uoft-cs/cifar10" and named.mean == (0.4914672, 0.4822617, 0.4467701)


@pytest.mark.parametrize("place", ["who/what", "what"])
def test_local_copy_comes_before_the_hub(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write(tmp_path / place / "train.parquet", table([0, 1] * 6))
    monkeypatch.setenv("KEYHOLE_DATA", str(tmp_path))
    assert len(load_data("who/what", **SMALL).target) == 3
    monkeypatch.setenv("KEYHOLE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="KEYHOLE_DATA is '.*nowhere', which is not a folder"):
        load_data("who/what", **SMALL)


@pytest.mark.parametrize("package", ["datasets", "PIL.Image"])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    path = write(tmp_path / "a.parquet", table([0, 1] * 6))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(KeyholeError, match=r"install keyhole\[data\]"):
        load_data(str(path), **SMALL)


def test_cards_say_what_a_set_is_and_where_it_comes_from() -> None:
    assert {card.name for card in DATASETS} >= {"faces", "digits", "mnist", "fashion_mnist", "cifar10"}
    assert all(card.summary and card.link for card in DATASETS)


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table([0, 1] * 6))
    load_data(str(path), **SMALL)
    assert list(tmp_path.iterdir()) == [path]


def test_only_chosen_images_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    original = decoding.decode

    def watched(file: Any, where: str) -> torch.Tensor:
        decoded.append(where)
        return original(file, where)

    monkeypatch.setattr(decoding, "decode", watched)
    load_data(str(write(tmp_path / "a.parquet", table([0, 1] * 20))), **SMALL)
    assert len(decoded) == sum(SMALL.values())


@LOCAL
@pytest.mark.parametrize(
    ("name", "hub_id", "shape", "mean"),
    [
        ("mnist", "ylecun/mnist", (1, 28, 28), (0.1306637,)),
        ("fashion_mnist", "zalando-datasets/fashion_mnist", (1, 28, 28), (0.2860406,)),
        ("cifar10", "uoft-cs/cifar10", (3, 32, 32), (0.4914672, 0.4822617, 0.4467701)),
    ],
)
def test_published_sets(name: str, hub_id: str, shape: tuple[int, ...], mean: tuple[float, ...]) -> None:
    data = load_data(name, candidates=100)
    check_pools(data)
    assert data.image_shape == shape and data.num_classes == 10 and data.mean == mean
    assert same(data, load_data(name, candidates=100))
    assert load_data(name, candidates=100, split="test").digest != data.digest
    assert load_data(hub_id, candidates=100).target.rows == data.target.rows


@LOCAL
def test_orl_faces() -> None:
    folder = str(Path(os.environ["KEYHOLE_DATA"]) / "orl_faces")
    data = load_data(folder, size=32)
    check_pools(data)
    assert data.image_shape == (1, 32, 32) and data.num_classes == 40
    assert load_data(folder).image_shape == (1, 112, 92)


# Some classes of a set


def colours(folder: Path, counts: tuple[int, ...] = (4, 3, 5)) -> str:
    """A folder of pictures of one colour each, which tells class and place: (40 class, 5 place, 0)."""
    for label, count in enumerate(counts):
        (folder / f"class{label}").mkdir(parents=True)
        for place in range(count):
            Image.new("RGB", (4, 4), (40 * label, 5 * place, 0)).save(folder / f"class{label}" / f"{place}.png")
    return str(folder)


def told(image: torch.Tensor) -> tuple[int, int]:
    """Class and place of a picture of `colours`."""
    red, green, _ = (image[:, 0, 0] * 255).round().int().tolist()
    return red // 40, green // 5


def test_private_classes_are_numbered_in_the_order_given(tmp_path: Path) -> None:
    folder = colours(tmp_path / "set")
    data = load_data(folder, classes=[2, 0], target=3, tune=1, public=1, candidates=0, train=100)
    assert data.num_classes == 2
    pools = [data.target, data.tune, data.public, data.train]
    assert sum(map(len, pools)) == 4 + 5
    whole = {row: told(image) for row, image in zip(load_pool(folder).rows, load_pool(folder).images, strict=True)}
    seen = set()
    for pool in pools:
        for image, label, row in zip(pool.images, pool.labels.tolist(), pool.rows, strict=True):
            true, place = told(image)
            assert [2, 0][label] == true and whole[row] == (true, place)  # rows are those of the whole set
            seen.add((true, place))
    assert len(seen) == 9
    swapped = load_data(folder, classes=[0, 2], target=3, tune=1, public=1, candidates=0)
    assert torch.equal(swapped.target.labels, 1 - data.target.labels)


def test_a_pool_keeps_the_labels_of_its_set(tmp_path: Path) -> None:
    folder = colours(tmp_path / "set")
    pool = load_pool(folder, classes=[2, 1])
    assert sorted(pool.labels.tolist()) == [1] * 3 + [2] * 5
    assert all(told(image)[0] == label for image, label in zip(pool.images, pool.labels.tolist(), strict=True))
    assert len(load_pool(folder)) == 12 and load_pool(folder, size=8).images.shape[1:] == (3, 8, 8)
    # Fewer images are the first of more, and another seed draws others.
    few = load_pool(folder, classes=[2, 1], limit=3)
    assert few.rows == pool.rows[:3] and torch.equal(few.images, pool.images[:3])
    assert load_pool(folder, classes=[2, 1], seed=1).rows != pool.rows
    assert len(load_pool(folder, limit=100)) == 12


def test_private_and_public_classes_share_no_image() -> None:
    private = load_data("digits", classes=[0, 1, 2, 3, 4], candidates=0, train=10_000)
    public = load_pool("digits", classes=[5, 6, 7, 8, 9])
    rows = [set(pool.rows) for pool in (private.target, private.tune, private.public, private.train)]
    assert sum(map(len, rows)) == 901 and len(public) == 896  # of the 1,797 digits
    assert not set(public.rows) & set().union(*rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": []}, "at least one"),
        ({"classes": [1, 1]}, "must be different numbers from 0 to 9"),
        ({"classes": [3, 10]}, "must be different numbers from 0 to 9"),
        ({"classes": [-1, 2]}, "must be different numbers from 0 to 9"),
        ({"limit": 0}, "limit is 0"),
        ({"split": "train"}, "data.split has no meaning for 'digits'"),
    ],
)
def test_classes_that_are_not_there(given: dict[str, Any], said: str) -> None:
    with pytest.raises(KeyholeError, match=said):
        load_pool("digits", **given)


def test_one_class_is_no_task() -> None:
    with pytest.raises(DataError, match="one class only"):
        load_data("digits", classes=[3])


@LOCAL
def test_mnist_splits_into_private_and_public_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts as in the published experiments; labels alone are read, and no image is decoded."""

    def refuse(*given: Any) -> Any:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(sources, "decode_cell", refuse)
    wanted = {"train": [5923, 6742, 5958, 6131, 5842], "test": [980, 1135, 1032, 1010, 982]}
    public = 0
    for split, counts in wanted.items():
        whole = DATASETS.build("mnist", split=split)
        private, rows = _of_classes("mnist", whole, [0, 1, 2, 3, 4])
        others, other_rows = _of_classes("mnist", whole, [5, 6, 7, 8, 9])
        assert np.bincount(private.labels).tolist() == counts and private.num_classes == 5
        assert len(rows) + len(other_rows) == len(whole.labels) and not set(rows) & set(other_rows)
        public += len(others.labels)
    assert public == 34_265
