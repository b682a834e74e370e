"""The kept cells say what the reports they come from say, in the report's own levels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keyhole.experiment import audit, load_experiment
from keyhole.report import write_report
from keyhole.report.summarize import summarize
from keyhole.report.verdict import level
from keyhole.report.write import read_audit

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cells() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cells", HERE / "cells.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit")
    assert audit(load_experiment("quick", ["run.samples=4"]), out, jobs=1)
    write_report(out)
    return out


def test_a_cell_holds_the_worst_of_each_kind(cells: ModuleType, folder: Path) -> None:
    raw = json.loads((folder / "report.json").read_text())
    found = cells.cells_of("quick", raw, "2026-01-01")
    assert {(c["defense"], c["attack"]) for c in found} == {(r["defense"], r["attack"]) for r in raw["rows"]}
    settings, outcomes = read_audit(folder)
    rows = summarize(settings, outcomes).rows
    for cell in found:
        own = [row for row in rows if (row.defense, row.attack) == (cell["defense"], cell["attack"])]
        assert cell["level"] == level(row for row in own if row.is_attack)
        knows = [row.leak_rate.value for row in own if row.attacker.startswith("adaptive:")]
        assert (cell["adaptive"] is None) == (not knows)
        if knows:
            assert cell["adaptive"]["leak_rate"]["value"] == pytest.approx(max(knows), rel=1e-5)
        (naive,) = (row.leak_rate.value for row in own if row.attacker == "naive")
        assert cell["naive"]["leak_rate"]["value"] == pytest.approx(naive, rel=1e-5)
        assert cell["controls"] == max(row.leak_rate.value for row in own if row.attacker.startswith("control:"))


def test_an_audit_that_is_not_complete_is_refused(cells: ModuleType, folder: Path) -> None:
    raw = json.loads((folder / "report.json").read_text())
    with pytest.raises(SystemExit, match="not complete"):
        cells.cells_of("quick", {**raw, "complete": False}, "2026-01-01")


def test_cells_of_one_audit_are_replaced_where_they_were(cells: ModuleType) -> None:
    def named(*pairs: tuple[str, int]) -> list[dict[str, Any]]:
        return [{"audit": audit, "n": n} for audit, n in pairs]

    before = named(("a", 1), ("b", 1), ("b", 2), ("c", 1))
    assert cells.merge(before, "b", named(("b", 3))) == named(("a", 1), ("b", 3), ("c", 1))
    assert cells.merge(before, "d", named(("d", 1))) == [*before, *named(("d", 1))]


def test_what_is_kept_can_be_read(cells: ModuleType) -> None:
    kept = cells.load()
    assert kept
    needed = {"audit", "setting", "defense", "attack", "naive", "adaptive", "controls", "lift", "level", "date"}
    assert all(needed <= cell.keys() for cell in kept)
