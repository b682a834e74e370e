from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from keyhole.errors import StoreError
from keyhole.experiment.store import Store
from keyhole.solve.files import make_folder, write_tensors


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    """Whoever runs this shares all new files with everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(place.stat().st_mode) for place in folder.rglob("*") if place.is_dir()}


def test_all_missing_folders_are_made_for_the_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    make_folder(Path("d/e"))
    assert sorted(place.name for place in tmp_path.rglob("*")) == ["a", "b", "c", "d", "e"]
    assert modes(tmp_path) == {0o700}


def test_folders_that_were_there_keep_their_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    make_folder(tmp_path / "shared" / "own")
    make_folder(tmp_path / "shared")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert modes(tmp_path / "shared") == {0o700}


@pytest.mark.parametrize("place", ["file", "file/in"])
def test_a_file_in_the_way_is_an_error_of_the_system(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / place)


def test_what_writes_results_makes_such_folders(tmp_path: Path) -> None:
    with Store(tmp_path / "audits" / "one"):
        pass
    write_tensors(tmp_path / "trainings" / "one" / "seed-0" / "round.safetensors", {"w": torch.ones(2)}, {})
    assert modes(tmp_path) == {0o700}
    (tmp_path / "file").touch()
    for write in (lambda: Store(tmp_path / "file").__enter__(), lambda: write_tensors(tmp_path / "file" / "w", {}, {})):
        with pytest.raises(StoreError, match="cannot write to the output folder"):
            write()
