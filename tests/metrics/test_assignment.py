"""Which reconstruction stands for which secret: against brute force over all assignments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import keyhole.metrics  # noqa: F401  (fills the registry)
from keyhole.core.keys import fold_in, new_key, normal, permutation, uniform
from keyhole.core.registry import METRICS, Card
from keyhole.metrics.matching import assign

KEY = new_key(31)


def problem(guesses: int, truths: int, seed: int) -> tuple[Tensor, Tensor]:
    key = fold_in(KEY, seed)
    truth = uniform(fold_in(key, "t"), (truths, 1, 4, 4), torch.float64)
    return uniform(fold_in(key, "g"), (guesses, 1, 4, 4), torch.float64), truth


def cost(guesses: Tensor, truths: Tensor, order: tuple[int, ...]) -> float:
    return sum(float((guesses[g] - truths[t]).square().sum()) for t, g in enumerate(order))


@pytest.mark.parametrize(("guesses", "truths"), [(1, 1), (3, 3), (5, 5), (6, 3), (5, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_assignment_is_cheaper(guesses: int, truths: int, seed: int) -> None:
    found, truth = problem(guesses, truths, seed)
    chosen = tuple(assign(found, truth).tolist())
    assert len(set(chosen)) == truths
    least = min(cost(found, truth, order) for order in itertools.permutations(range(guesses), truths))
    assert cost(found, truth, chosen) == pytest.approx(least, rel=1e-12)


def test_a_shuffled_copy_is_put_back_in_order() -> None:
    truth = problem(1, 8, 0)[1]
    order = permutation(KEY, 8)
    assert torch.equal(truth[order][assign(truth[order], truth)], truth)


@pytest.mark.parametrize("card", list(METRICS), ids=lambda card: card.name)
def test_the_order_of_the_guesses_changes_no_metric(card: Card) -> None:
    metric = card.factory()
    truth = uniform(fold_in(KEY, "m"), (5, 1, 9, 9), torch.float64)
    guess = (truth + 0.3 * normal(fold_in(KEY, "n"), truth.shape, torch.float64)).clamp(0, 1)
    expected = metric(guess[assign(guess, truth)], truth)
    for i in range(3):
        mixed = guess[permutation(fold_in(KEY, i), 5)]
        assert torch.equal(metric(mixed[assign(mixed, truth)], truth), expected)


def test_extra_guesses_can_only_help_and_are_used_once() -> None:
    guess, truth = problem(3, 3, 1)
    more = torch.cat([guess, truth[1:2] + 0.01])
    chosen = assign(more, truth).tolist()
    assert chosen[1] == 3
    assert len(set(chosen)) == 3


def test_fewer_guesses_than_secrets_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 guesses cannot stand for 3 secrets"):
        assign(*problem(2, 3, 0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_guesses_without_numbers_are_taken_last(bad: float) -> None:
    guess, truth = problem(4, 3, 2)
    sick = guess.clone()
    sick[1, 0, 2, 2] = bad
    assert 1 not in assign(sick, truth).tolist()
    every = torch.full_like(truth, bad)
    assert sorted(assign(every, truth).tolist()) == [0, 1, 2]
    alone = torch.cat([every[:1], truth[:1], every[:1]])
    assert assign(alone, truth).tolist()[0] == 1
