"""Federated training: against PyTorch where it must agree, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keyhole.core.defense import Context, Defense
from keyhole.core.keys import fold_in, integers, new_key, normal
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Tensors, Weights
from keyhole.errors import ConfigError, ModelError
from keyhole.federation.states import EARLY, LATE, STATES, Federation, accuracy, rounds

SHAPE, CLASSES = (1, 8, 8), 3


def problem(count: int = 48, seed: int = 0) -> tuple[Task, Weights, Tensor, Tensor]:
    """Noisy copies of three patterns, which a small network with BatchNorm tells apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
        ).double()
    bounds = Bounds.of((0.5,), (0.5,), torch.float64)
    task = Task.of(model, SHAPE, CLASSES, bounds, batchnorm="train_shared")
    patterns = normal(new_key(1), (CLASSES, *SHAPE), torch.float64)
    labels = integers(fold_in(new_key(seed), "labels"), CLASSES, (count,))
    noise = normal(fold_in(new_key(seed), "noise"), (count, *SHAPE), torch.float64)
    return task, weights_of(model, torch.float64), patterns[labels] + 0.7 * noise, labels


def gap(a: Weights, b: Weights) -> float:
    names = zip((*a.params.values(), *a.buffers.values()), (*b.params.values(), *b.buffers.values()), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in names)


def trained(*given: Any, **options: Any) -> Weights:
    """After the last round."""
    *_, last = rounds(*given, **options)
    return last.weights


def test_one_client_with_full_batches_is_plain_training_with_the_momentum_dropped_each_round() -> None:
    task, weights, inputs, labels = problem()
    settings = Federation(rounds=3, clients=1, epochs=2, lr=0.1, batch_size=48, momentum=0.9, clip=None)
    got = trained(task, weights, inputs, labels, settings, new_key(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
        ).double()
    model.train()
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    assert gap(got, weights_of(model, torch.float64)) < 1e-8
    assert got.buffers["1.num_batches_tracked"].item() == 6
    assert accuracy(task, got, inputs, labels) == (model.eval()(inputs).argmax(-1) == labels).double().mean().item()


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_federated_training_learns_what_generalises(alpha: float | None) -> None:
    task, weights, inputs, labels = problem()
    _, _, unseen, truth = problem(200, seed=9)
    before = accuracy(task, weights, unseen, truth)
    settings = Federation(rounds=15, clients=4, batch_size=8, alpha=alpha)
    steps = list(rounds(task, weights, inputs, labels, settings, new_key(0)))
    assert [after.number for after in steps] == list(range(1, 16))
    assert accuracy(task, steps[-1].weights, unseen, truth) > max(0.9, before)
    assert steps[-1].loss < 0.3 < steps[0].loss


def test_training_goes_on_from_any_round_as_if_it_had_not_stopped() -> None:
    task, weights, inputs, labels = problem(30)
    settings = Federation(rounds=4, clients=3, batch_size=4)
    whole = list(rounds(task, weights, inputs, labels, settings, new_key(2)))
    rest = list(rounds(task, whole[1].weights, inputs, labels, settings, new_key(2), done=2))
    assert [after.number for after in rest] == [3, 4]
    for mine, theirs in zip(rest, whole[2:], strict=True):
        assert mine.loss == theirs.loss
        assert gap(mine.weights, theirs.weights) == 0


def test_clients_together_or_one_by_one_give_the_same_state() -> None:
    task, weights, inputs, labels = problem(30)
    settings = Federation(rounds=3, clients=5, batch_size=4, alpha=0.5)
    one, many = (trained(task, weights, inputs, labels, settings, new_key(2), together=k) for k in (1, 5))
    assert gap(one, many) < 1e-10
    assert gap(one, trained(task, weights, inputs, labels, settings, new_key(3))) > 1e-3


def test_weights_to_begin_with_are_left_as_they_are() -> None:
    task, weights, inputs, labels = problem(20)
    before = copy.deepcopy(weights)
    trained(task, weights, inputs, labels, Federation(rounds=2, clients=2), new_key(0))
    assert gap(before, weights) == 0


def test_a_defense_keeps_what_it_knows_of_a_client_between_rounds() -> None:
    class Counting(Defense):
        def on_update(self, update: Tensors, ctx: Context) -> Tensors:
            before = ctx.state.get("rounds", {"count": torch.zeros(())})
            ctx.state["rounds"] = {"count": before["count"] + 1}
            # The first round leaves nothing, the second everything.
            return {name: value * before["count"] for name, value in update.items()}

    task, weights, inputs, labels = problem(20)

    def run(count: int, defense: Defense | None) -> Weights:
        settings = Federation(rounds=count, clients=2)
        return trained(task, weights, inputs, labels, settings, new_key(0), defense=defense)

    assert gap(Weights(run(1, Counting()).params, {}), Weights(weights.params, {})) == 0
    assert gap(Weights(run(2, Counting()).params, {}), Weights(weights.params, {})) > 1e-3
    assert gap(run(2, None), run(2, Defense())) < 1e-10


def test_training_that_diverges_says_so() -> None:
    task, weights, inputs, labels = problem(20)
    with pytest.raises(ModelError, match="diverged in round [12] with lr = 1e\\+300; lower it"):
        trained(task, weights, inputs, labels, Federation(rounds=2, clients=2, lr=1e300, clip=None), new_key(0))


def test_accuracy_is_the_share_of_right_guesses_over_all_slices() -> None:
    # A network that copies its input to its logits, so that the guesses are known.
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False)).double()
    task = Task.of(model, (1, 2, 2), 4, Bounds.of((0.0,), (1.0,)))
    weights = Weights({"1.weight": torch.eye(4, dtype=torch.float64)}, {})
    guesses = integers(new_key(0), 4, (700,))
    inputs = torch.eye(4, dtype=torch.float64)[guesses].reshape(-1, 1, 2, 2)
    labels = torch.where(torch.arange(700) < 161, (guesses + 1) % 4, guesses)
    assert accuracy(task, weights, inputs, labels) == (700 - 161) / 700


def test_the_named_states() -> None:
    assert STATES == {"early": EARLY, "late": LATE}
    assert (EARLY.rounds, EARLY.epochs, LATE.rounds, LATE.epochs) == (2, 1, 30, 1)
    assert Federation(rounds=2) == EARLY
    assert Federation(rounds=30) == LATE


@pytest.mark.parametrize(
    "bad", [{"rounds": 0}, {"clients": 0}, {"alpha": 0.0}, {"lr": -1.0}, {"batch_size": 0}, {"epochs": 0}], ids=str
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Federation(**{"rounds": 1, **bad})
