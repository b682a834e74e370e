"""Audits of the published defenses: what does not fit ends before it begins, what cannot be explained is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keyhole.core.trial import Outcome
from keyhole.errors import ConfigError
from keyhole.experiment import audit
from keyhole.experiment.spec import parse_study
from keyhole.experiment.store import Store
from keyhole.report.summarize import Report, summarize
from keyhole.report.write import read_audit


def raw(defense: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {
        "data": {"name": "digits", "target": 8, "tune": 2, "public": 12},
        "model": {"name": "mlp", "hidden": 12, "layers": 1},
        "attacks": [{"name": "idlg", "steps": 20, "restarts": 1}],
        "defenses": [{"chain": [defense]}],
        "run": {"samples": 2},
    }
    return {**base, **changes}


def run(folder: Path, defense: dict[str, Any], **changes: Any) -> tuple[Report, list[Outcome]]:
    assert audit(parse_study(raw(defense, **changes)), folder, jobs=1)
    settings, outcomes = read_audit(folder)
    return summarize(settings, outcomes), [o for o in outcomes if o.trial.defense]


@pytest.mark.parametrize(
    ("defense", "sentence"),
    [
        ({"name": "soteria", "layer": "nope"}, "nope"),
        ({"name": "withhold", "layers": "nope"}, "nope"),
    ],
)
def test_a_layer_that_is_not_there_ends_the_audit_before_it_begins(
    defense: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path / "out", defense)
    assert not (tmp_path / "out" / "outcomes.jsonl").exists()


def test_under_the_usual_threat_model_concealed_images_have_an_attacker_who_knows(tmp_path: Path) -> None:
    """Proxies' labels are not told, so that they are found; controls stand beside that attacker."""
    _, outcomes = run(tmp_path, {"name": "concealing", "steps": 2})
    ended = {o.trial.attacker: o.status for o in outcomes}
    assert ended["adaptive:matched"] == "refused"
    others = ("naive", "adaptive:labels_found", "control:prior_only", "control:other_client")
    assert all(ended[attacker] in ("budget", "stalled", "converged") for attacker in others)


def test_counters_of_one_gradient_say_so_under_local_training(tmp_path: Path) -> None:
    client = {"rule": "sgd", "lr": 0.1, "images": 2}
    _, outcomes = run(tmp_path, {"name": "concealing", "steps": 2}, client=client)
    refused = {o.trial.attacker: o.detail for o in outcomes if o.status == "refused"}
    assert set(refused) == {"adaptive:matched", "adaptive:labels_found"}
    assert "made of 2" in refused["adaptive:labels_found"]
    assert "failed" not in {o.status for o in outcomes}


def test_images_that_a_defense_leaves_alone_do_not_count_for_it(tmp_path: Path) -> None:
    defense = {"name": "concealing", "steps": 2, "sensitive": 1}
    report, outcomes = run(tmp_path, defense, client={"batch_size": 2}, run={"samples": 4})
    assert all(
        sorted(o.notes["protected"]) == [0, 0, 1, 1] or sorted(o.notes["protected"]) == [0, 1]
        for o in outcomes
        if o.notes
    )
    rows = {(row.defense != "none", row.attacker): row.n for row in report.rows}
    assert (rows[False, "naive"], rows[True, "naive"]) == (4, 2)


def test_a_second_attack_shares_the_budget_and_needs_pictures(tmp_path: Path) -> None:
    attacks = [{"name": "idlg", "steps": 20, "restarts": 1}, {"name": "labels_only"}]
    _, outcomes = run(tmp_path, {"name": "obscuring", "steps": 2}, attacks=attacks, run={"samples": 2, "budget": 10})
    spent = {(o.trial.attack.name, o.trial.attacker): o.evaluations for o in outcomes}
    assert spent["idlg", "adaptive:feature_inversion"] == 10
    assert spent["labels_only", "adaptive:feature_inversion"] == 1


def test_notes_of_a_series_stay_those_of_their_images(tmp_path: Path) -> None:
    changes = {"client": {"series": 2}, "run": {"samples": 4}}
    _, series = run(tmp_path / "series", {"name": "obscuring", "steps": 2}, **changes)
    assert {len(o.notes["distinct"]) for o in series if o.notes} == {2}
    assert {o.status for o in series if o.trial.attacker == "adaptive:feature_inversion"} == {"refused"}


def test_noisy_gradients_add_up_over_updates_of_the_same_image(tmp_path: Path) -> None:
    _, outcomes = run(tmp_path, {"name": "dp_sgd"}, client={"rounds": 3})
    assert {tuple(o.notes["noisy gradients"]) for o in outcomes if o.notes} == {(3.0,)}
    assert all("after 3 noisy gradients" in o.detail for o in outcomes if o.notes)
    attacks = [o for o in outcomes if o.trial.attacker == "naive"]
    assert all(0 < o.facts["success_prior"] < o.facts["success_bound"] <= 1 for o in attacks)


def test_the_store_is_readable(tmp_path: Path) -> None:
    run(tmp_path, {"name": "soteria", "rate": 0.3})
    assert all(Outcome.from_json(o.to_json()) == o for o in Store(tmp_path).outcomes().values())
