"""What the report of model inversions says in words."""

from __future__ import annotations

from inversion_cases import found, row

from keyhole.report.inversion_sentences import note, verdict
from keyhole.report.inversion_summary import cells, floor


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


def test_the_note_tells_on_what_frechet_distances_are() -> None:
    assert "on their first 1 principal components" in note(found(row(0.5)))
    assert "principal components" not in note(found(row(0.5), components=0))
