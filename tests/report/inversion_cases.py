"""Rows of model inversions, whose numbers the test chooses."""

from __future__ import annotations

from typing import Any

import torch

from keyhole.core.trial import Spec
from keyhole.experiment.inversion_judge import ATTACK, Inversions, Row
from keyhole.experiment.training_plan import parse_training
from keyhole.inversion.evaluate import Scores

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
