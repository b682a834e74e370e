"""The claim cards are well formed, docs/claims.md is theirs, and a small version of each slow claim holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keyhole.core.registry import DEFENSES
from keyhole.experiment import audit, load_experiment
from keyhole.experiment.spec import load_study
from keyhole.report import Report, write_report

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", HERE / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", HERE.parent.parent / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CARDS = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}


@pytest.mark.parametrize("name", CARDS)
def test_card_is_whole(name: str, measure: ModuleType) -> None:
    card = CARDS[name]
    assert card.keys() == {"statement", "paper", "setting", "claimed", "measure", "measured", "interval", "date"}
    assert (card["measured"] is None) == (card["date"] is None)
    if card["claimed"] is not None:
        assert card["claimed"].keys() <= {"at_least", "at_most", "low_at_least"}
    if "defense" in card["measure"]:
        assert card["measure"]["defense"].partition("(")[0] in {"none", *(c.name for c in DEFENSES)}


def test_page_is_that_of_the_cards(measure: ModuleType) -> None:
    assert measure.PAGE.read_text() == measure.render(CARDS), "run: python tests/claims/measure.py --render"


def test_pages_of_what_was_measured_are_current(generate: ModuleType) -> None:
    pages = {"defenses.md": generate.defenses_page(), "inversions.md": generate.inversions_page()}
    for name, text in pages.items():
        assert (generate.DOCS / name).read_text() == text, "run: python docs/generate.py"


def test_an_unmet_claim_stays_visible(measure: ModuleType) -> None:
    card = {**next(iter(CARDS.values())), "claimed": {"at_least": 0.9}, "measured": 0.5, "interval": [0.4, 0.6]}
    assert measure.is_met(card) is False
    assert "| 0.5 (0.4 to 0.6) | **no** |" in measure.render({"x": card})


def small(tmp_path: Path, source: str, *overrides: str) -> Report:
    assert audit(load_experiment(source, overrides), tmp_path, jobs=1)
    return write_report(tmp_path)[0]


def rows(report: Report) -> dict[tuple[str, str], Any]:
    return {(row.defense, row.attacker): row for row in report.rows}


def test_faces_leak_undefended_and_to_who_knows_the_mask(tmp_path: Path) -> None:
    """A small `faces_full`: 6 faces, one network, one defense of each outcome."""
    chains = 'defenses=[{chain=[{name="random_masking"}]}, {chain=[{name="gaussian_noise", std=1.0, scale="rms"}]}]'
    found = rows(small(tmp_path, "faces", "run.samples=6", 'attacks=[{name="idlg"}]', chains))
    masked, noised = "random_masking(rate=0.5)", "gaussian_noise(std=1, scale=rms)"
    assert found["none", "naive"].leak_rate.value == 1.0
    assert found["none", "naive"].leak_rate_90.value == 1.0
    assert found["none", "naive"].label_accuracy.mean == 1.0
    assert found[masked, "naive"].leak_rate.value == 0.0
    assert found[masked, "adaptive:survivors"].leak_rate.value == 1.0
    assert found[noised, "adaptive:likelihood"].leak_rate.value == 0.0
    controls = [row for (_, attacker), row in found.items() if attacker.startswith("control:")]
    assert len(controls) == 7
    assert all(row.leak_rate.value == 0.0 for row in controls)
    assert found["none", "check:truth"].mse.median == 0.0


def test_inverting_gradients_beats_its_controls(tmp_path: Path) -> None:
    """A small `inverting_gradients_cifar10`: digits and a ReLU network of one hidden layer, 300 steps."""
    model = 'model={name="mlp", hidden=64, layers=1}'
    attack = 'attacks=[{name="inverting_gradients", steps=300, restarts=1, tv=1e-4}]'
    found = rows(small(tmp_path, "quick", model, attack, "defenses=[]", "run.samples=4"))
    controls = [row for (_, attacker), row in found.items() if attacker.startswith("control:")]
    assert found["none", "naive"].psnr.median > max(row.psnr.median for row in controls) + 3.0
    assert found["none", "naive"].ssim.median > 0.8


def test_the_right_belief_beats_a_wrong_one(tmp_path: Path) -> None:
    """A small `fedavg`: two updates of two local steps, and an attacker who doubles the learning rate."""
    settings = '[{name="exact"}, {name="wrong", against="exact", attacker={belief={name="sgd", lr=0.02}}}]'
    overrides = ["run.samples=4", "client.images=2", "attacks.0.steps=200", f"settings={settings}"]
    assert audit(load_study("fedavg", overrides), tmp_path, jobs=1)
    report = write_report(tmp_path)[0]
    (naive,) = (row for row in report.rows if row.setting == "exact" and row.attacker == "naive")
    assert naive.leak_rate.value == 1.0
    (test,) = (c for c in report.comparisons if c.kind == "setting")
    assert test.difference.value < -0.3


def test_feedback_and_gray_starts_are_compared_on_the_same_images(tmp_path: Path) -> None:
    """A small `dlg_fb`: two series of three faces; with one success to warm up, feedback starts the second image."""
    attacks = '[{name="dlg_fb", warmup=1, steps=300}, {name="dlg_fb", feedback=false, start="gray", steps=300}]'
    overrides = ["run.samples=6", "run.seeds=[0]", "client.series=3", f"attacks={attacks}", 'settings=[{name="faces"}]']
    assert audit(load_study("dlg_fb", overrides), tmp_path, jobs=1)
    report = write_report(tmp_path)[0]
    found = {row.attack: row for row in report.rows if row.attacker == "naive"}
    assert len(found) == 2
    assert all(row.n == 6 and row.success is not None and row.success.value >= 0.5 for row in found.values())
    (test,) = (c for c in report.comparisons if c.kind == "attack")
    assert test.n == 4, "the first update of each series of three comes before feedback"


def test_a_bar_on_an_interval_asks_for_its_lower_end(measure: Any) -> None:
    card = {"claimed": {"low_at_least": 0.0}, "measured": 0.1, "interval": [-0.01, 0.2]}
    assert measure.is_met(card) is False
    assert measure.is_met({**card, "interval": [0.01, 0.2]}) is True
    assert measure.is_met({**card, "interval": None}) is False


def test_a_change_may_be_asked_for_either_way_round(measure: Any, tmp_path: Path) -> None:
    test = {"attack": "a", "against": "b", "spent": [30.0, 40.0]}
    report = {"rows": [], "comparisons": [test]}
    how = {"kind": "change", "value": "spent"}
    assert measure.measure_report({**how, "attack": "a", "against": "b"}, report, tmp_path)[0] == pytest.approx(-25)
    found = measure.measure_report({**how, "attack": "b", "against": "a"}, report, tmp_path)[0]
    assert found == pytest.approx(100 * (40 / 30 - 1))
