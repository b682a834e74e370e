"""Worker processes: what they have to say reaches whoever started them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest

from keyhole.experiment.work import in_processes


def warns(item: str, progress: Callable[[float], None]) -> str:
    progress(0.5)
    warnings.warn(f"{item} is damaged", stacklevel=1)
    return item.upper()


def test_warnings_of_workers_are_given_here(capfd: pytest.CaptureFixture[str]) -> None:
    """Not printed by the workers, whose command line is not set up for it."""
    told: list[tuple[str, float]] = []
    items = {"one": "a", "two": "b", "three": "c"}
    with pytest.warns(UserWarning) as said:
        found = dict(in_processes(warns, items, 2, lambda name, fraction: told.append((name, fraction))))
    assert found == {"one": "A", "two": "B", "three": "C"}
    assert sorted(str(one.message) for one in said) == ["a is damaged", "b is damaged", "c is damaged"]
    assert sorted(told) == [("one", 0.5), ("three", 0.5), ("two", 0.5)]
    assert "damaged" not in capfd.readouterr().err
