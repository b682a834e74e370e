"""No reconstruction depends on the secret except through `observe`: proven by destroying the secret behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_cases import NAMES, model_of, options
from torch import Tensor

from keyhole.core.attack import DirectAttack
from keyhole.core.keys import new_key, uniform
from keyhole.core.registry import ATTACKS, Card
from keyhole.core.trial import Spec
from keyhole.core.types import Reconstruction, Seen
from keyhole.experiment import run as runner
from keyhole.experiment.plan import Group
from keyhole.experiment.run import GroupResult, run_group
from keyhole.experiment.setup import Setup

SHORT = {"steps": 4, "restarts": 2, "history": 8}
LOOT: list[Tensor] = []
"""Where a dishonest attack finds the secret."""
MASK = (("random_masking", {"rate": 0.4}),)
SEES = ("update", "weights")
TOLD = ("targets", *SEES)
BOTH = (("clip", {"norm": 0.1}), ("prune", {"rate": 0.3}))
ATTACKERS = [
    ("naive", (), SEES, "auto", 1),
    ("naive", (), TOLD, "given", 2),
    ("naive", MASK, SEES, "auto", 2),
    ("adaptive:survivors", MASK, SEES, "auto", 1),
    ("adaptive:norm_matched", (("clip", {"norm": 0.1}),), TOLD, "given", 1),
    ("adaptive:likelihood", (("gaussian_noise", {"std": 0.01}),), SEES, "auto", 2),
    ("adaptive:norm_matched+survivors", BOTH, SEES, "auto", 2),
    ("control:prior_only", (), SEES, "auto", 2),
    ("control:prior_only", MASK, TOLD, "given", 1),
]
each = pytest.mark.parametrize("name", NAMES)


def destroy(setup: Setup, secret: tuple[Any, ...]) -> None:
    """NaN for the batches; other images and other labels in the pool that scores."""
    for batch in secret:
        batch.inputs.fill_(float("nan"))
        batch.targets.fill_(float("nan"))
        batch.share.fill_(float("nan"))
    pool = setup.data.target
    pool.images.copy_(uniform(new_key(99), tuple(pool.images.shape), pool.images.dtype))
    pool.labels.copy_((pool.labels + 1) % setup.task.num_classes)


def result_of(group: Group, setup: Setup, monkeypatch: pytest.MonkeyPatch, *, poisoned: bool) -> GroupResult:
    original: Callable[..., Any] = runner._see
    calls = []

    def see(task: Any, threat: Any, defense: Any, weights: Any, secret: Any, *rest: Any) -> Any:
        LOOT[:] = [secret[0].inputs]
        seen = original(task, threat, defense, weights, secret, *rest)
        calls.append(1)
        if poisoned:
            destroy(setup, secret)
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_see", see)
        result = run_group(group, setup)
    assert calls == [1], "the runner must observe once, through _see"
    return result


def in_some_order(images: Tensor) -> Tensor:
    """Images sorted by content: which guess stands for which secret is the scorer's choice, and it may look."""
    rows = images.flatten(1)
    return rows[sorted(range(len(rows)), key=lambda i: rows[i].tolist())]


def agreements(group: Group, make_setup: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each trial, whether a run without secrets gave the same reconstruction bit for bit, and the same account."""
    clean = result_of(group, make_setup(), monkeypatch, poisoned=False)
    dirty = result_of(group, make_setup(), monkeypatch, poisoned=True)
    assert {o.status for r in (clean, dirty) for o in r.outcomes} <= {"converged", "budget", "stalled"}, [
        o.detail for r in (clean, dirty) for o in r.outcomes
    ]
    agree = []
    for trial in (*group.trials, *group.others):
        a, b = (r.reconstructions[trial.hash] for r in (clean, dirty))
        agree.append(torch.equal(in_some_order(a), in_some_order(b)))
    for a, b in zip(clean.outcomes, dirty.outcomes, strict=True):
        agree.append((a.status, a.evaluations, a.history, a.facts) == (b.status, b.evaluations, b.history, b.facts))
    different = [a.metrics["mse"] != b.metrics["mse"] for a, b in zip(clean.outcomes, dirty.outcomes, strict=True)]
    assert all(different), "the scorer must have seen the destroyed pool"
    return agree


def make_group(make_trial: Any, name: str, wanted: dict[str, Any] | None = None, **fields: Any) -> Group:
    """Two trials of an attack and, for a naive one, their other clients."""
    given = {"batch_size": 1, "sees": SEES, "attacker": "naive", **fields}
    count = given.pop("count", given["batch_size"])
    episodes = [tuple(range(i, i + count)) for i in (0, count)]
    chosen = options(name, {**SHORT, **(wanted or {})})
    trials = tuple(make_trial(name, chosen, e, **given) for e in episodes)
    others = tuple(make_trial(name, chosen, e, **{**given, "attacker": "control:other_client"}) for e in episodes)
    return Group(trials, others if given["attacker"] == "naive" else ())


@each
@pytest.mark.parametrize(("attacker", "defense", "sees", "labels", "size"), ATTACKERS)
def test_reconstructions_do_not_change_when_the_secret_is_destroyed(
    name: str,
    attacker: str,
    defense: Any,
    sees: tuple[str, ...],
    labels: str,
    size: int,
    make_setup: Any,
    make_trial: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"attacker": attacker, "defense": defense, "sees": sees, "batch_size": size}
    group = make_group(make_trial, name, {"labels": labels}, **fields)
    assert all(agreements(group, lambda: make_setup(model=model_of(name)), monkeypatch))


SGD = Spec.of("sgd", {"epochs": 2, "lr": 0.1, "batch_size": 1, "order": "shuffled"})
SERIES = {"count": 3, "fresh": True}
ROUNDS = {"rounds": 2, "attacker": "adaptive:survivors", "defense": MASK}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a series": ({}, {"count": 2, "attacker": "adaptive:survivors", "defense": MASK}),
    "a series on fresh networks": ({"networks": 3}, SERIES),
    "a series of noise": ({"networks": 3}, {**SERIES, "attacker": "control:prior_only"}),
    "rounds": ({}, ROUNDS),
    "local steps": ({}, {"rule": SGD, "batch_size": 2}),
    "local steps in an unknown order": ({}, {"rule": SGD, "batch_size": 2, "belief": Spec.of("order_unknown")}),
    "local steps on a straight line": ({}, {"rule": SGD, "batch_size": 2, "belief": Spec.of("straight_line")}),
    "single precision": ({"dtype": torch.float32}, {"batch_size": 2}),
}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batch statistics": (
        {"model": "conv_norm", "batchnorm": "train_shared"},
        {"sees": ("statistics", *SEES), "batch_size": 2},
    ),
    "local steps in train mode": (
        {"model": "conv_norm", "batchnorm": "train_hidden"},
        {"rule": SGD, "batch_size": 2},
    ),
    "dropout": ({"model": "conv_drop", "dropout": "active"}, {"batch_size": 2}),
    "dropout, told the masks": ({"model": "conv_drop", "dropout": "active"}, {"sees": ("masks", *SEES)}),
}
"""Options of `make_setup`, and fields of the trials."""


@each
@pytest.mark.parametrize("case", [*CASES, *MODES])
def test_nor_do_they_under_any_rule_belief_or_mode(
    name: str, case: str, make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, fields = {**CASES, **MODES}[case]
    if case in MODES and model_of(name) != "conv":
        return
    short = {"restarts": 1, "warmup": 1, "success": 10.0}
    group = make_group(make_trial, name, short, **fields)
    assert all(agreements(group, lambda: make_setup(**{"model": model_of(name), **made}), monkeypatch))


class Peeks(DirectAttack):
    """Reads the secret from where no honest attack can look."""

    needs = frozenset({"update"})

    def reconstruct(self, task: Any, threat: Any, seen: Seen, key: Tensor) -> Reconstruction:
        stolen = LOOT[0][0].clone().nan_to_num(0.5)
        return Reconstruction(stolen, None, torch.zeros((), dtype=stolen.dtype))


def test_an_attack_that_peeks_is_caught(make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._cards, "peeks", Card("attack", "peeks", Peeks))
    group = make_group(make_trial, "peeks")
    assert not all(agreements(group, make_setup, monkeypatch))


def test_a_leak_through_the_observation_itself_is_caught(
    make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attacker is given must be a copy: a view of the batch would change with it."""
    original = runner._see

    def view(task: Any, threat: Any, defense: Any, weights: Any, secret: Any, *rest: Any) -> Any:
        (seen,), notes = original(task, threat, defense, weights, secret, *rest)
        return (seen._replace(targets=secret[0].targets),), notes

    monkeypatch.setattr(runner, "_see", view)
    group = make_group(make_trial, "idlg", {"labels": "given"}, sees=("targets", *SEES))
    clean = result_of(group, make_setup(), monkeypatch, poisoned=False)
    dirty = result_of(group, make_setup(), monkeypatch, poisoned=True)
    assert [o.status for o in dirty.outcomes] != [o.status for o in clean.outcomes]
