"""The files of the report of model inversions."""

from __future__ import annotations

import json
from pathlib import Path

from inversion_cases import PLAN, found, row, spec

from keyhole.experiment.inversion_judge import ATTACK
from keyhole.experiment.training_plan import parse_training
from keyhole.report.inversion import write_inversions

KEYS = {
    "task", "state", "defense", "attack", "attacker", "round", "n", "networks", "attack_accuracy",
    "attack_accuracy_top5", "knn_distance", "feature_distance", "fid", "diversity", "accuracy", "seconds",
}  # fmt: skip
"""Of a row, as the issue lists them."""


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
