"""The frontier: its study, its rows against the audit's own, the bound over a whole training, and the page."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyhole.defenses.dp_sgd import DPSGD
from keyhole.errors import ConfigError
from keyhole.experiment.frontier import frontier, study_of
from keyhole.experiment.setup import find_device, prepare
from keyhole.experiment.spec import parse_experiment
from keyhole.experiment.train import Trained
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.report.frontier import answer, points, write_frontier
from keyhole.report.intervals import Estimate
from keyhole.report.names import defense_name
from keyhole.report.summarize import summarize
from keyhole.report.write import read_audit
from keyhole.zoo.datasets import load_data

FILE = """
[data]
name = "digits"
target = 2
tune = 0
public = 8
candidates = 0
test = 50
train = 46

[model]
name = "lenet_zhu"

[federation]
clients = 3
rounds = 2
batch_size = 16
lr = 0.3

[[defenses]]
chain = [{ name = "prune", rate = 0.5 }]

[[defenses]]
chain = [{ name = "dp_sgd", noise_multiplier = 8.0 }]

[run]
seeds = [0, 1]

[audit]
rounds = [0, 2]

[[audit.attacks]]
name = "idlg"
steps = 12

[audit.run]
samples = 2
"""


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return parse_training(tomllib.loads(FILE), "small")


@pytest.fixture(scope="module")
def run(plan: TrainingPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trained], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frontier")
    done = frontier(plan, folder, name=defense_name, jobs=1)
    write_frontier(plan, done, folder)
    return folder, done, json.loads((folder / "report.json").read_text())


def test_rows_are_the_audits_with_their_training(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]]
) -> None:
    folder, done, report = run
    settings, outcomes = read_audit(folder / "audit")
    own = summarize(settings, outcomes).asdict()["rows"]
    added = ("trained_under", "accuracy", "round", "epsilon")
    assert [{k: v for k, v in row.items() if k not in added} for row in report["rows"]] == own
    assert report["complete"] and {row["round"] for row in report["rows"]} == {0, 2}
    ends = {name: [r.accuracy for r in done if defense_name(r.defense) == name] for name in
            ("none", "prune(rate=0.5)", "dp_sgd(noise_multiplier=8)")}  # fmt: skip
    for row in report["rows"]:
        mean = sum(ends[row["trained_under"]]) / 2
        assert row["accuracy"]["value"] == pytest.approx(mean, rel=1e-5)
        assert row["accuracy"]["low"] <= mean <= row["accuracy"]["high"]
        # Clients of 16 images and one batch: one gradient of each image in each of two rounds.
        private = row["defense"].startswith("dp_sgd")
        expected = DPSGD(noise_multiplier=8.0).privacy(2).epsilon if private else None
        assert row["epsilon"] == (pytest.approx(expected, rel=1e-5) if private else None)


def test_networks_of_a_setting_are_the_files_of_its_training(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]]
) -> None:
    folder, done, _ = run
    study = study_of(plan, done, folder, defense_name)
    assert [e.setting for e in study.experiments] == [
        "untrained", "none, round 2", "prune(rate=0.5), round 2", "dp_sgd(noise_multiplier=8), round 2",
    ]  # fmt: skip
    from safetensors.torch import load_file

    setup = prepare(study.experiments[2], find_device("cpu"))
    pruned = {r.seed: r for r in done if r.defense and r.defense[0].name == "prune"}
    for seed, (weights,) in setup.weights.items():
        stored = load_file(pruned[seed].checkpoint(2))
        assert all(bool((stored[name] == value).all()) for name, value in weights.params.items())


def test_the_bound_counts_all_rounds_before_the_update(run: tuple[Path, list[Trained], dict[str, Any]]) -> None:
    """Of digits without candidates the prior is known only to the audit, so it is read off the untrained bound."""
    from scipy import stats

    _, _, report = run
    bounds = {
        row["round"]: row["bound"]
        for row in report["rows"]
        if row["defense"].startswith("dp_sgd") and row["attacker"] == "naive"
    }
    prior = stats.norm.ppf(bounds[0]) - 1 / 8
    assert bounds[2] == pytest.approx(stats.norm.cdf(prior + math.sqrt(3) / 8), abs=1e-5)
    assert all(row["bound"] is None for row in report["rows"] if not row["defense"].startswith("dp_sgd"))


def test_points_are_the_worst_of_all_rounds_and_attackers(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]]
) -> None:
    folder, done, report = run
    found = points(plan, done, summarize(*read_audit(folder / "audit")))
    assert [point.defense for point in found] == ["none", "prune(rate=0.5)", "dp_sgd(noise_multiplier=8)"]
    for point in found:
        own = [
            row
            for row in report["rows"]
            if row["defense"] == row["trained_under"] == point.defense and not row["attacker"].startswith(("co", "ch"))
        ]
        assert point.leak_rate.value == pytest.approx(max(row["leak_rate"]["value"] for row in own))
        assert [number for number, _ in point.by_round] == [0, 2]
        assert point.bytes_up > 0 and point.client_seconds > 0
    assert len(report["points"]) == 3


def test_the_page_has_the_section_and_a_plain_audit_has_not(run: tuple[Path, list[Trained], dict[str, Any]]) -> None:
    from keyhole.report.write import write_report

    folder, _, _ = run
    page = (folder / "report.html").read_text()
    section = page[page.index("Accuracy against leakage") :]
    assert "Without a defense the accuracy is" in page[: page.index("Accuracy against leakage")]
    assert section.count("data:image/svg+xml") >= 2 and "prune(<wbr>rate=0.5)" in section
    _, plain = write_report(folder / "audit")
    assert "Accuracy against leakage" not in plain.read_text()


def test_it_goes_on_where_it_stopped_and_writes_the_same(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from where the same folder has another path."""
    folder, _, report = run
    monkeypatch.chdir(folder.parent)
    again = frontier(plan, Path(folder.name), name=defense_name, jobs=1)
    write_frontier(plan, again, folder)
    assert json.loads((folder / "report.json").read_text()) == report


def test_the_answer_sorts_defenses_by_how_they_did_and_then_by_accuracy(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]]
) -> None:
    folder, done, _ = run
    one = points(plan, done, summarize(*read_audit(folder / "audit")))[0]

    def point(name: str, accuracy: float, worst: float) -> Any:
        return replace(one, defense=name, accuracy=Estimate(accuracy), leak_rate=Estimate(worst))

    said = answer(
        [point("none", 0.97, 1.0), point("a", 0.8, 0.0), point("b", 0.9, 0.05), point("c", 0.7, 0.3),
         point("d", 0.6, 0.5), point("e", 0.5, math.nan)],
        0.1,
    )  # fmt: skip
    assert said == [
        "Without a defense the accuracy is 97.0 %, and 100 % of the attacked images, one behind each update, leaked to "
        "the worst attacker.",
        "Not broken by the attacks tried: b (accuracy 90.0 %), a (accuracy 80.0 %).",
        "Gave way in part: c (accuracy 70.0 %).",
        "Fell: d (accuracy 60.0 %).",
        "Could not be scored: e (accuracy 50.0 %).",
    ]


def test_the_answer_says_where_there_was_nothing_to_stop_and_what_learned_nothing(
    plan: TrainingPlan, run: tuple[Path, list[Trained], dict[str, Any]]
) -> None:
    folder, done, _ = run
    one = points(plan, done, summarize(*read_audit(folder / "audit")))[0]
    found = [
        replace(one, defense="none", accuracy=Estimate(0.96, 0.93, 0.98), leak_rate=Estimate(0.0)),
        replace(one, defense="prune", accuracy=Estimate(0.95), leak_rate=Estimate(0.0)),
        replace(one, defense="mask", accuracy=Estimate(0.17, 0.03, 0.31), leak_rate=Estimate(0.0)),
    ]
    assert answer(found, 0.114) == [
        "Without a defense the accuracy is 96.0 % (93.0 to 98.0), and 0 % of the attacked images, one behind each "
        "update, leaked to the worst attacker.",
        "Not broken by the attacks tried: prune (accuracy 95.0 %), mask (accuracy 17.0 %, not clearly above the 11.4 % "
        "of guessing one class).",
        "As there was next to nothing to stop, this says little about the defenses.",
    ]
    blind = answer([replace(found[0], accuracy=Estimate(0.1))], 0.114)
    assert len(blind) == 1 and "10.0 %, not clearly above the 11.4 % of guessing one class, and 0 %" in blind[0]


def test_chance_is_to_name_the_most_frequent_class_of_the_held_out_images(
    run: tuple[Path, list[Trained], dict[str, Any]],
) -> None:
    held = load_data("digits", target=2, tune=0, public=8, candidates=0, train=96).train.labels[:50].tolist()
    wanted = max(held.count(label) for label in range(10)) / 50
    assert all(one.chance == pytest.approx(wanted) for one in run[1])


def test_seen_needs_a_file_of_weights() -> None:
    raw = {
        "data": {"name": "digits"},
        "model": {"name": "lenet_zhu"},
        "state": {"seen": 3},
        "attacks": [{"name": "idlg"}],
    }
    with pytest.raises(ConfigError, match="state.seen is about a file of weights"):
        parse_experiment(raw)


def test_a_plan_without_audit_is_refused(plan: TrainingPlan, tmp_path: Path) -> None:
    bare = plan.model_copy(update={"audit": None, "defenses": ((),), "rounds": ()})
    with pytest.raises(ConfigError, match=r"needs an \[audit\] section"):
        frontier(bare, tmp_path, name=defense_name)
    assert not (tmp_path / "config.toml").exists()
