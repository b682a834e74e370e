"""The report of model inversions, from rows whose numbers the test chooses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from keyhole.core.registry import INVERSIONS
from keyhole.core.trial import Spec
from keyhole.experiment.inversion_judge import ATTACK, Inversions, Row
from keyhole.experiment.training_plan import parse_training
from keyhole.inversion.evaluate import Scores
from keyhole.report.intervals import Estimate
from keyhole.report.inversion import (
    Cell,
    cells,
    compared,
    difference,
    floor,
    joined,
    lift,
    matched,
    note,
    table,
    verdict,
    write_inversions,
)
from keyhole.report.names import spec_names
from keyhole.report.text import NOTHING

PLAN: dict[str, Any] = {
    "title": "small plan",
    "data": {"name": "digits", "classes": [0, 1], "size": 32},
    "model": {"name": "mcnn"},
    "federation": {"rounds": 9},
    "defenses": [{"chain": [{"name": "clip", "norm": 1.0}]}],
    "invert": {
        "rounds": [1, 9], "samples": 2, "images": True, "public": [{"classes": [5, 6]}],
        "attacks": [{"name": "gmi"}, {"name": "gmi", "hsic": "diversity", "together": 8}],
    },
}  # fmt: skip
KEYS = {
    "task", "state", "defense", "attack", "attacker", "round", "n", "networks", "attack_accuracy",
    "attack_accuracy_top5", "knn_distance", "feature_distance", "fid", "diversity", "accuracy", "seconds",
}  # fmt: skip
"""Of a row, as the issue lists them."""


def scores(right: float, diversity: float = 1.0) -> Scores:
    return Scores((right, right), (1.0, 1.0), 3.0, 4.0, 5.0, diversity)


def row(right: float | None, **changes: Any) -> Row:
    """An attack's row; `None` is one that failed."""
    given: dict[str, Any] = {
        "defense": 0, "seed": 0, "round": 9, "attack": spec(0), "attacker": ATTACK, "accuracy": 0.9,
        "images": 0 if right is None else 4,
        "scores": None if right is None else scores(right, changes.pop("diversity", 1.0)),
        "detail": "it <broke>" if right is None else "",
    }  # fmt: skip
    return Row(**{**given, **changes})


def spec(place: int) -> Spec:
    plan = parse_training(PLAN)
    assert plan.invert is not None
    return plan.invert.attacks[place]


def found(*rows: Row, **changes: Any) -> Inversions:
    picture = torch.linspace(0, 1, 2 * 2 * 32 * 32).reshape(2, 2, 1, 32, 32)
    given: dict[str, Any] = {
        "plan": parse_training(PLAN), "rows": list(rows), "trained": [], "evaluator_accuracy": 0.97,
        "evaluator_classes": 4, "public": 24, "classes": 2, "components": 1, "private": picture,
        "pictures": {(r.defense, r.seed, r.round, r.attack, r.attacker): picture for r in rows if r.scores},
    }  # fmt: skip
    return Inversions(**{**given, **changes})


def one(inversions: Inversions, **wanted: Any) -> Cell:
    (cell,) = (c for c in cells(inversions) if all(getattr(c, name) == value for name, value in wanted.items()))
    return cell


def test_networks_that_agree_prove_no_more_than_their_images() -> None:
    cell = one(found(*(row(0.0, seed=seed) for seed in range(5))))
    # Wilson's upper bound of 0 of 20 images.
    z = stats.norm.ppf(0.975)
    assert cell.attack_accuracy.low == 0.0
    assert cell.attack_accuracy.high == pytest.approx(z**2 / (20 + z**2))


def test_attacks_of_one_name_are_told_apart_by_what_is_not_default() -> None:
    def made(**options: Any) -> Spec:
        whole = {name: p.default for name, p in INVERSIONS.card("gmi").signature().parameters.items()}
        return Spec.of("gmi", {**whole, **options}, 1)

    plain, strong, vmi = made(), made(final=2, identity="logit"), Spec.of("ked_mi", {"steps": 7}, 1)
    names = spec_names([plain, strong, vmi], INVERSIONS)
    assert [names[s] for s in (plain, strong, vmi)] == ["gmi", "gmi(final=2, identity=logit)", "ked_mi"]
    same = made(steps=9), made(steps=9, lr=0.5)
    assert [*spec_names(same, INVERSIONS).values()] == ["gmi", "gmi(lr=0.5)"]


def test_a_network_that_failed_does_not_take_the_others_along() -> None:
    cell = one(found(row(None), row(0.5, seed=1), row(0.5, seed=2)))
    z = stats.norm.ppf(0.975)
    half = z / (1 + z**2 / 8) * math.sqrt(0.25 / 8 + z**2 / (4 * 64))  # Wilson's of 4 of 8 images
    assert (cell.attack_accuracy.low, cell.attack_accuracy.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert cell.failed == "it <broke>" and set(cell.by_seed) == {1, 2}


def test_held_out_images_count_once_however_many_networks_there_are() -> None:
    ceiling = {"attacker": "control:private_images"}
    cell = one(found(*(row(1.0, seed=seed, **ceiling) for seed in range(5))))
    z = stats.norm.ppf(0.975)
    assert cell.attack_accuracy.low == pytest.approx(4 / (4 + z**2))


def test_lift_is_over_the_best_control_network_by_network() -> None:
    rows = [row(value, seed=seed) for seed, value in enumerate([0.5, 0.75])]
    rows += [row(0.25, seed=seed, attacker="control:untrained") for seed in range(2)]
    rows += [row(0.25, seed=seed, attacker="control:random_labels") for seed in range(2)]
    made = cells(found(*rows))
    attack = next(c for c in made if c.attacker == ATTACK)
    best = floor(made, attack)
    assert best is not None and best.attacker == "control:untrained"  # of equals
    half = 0.125 * stats.t.ppf(0.975, 1)  # differences .25 and .5
    above = lift(made, attack)
    assert (above.value, above.low, above.high) == pytest.approx(
        (0.375, max(-1.0, 0.375 - half), min(1.0, 0.375 + half))
    )


def test_networks_are_what_an_interval_is_over() -> None:
    values = [0.5, 0.7, 0.6, 0.9, 0.8]
    cell = one(found(*(row(v, seed=s, diversity=v) for s, v in enumerate(values))))
    half = stats.sem(values) * stats.t.ppf(0.975, 4)
    assert cell.attack_accuracy.value == pytest.approx(0.7)
    assert (cell.attack_accuracy.low, cell.attack_accuracy.high) == pytest.approx((0.7 - half, min(0.7 + half, 1)))
    assert cell.by_seed == dict(enumerate(values)) and cell.diversity == pytest.approx(0.7)
    assert cell.n == 4  # of one network
    single = one(found(row(0.5)))
    assert single.attack_accuracy.value == 0.5 and math.isnan(single.attack_accuracy.low)


def test_controls_follow_their_attack() -> None:
    rows = [
        row(0.2, round=1), row(0.1, round=1, attacker="control:untrained"), row(0.6),
        row(0.3, attacker="control:prior_samples", accuracy=0.9), row(0.2, round=9, attacker="control:untrained"),
    ]  # fmt: skip
    shown = [(c.round, c.attacker) for c in cells(found(*rows[::2], *rows[1::2]))]
    assert shown == [
        (1, ATTACK), (1, "control:untrained"), (9, ATTACK), (9, "control:untrained"), (9, "control:prior_samples"),
    ]  # fmt: skip


def test_the_verdict_holds_the_best_attack_against_its_best_floor() -> None:
    rows = [
        row(0.2, round=1), row(0.9, round=1, attacker="control:prior_samples"), row(0.8),
        row(0.25, attacker="control:untrained"), row(0.35, attacker="control:random_labels"),
        row(0.99, attacker="control:private_images"), row(0.7, attacker="control:other_round"),
        row(0.4, defense=1, accuracy=0.5),
    ]  # fmt: skip
    made = cells(found(*rows))
    best = floor(made, made[[(c.round, c.is_attack) for c in made].index((9, True))])
    assert best is not None and best.attacker == "control:random_labels"
    said = verdict(made)
    assert "round 9 (test accuracy 90 %)" in said and "against 35 % for the best control (random labels)" in said
    assert "Under clip(norm=1), 40.0 % of the images" in said
    assert "With 1 target network in a cell nothing is ranked: 5 are needed." in said
    assert "nothing is ranked" not in verdict(cells(found(*(row(0.5 + s / 100, seed=s) for s in range(5)))))


def test_attacks_are_compared_network_by_network() -> None:
    pairs = [(0.5, 0.7), (0.6, 0.9), (0.4, 0.5)]
    rows = [row(a, seed=s, diversity=2.0) for s, (a, _) in enumerate(pairs)]
    rows += [row(b, seed=s, attack=spec(1), diversity=2.5 + s) for s, (_, b) in enumerate(pairs)]
    rows += [row(0.1, seed=7, attack=spec(1))]  # which the first attack has not
    head, line = compared(cells(found(*rows)))
    assert line[:2] == ("none", "9") and line[-1] == "3"
    wanted = difference([0.2, 0.3, 0.1])
    half = stats.sem([0.2, 0.3, 0.1]) * stats.t.ppf(0.975, 2)
    assert wanted.value == pytest.approx(0.2) and wanted.high - wanted.value == pytest.approx(half)
    assert "+20" in line[4] and "+1.5" in line[5]
    assert len(head) == len(line)


def test_a_defense_is_held_against_the_undefended_network_of_its_accuracy() -> None:
    rows = [
        row(0.3, round=1, accuracy=0.61), row(0.8, round=9, accuracy=0.95),
        row(0.2, round=1, accuracy=0.10, defense=1), row(0.4, round=9, accuracy=0.65, defense=1),
        # The second network got there earlier, so that another round is its match.
        row(0.5, round=1, accuracy=0.80, seed=1), row(0.9, round=9, accuracy=0.95, seed=1),
        row(0.7, round=9, accuracy=0.94, defense=1, seed=1),
    ]  # fmt: skip
    _, line = matched(cells(found(*rows)))
    assert line[1:3] == (line[1], "9") and line[-1] == "2"
    # 0.4 - 0.3 and 0.7 - 0.9.
    assert "-5" in line[5].replace("\u2212", "-")
    assert line[4] == "78 %"  # (0.61 + 0.95) / 2


def test_updates_and_networks_are_joined_by_defense_and_round() -> None:
    made = cells(found(row(0.4, round=1), row(0.6), row(0.7, attack=spec(1))))
    head, *lines = joined(made, {("none", 0): Estimate(0.8, 0.6, 0.9), ("none", 9): Estimate(0.1, 0.0, 0.2)})
    assert [line[1] for line in lines] == ["0", "1", "9"] and len(head) == 5
    assert lines[0][4] == NOTHING and lines[1][3] == NOTHING
    assert "10.0 %" in lines[2][3] and "70.0 %" in lines[2][4]  # the worst attack
    assert joined(made, {}) == []


def test_the_files(tmp_path: Path) -> None:
    rows = [
        row(0.75, round=1, seconds=2.0), row(0.5), row(0.25, attacker="control:untrained"), row(None, attack=spec(1)),
        row(0.5, round=0),
    ]  # fmt: skip
    lines, said, page = write_inversions(found(*rows), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schema"] == 1 and report["kind"] == "model" and report["verdict"] == said
    assert report["evaluator"] == {"name": "scnn", "accuracy": 0.97, "classes": 4} and report["public_images"] == 24
    assert all(row.keys() >= KEYS for row in report["rows"])
    by_round = {r["round"]: r for r in report["rows"] if r["attacker"] == ATTACK and not r["failed"]}
    early = by_round[1]
    assert early["attack_accuracy"] == {"value": 0.75, "low": None, "high": None}
    assert early["task"] == "digits [0, 1] / mcnn" and early["state"] == "round 1" and early["seconds"] == 2.0
    assert by_round[0]["state"] == "untrained"
    broken = [r for r in report["rows"] if r["failed"]]
    assert [r["failed"] for r in broken] == ["it <broke>"] and broken[0]["networks"] == 0
    text = (tmp_path / "report.md").read_text()
    assert len(lines) == 1 + sum(r.attacker == ATTACK for r in rows) and "it <broke>" in text and "# small plan" in text
    html = page.read_text()
    assert "it &lt;broke&gt;" in html and "<broke>" not in html
    # Private images, three rounds' and one control's, in one group; nothing else is shown as a picture of a class.
    assert html.count("one row of images for each class") == 5
    assert "private images" in html and "no private image, no update" in html


def test_a_page_without_pictures_shows_none(tmp_path: Path) -> None:
    plan = parse_training({**PLAN, "invert": {**PLAN["invert"], "images": False}})
    _, _, page = write_inversions(found(row(0.5), plan=plan, private=None), tmp_path)
    assert "one row of images" not in page.read_text()


def test_a_report_in_which_all_failed(tmp_path: Path) -> None:
    lines, said, page = write_inversions(found(row(None), row(None, round=1)), tmp_path)
    assert said.startswith("No attack came to an end") and [line[4] for line in lines[1:]] == ["it <broke>"] * 2
    assert "Leakage against rounds" not in page.read_text()


def test_the_note_tells_on_what_frechet_distances_are() -> None:
    assert "on their first 1 principal components" in note(found(row(0.5)))
    assert "principal components" not in note(found(row(0.5), components=0))


def test_the_table_has_a_line_for_each_cell() -> None:
    head, *lines = table(cells(found(row(0.5), row(None, round=1))))
    assert [len(line) for line in lines] == [len(head)] * 2
