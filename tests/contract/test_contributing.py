"""The examples of CONTRIBUTING.md are methods that work."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from keyhole.core.defense import Context, Counter, chain, defended_gradient
from keyhole.core.keys import new_key
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Tensors
from keyhole.federation.local import LocalTraining, train_round

KEY = new_key(5)
PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
CODE = re.findall(r"`(\w+)\.py`[^`]*```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def examples() -> Any:
    """The page's examples as modules, registered while they are tested."""
    kept = [dict(registry._cards) for registry in (ATTACKS, DEFENSES)]
    for name, code in CODE:
        module = sys.modules[name] = ModuleType(name)
        exec(compile(code, name, "exec"), module.__dict__)
    yield
    for registry, cards in zip((ATTACKS, DEFENSES), kept, strict=True):
        registry._cards = cards
    for name, _ in CODE:
        del sys.modules[name]


def explained(bench: Any, name: str, counter: Counter, **options: Any) -> float:
    """How far the counter's simulation of the true batch is from the update, relative to it."""
    defense, batch = DEFENSES.build(name, **options), bench.batch(2)
    threat = ThreatModel(batch_size=2, counter=counter)
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), KEY)
    simulated = threat.simulate(bench.task, seen, batch, {}, {}, KEY)
    mine, theirs = counter.compare(simulated, seen.update, {})
    return max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)


def test_all_examples_are_found() -> None:
    assert [name for name, _ in CODE] == ["random_scale", "logit_decay", "plain_adam"]
    assert ATTACKS.build("plain_adam", steps=3).steps == 3


@pytest.mark.parametrize("name", ["random_scale", "logit_decay"])
def test_who_knows_the_defense_explains_its_update(name: str, bench: Any) -> None:
    (counter,) = DEFENSES.build(name).counters()
    assert explained(bench, name, counter) < 1e-8
    assert explained(bench, name, Counter()) > 1e-3


def test_the_loss_term_adds_its_gradient(bench: Any) -> None:
    batch, ctx = bench.batch(3), Context(bench.task, bench.weights, KEY)
    params = {n: p.clone().requires_grad_(True) for n, p in bench.weights.params.items()}
    logits = bench.task.logits(bench.weights._replace(params=params), batch.inputs)
    term: Tensor = 0.3 * logits.square().mean(1).mean(0)
    added = dict(zip(params, torch.autograd.grad(term, list(params.values())), strict=True))

    def gradient(*defenses: Any) -> Tensors:
        return defended_gradient(bench.task, chain(*defenses), ctx)(bench.weights, batch, KEY)

    got, plain = gradient(DEFENSES.build("logit_decay", weight=0.3)), gradient()
    assert all(torch.allclose(got[n], plain[n] + added[n], rtol=1e-9, atol=1e-12) for n in got)


def test_clients_train_under_the_loss_term(bench: Any) -> None:
    batch, local = bench.batch(8), LocalTraining(batch_size=4, epochs=40)
    given = (bench.task, bench.weights, batch.inputs, batch.targets, (torch.arange(8),), local, KEY)

    def size(**options: Any) -> float:
        trained = train_round(*given, defense=DEFENSES.build("logit_decay", **options)).weights.params
        weights = bench.weights._replace(params={n: p[0] for n, p in trained.items()})
        return float(bench.task.logits(weights, batch.inputs).square().mean())

    assert size(weight=1.0) < 0.3 * size(weight=0.0)
