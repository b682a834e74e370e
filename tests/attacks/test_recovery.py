"""What is read off an update of several steps, against torch's own optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keyhole.attacks.recovery import read_labels
from keyhole.core.belief import Simulated, StraightLine
from keyhole.core.keys import new_key
from keyhole.core.registry import LABELS
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Observation, Seen, Weights
from keyhole.parts.labels import multiset_overlap

LR, COUNT = 0.3, 40


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.head(torch.sigmoid(self.body(images.flatten(1))))
        return hidden


def trained(steps: int, seed: int) -> tuple[Task, Observation, Tensor]:
    """Digits of few classes, and what so many steps on all of them leave of a network that prefers a class."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    model = Small().double()
    with torch.no_grad():
        model.head.bias.copy_(2 * torch.randn(10))
    digits, chosen = load_digits(), torch.randperm(10)[:4]
    labels = torch.tensor(digits.target)
    rows = torch.isin(labels, chosen).nonzero().flatten()[:COUNT]
    images = torch.tensor(digits.images[rows.numpy()]).reshape(-1, 1, 8, 8) / 16
    task = Task.of(model, (1, 8, 8), 10, Bounds.of((0.0,), (1.0,)))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels[rows]).backward()
        optimizer.step()
    update = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    true = nn.functional.one_hot(labels[rows], 10).double()
    return task, Observation(weights=Weights(before, {}), update=update), true


@pytest.mark.parametrize("belief", [Simulated, StraightLine])
def test_labels_of_several_steps_are_read_in_the_middle_of_the_way(belief: type[Simulated]) -> None:
    found, first = [], []
    for seed in range(4):
        task, seen, true = trained(30, seed)
        rule = LocalSGD(30, LR, COUNT)
        threat = ThreatModel(rule, belief(rule), COUNT)
        found.append(float(multiset_overlap(read_labels("auto", task, threat, Seen((seen,), {}), new_key(0)), true)))
        # Read as one gradient at the first weights, which the classes that these preferred spoil.
        scaled = {name: value / (30 * LR) for name, value in (seen.update or {}).items()}
        one = [LABELS.card(r).factory(task, COUNT, seen._replace(update=scaled), new_key(0)) for r in ("ilrg", "geng")]
        first.append(max(float(multiset_overlap(labels, true)) for labels in one))
    assert sum(found) / 4 > 0.7 and sum(found) / 4 > sum(first) / 4 + 0.1, (found, first)


def test_one_step_is_read_where_it_was_taken_and_what_is_hidden_is_left_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Observation] = []

    def rule(task: Task, size: int, observation: Observation, key: Tensor) -> Tensor:
        given.append(observation)
        return torch.zeros(size, 10)

    def read(steps: int, seen: Observation) -> Observation:
        rule_of = LocalSGD(steps, LR, COUNT)
        read_labels("geng", task, ThreatModel(rule_of, Simulated(rule_of), COUNT), Seen((seen,), {}), new_key(0))
        return given[-1]

    class Card:
        factory: Any = staticmethod(rule)

    task, seen, _ = trained(2, 0)
    monkeypatch.setattr(LABELS, "card", lambda name, where="": Card)
    one, two = read(1, seen), read(2, seen)
    update, weights = seen.update or {}, seen.weights
    assert weights is not None and one.weights is not None and two.weights is not None
    for name, value in weights.params.items():
        assert torch.equal(one.weights.params[name], value)
        torch.testing.assert_close(two.weights.params[name], value - update[name] / 2, rtol=0, atol=1e-15)
        assert one.update is not None and two.update is not None
        torch.testing.assert_close(one.update[name], update[name] / LR)
        torch.testing.assert_close(two.update[name], update[name] / (2 * LR))
    hidden = read(2, Observation(weights=weights, update=None))
    assert hidden.update is None and hidden.weights is weights
