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


README_ACCURACY = {
    "none (32 faces)": "none",
    "random masking, 90 % (32 faces)": "random_masking(rate=0.9)",
    "magnitude pruning, 90 % (32 faces)": "prune(rate=0.9)",
    "Soteria, 40 % (16 CIFAR-10 images)": "soteria(rate=0.4)",
    "Learning to Obscure Data, our reading (32 faces)": "obscuring(floor=0.05)",
    "noise as large as the update's rms (32 faces)": "gaussian_noise(std=1, scale=rms)",
}
README_FRONTIER = {
    "none": "none",
    "random masking, 90 %": "random_masking(rate=0.9)",
    "magnitude pruning, 90 %": "prune(rate=0.9)",
    "rounding to 16 levels": "quantize(levels=16)",
    "noise as large as the update's rms": "gaussian_noise(std=1, scale=rms)",
    "DP-SGD, noise multiplier 1, epsilon 81": "dp_sgd(noise_multiplier=1)",
}


README_SENT = ("images behind an update", "recovered, one step", "recovered, three steps")


def test_the_readme_says_what_was_measured() -> None:
    """Accuracies and leak rates of its two tables, row by row."""
    lines = (HERE.parent.parent / "README.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    kept = {name: json.loads((HERE / "measured" / f"{name}.json").read_text()) for name in ("accuracy", "frontiers")}
    said = {row[0]: row[3] for row in table if len(row) == 4 and row[0] in README_ACCURACY}
    assert said.keys() == README_ACCURACY.keys()
    for row, defense in README_ACCURACY.items():
        measured = kept["accuracy"]["defenses"][defense]["accuracy"]["value"]
        assert said[row].split(" %")[0] == f"{100 * measured:.0f}", row
    points = {point["defense"]: point for point in kept["frontiers"]["frontier_mnist"]["points"]}
    told = {row[0]: row[1:] for row in table if len(row) == 3 and row[0] in README_FRONTIER}
    assert told.keys() == README_FRONTIER.keys()
    for row, defense in README_FRONTIER.items():
        accuracy, leaks = points[defense]["accuracy"], points[defense]["leak_rate"]
        bounds = [f"{100 * leaks[end]:.0f}" for end in ("value", "low", "high")]
        assert told[row] == [f"{100 * accuracy['value']:.1f} %", "{} % ({} to {})".format(*bounds)], row
    assert f"{points['dp_sgd(noise_multiplier=1)']['epsilon']:.0f}" == "81"
    sent = json.loads((HERE / "measured" / "sent.json").read_text())["updates"]
    head, one, three = (next(row for row in table if row[0].startswith(start)) for start in README_SENT)
    for steps, row in ((1, one), (3, three)):
        found = {str(u["images"]): f"{u['leaked']} of {u['of']}" for u in sent if u["steps"] == steps}
        assert dict(zip(head[1:], row[1:], strict=True)) == found


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
