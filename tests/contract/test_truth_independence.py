"""No reconstruction depends on the secret except through `observe`: proven by destroying the secret behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import keyhole.experiment.spec  # noqa: F401  (fills all registries)
from keyhole.core.attack import DirectAttack
from keyhole.core.keys import new_key, uniform
from keyhole.core.registry import ATTACKS, Card
from keyhole.core.types import Observation, Reconstruction, Seen
from keyhole.experiment import run as runner
from keyhole.experiment.plan import Group
from keyhole.experiment.run import GroupResult, run_group
from keyhole.experiment.setup import Setup

SHORT = {"steps": 15, "restarts": 2, "history": 8}
LOOT: list[Tensor] = []
"""Where a dishonest attack finds the secret."""
MASK = (("random_masking", {"rate": 0.4}),)
ATTACKERS = [
    ("naive", (), ("update", "weights"), "auto"),
    ("naive", (), ("targets", "update", "weights"), "given"),
    ("naive", MASK, ("update", "weights"), "auto"),
    ("adaptive:survivors", MASK, ("update", "weights"), "auto"),
    ("adaptive:norm_matched", (("clip", {"norm": 0.1}),), ("targets", "update", "weights"), "given"),
    ("adaptive:likelihood", (("gaussian_noise", {"std": 0.01}),), ("update", "weights"), "auto"),
    (
        "adaptive:norm_matched+survivors",
        (("clip", {"norm": 0.1}), ("prune", {"rate": 0.3})),
        ("update", "weights"),
        "auto",
    ),
    ("control:prior_only", (), ("update", "weights"), "auto"),
    ("control:prior_only", MASK, ("targets", "update", "weights"), "given"),
]


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
    original: Callable[..., tuple[Observation, ...]] = runner._see
    calls = []

    def see(task: Any, threat: Any, defense: Any, weights: Any, secret: Any, *rest: Any) -> tuple[Observation, ...]:
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


def make_group(
    make_trial: Any,
    name: str,
    attacker: str,
    defense: Any,
    sees: tuple[str, ...],
    labels: str,
    size: int,
    rounds: int = 1,
) -> Group:
    known = ATTACKS.card(name).signature().parameters
    options = {k: v for k, v in {**SHORT, "labels": labels}.items() if k in known}
    count = size * rounds
    episodes = [tuple(range(i, i + count)) for i in range(0, 3 * count - count + 1, count)][:2]
    given = {"batch_size": size, "sees": sees, "defense": defense}
    trials = tuple(make_trial(name, options, e, attacker=attacker, **given) for e in episodes)
    others = tuple(make_trial(name, options, e, attacker="control:other_client", **given) for e in episodes)
    return Group(trials, others if attacker == "naive" else ())


@pytest.mark.parametrize("name", [card.name for card in ATTACKS])
@pytest.mark.parametrize(("attacker", "defense", "sees", "labels"), ATTACKERS)
@pytest.mark.parametrize("size", [1, 2])
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
    group = make_group(make_trial, name, attacker, defense, sees, labels, size)
    assert all(agreements(group, make_setup, monkeypatch))


@pytest.mark.parametrize("name", [card.name for card in ATTACKS])
def test_nor_in_episodes_of_two_rounds(
    name: str, make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(make_trial, name, "adaptive:survivors", MASK, ("update", "weights"), "auto", 1, 2)
    assert len(group.trials[0].episode) == 2
    assert all(agreements(group, make_setup, monkeypatch))


@pytest.mark.parametrize("name", [card.name for card in ATTACKS])
def test_nor_do_results_in_float32(
    name: str, make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(make_trial, name, "naive", (), ("update", "weights"), "auto", 1)
    assert all(agreements(group, lambda: make_setup(torch.float32), monkeypatch))


class Peeks(DirectAttack):
    """Reads the secret from where no honest attack can look."""

    needs = frozenset({"update"})

    def reconstruct(self, task: Any, threat: Any, seen: Seen, key: Tensor) -> Reconstruction:
        stolen = LOOT[0][0].clone().nan_to_num(0.5)
        return Reconstruction(stolen, None, torch.zeros((), dtype=stolen.dtype))


def test_an_attack_that_peeks_is_caught(make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._cards, "peeks", Card("attack", "peeks", Peeks))
    group = make_group(make_trial, "peeks", "naive", (), ("update", "weights"), "auto", 1)
    assert not all(agreements(group, make_setup, monkeypatch))


def test_a_leak_through_the_observation_itself_is_caught(
    make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attacker is given must be a copy: a view of the batch would change with it."""
    original = runner._see

    def view(task: Any, threat: Any, defense: Any, weights: Any, secret: Any, *rest: Any) -> tuple[Observation, ...]:
        (seen,) = original(task, threat, defense, weights, secret, *rest)
        return (seen._replace(targets=secret[0].targets),)

    monkeypatch.setattr(runner, "_see", view)
    group = make_group(make_trial, "idlg", "naive", (), ("targets", "update", "weights"), "given", 1)
    clean = result_of(group, make_setup(), monkeypatch, poisoned=False)
    dirty = result_of(group, make_setup(), monkeypatch, poisoned=True)
    assert [o.status for o in dirty.outcomes] != [o.status for o in clean.outcomes]
