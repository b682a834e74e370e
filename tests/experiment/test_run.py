"""Clients that took long are simulated once for all attackers of a cell, and never mistaken for others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from keyhole.experiment import run
from keyhole.experiment.cost import rehearsal
from keyhole.experiment.plan import Group
from keyhole.experiment.run import GroupResult, run_group
from keyhole.experiment.setup import Setup

MASK = (("random_masking", {"rate": 0.4}),)
SHORT = {"steps": 5, "restarts": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = run._see

    def see(*arguments: Any) -> Any:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(run, "_see", see)
    monkeypatch.setattr(run, "WORTH_KEEPING", 0.0)
    return made


def group(make_trial: Any, attacker: str, rows: tuple[int, ...] = (0, 1), **fields: Any) -> Group:
    given = {"sees": ("targets", "update", "weights"), **fields}
    return Group(tuple(make_trial("idlg", SHORT, (row,), MASK, attacker=attacker, **given) for row in rows))


def same(a: GroupResult, b: GroupResult) -> bool:
    def plain(result: GroupResult) -> list[Any]:
        return [replace(outcome, seconds=0.0, client_seconds=0.0) for outcome in result.outcomes]

    pictures = all(torch.equal(a.reconstructions[name], b.reconstructions[name]) for name in a.reconstructions)
    return pictures and plain(a) == plain(b)


ATTACKERS = ("naive", "adaptive:survivors", "control:prior_only", "naive")


def test_all_attackers_look_at_one_client(make_setup: Any, make_trial: Any, calls: list[int]) -> None:
    setup: Setup = make_setup()
    together = [run_group(group(make_trial, attacker), setup) for attacker in ATTACKERS]
    assert calls == [1]
    alone = [run_group(group(make_trial, attacker), make_setup()) for attacker in ATTACKERS]
    assert len(calls) == 5
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "other",
    [{"rows": (1, 2)}, {"sees": ("update", "weights")}, {"rounds": 2}, {"seed": 1}, {"defense": ()}, {"pool": "tune"}],
    ids=str,
)
def test_whatever_changes_what_is_sent_is_another_client(
    other: dict[str, Any], make_setup: Any, make_trial: Any, calls: list[int]
) -> None:
    setup: Setup = make_setup()
    first = group(make_trial, "naive")
    if "seed" in other:
        setup.weights[1] = setup.weights[0]
        setup.states[1] = setup.states[0]
    run_group(first, setup)
    fields = {name: value for name, value in other.items() if name != "rows"}
    pairs = zip(first.trials, other.get("rows", (0, 1)), strict=True)
    changed = Group(tuple(replace(trial, episode=(row,), **fields) for trial, row in pairs))
    run_group(changed, setup)
    assert len(calls) == 2


def test_a_rehearsal_on_public_images_is_another_client(make_setup: Any, make_trial: Any, calls: list[int]) -> None:
    setup: Setup = make_setup()
    first = group(make_trial, "naive")
    run_group(first, setup)
    rehearsed, own = rehearsal(first.trials[0], setup, 2, 3)
    run_group(rehearsed, own)
    run_group(first, setup)
    assert len(calls) == 2
