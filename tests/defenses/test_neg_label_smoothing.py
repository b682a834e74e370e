"""Negative label smoothing: its formula, its schedule, and when it acts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from keyhole.core.defense import Context, chain, defended_gradient
from keyhole.core.keys import new_key
from keyhole.core.task import plain_gradient
from keyhole.core.types import Batch, Trace
from keyhole.defenses.neg_label_smoothing import NegLabelSmoothing
from keyhole.errors import ConfigError
from keyhole.federation.local import LocalTraining, train_round

KEY = new_key(3)


def loss_of(bench: Any, defense: NegLabelSmoothing, logits: torch.Tensor, batch: Batch, **ctx: Any) -> float:
    plain = (batch.share * bench.task.loss(logits, batch.targets)).sum()
    trace = Trace(logits, logits, {}, {})
    return float(defense.on_loss(plain, trace, batch, Context(bench.task, bench.weights, KEY, **ctx)))


def test_it_is_label_smoothing_with_a_negative_share(bench: Any) -> None:
    batch = bench.batch(3)
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for a in (-0.05, -0.7):
        expected = torch.nn.functional.cross_entropy(logits, batch.targets.argmax(1), label_smoothing=-a)
        plain = torch.nn.functional.cross_entropy(logits, batch.targets.argmax(1))
        # PyTorch knows positive shares only; the loss is linear in the share.
        assert loss_of(bench, NegLabelSmoothing(a), logits, batch) == pytest.approx(float(2 * plain - expected))


def test_shares_weigh_examples(bench: Any) -> None:
    batch = bench.batch(3)._replace(share=torch.tensor([0.25, 0.75, 0.0]).double())
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = torch.ones(1).double()
    alone = [Batch(x, t, one) for x, t in zip(batch.inputs.split(1), batch.targets.split(1), strict=True)]
    each = [loss_of(bench, NegLabelSmoothing(), logits[i : i + 1], own) for i, own in enumerate(alone)]
    expected = 0.25 * each[0] + 0.75 * each[1]
    assert loss_of(bench, NegLabelSmoothing(), logits, batch) == pytest.approx(expected)


def test_a_uniform_prediction_costs_the_logarithm_of_the_number_of_classes(bench: Any) -> None:
    for a in (-0.05, -1.0, 0.0):
        assert loss_of(bench, NegLabelSmoothing(a), torch.zeros(3, 4).double(), bench.batch(3)) == pytest.approx(
            math.log(4), rel=1e-12
        )


def test_without_smoothing_the_gradient_keeps_its_bits(bench: Any) -> None:
    batch = bench.batch(3)
    ctx = Context(bench.task, bench.weights, KEY)
    got = defended_gradient(bench.task, NegLabelSmoothing(0.0), ctx)(bench.weights, batch, KEY)
    plain = defended_gradient(bench.task, chain(), ctx)(bench.weights, batch, KEY)
    bare = plain_gradient(bench.task)(bench.weights, batch, KEY)
    assert all(torch.equal(got[n], plain[n]) and torch.equal(got[n], bare[n]) for n in bare)


def test_the_schedule(bench: Any) -> None:
    """As in public code for MNIST: of ten epochs five without, and from the seventh on in full."""
    defense = NegLabelSmoothing(-0.05, 5, 7)
    assert [defense.at(number) for number in range(1, 11)] == pytest.approx([0.0] * 5 + [-0.025] + [-0.05] * 4)
    assert [NegLabelSmoothing(-0.3).at(number) for number in (1, 2)] == [-0.3, -0.3]
    assert [NegLabelSmoothing(-0.3, 2, 2).at(number) for number in (1, 2, 3)] == [0, 0, -0.3]
    logits, batch = torch.eye(4).double()[:3], bench.batch(3)
    values = [loss_of(bench, defense, logits, batch, round=n, training=True) for n in range(8)]
    whole = loss_of(bench, NegLabelSmoothing(), logits, batch)
    none = loss_of(bench, NegLabelSmoothing(0.0), logits, batch)
    assert values == pytest.approx([none] * 5 + [(none + whole) / 2] + [whole] * 2)
    assert loss_of(bench, defense, logits, batch) == whole, "an audit attacks it in full"


def test_a_federation_counts_its_rounds(bench: Any) -> None:
    batch, defense = bench.batch(4), NegLabelSmoothing(-0.5, 2, 3)
    local, parts = LocalTraining(batch_size=4), (torch.arange(4),)
    given = (bench.task, bench.weights, batch.inputs, batch.targets, parts, local, KEY)

    def moved(number: int, defense: NegLabelSmoothing) -> torch.Tensor:
        return train_round(*given, number=number, defense=defense).weights.params["0.weight"]

    off, on = moved(0, replace(defense, smoothing=0.0)), moved(0, NegLabelSmoothing(-0.5))
    assert torch.equal(moved(0, defense), off)
    assert torch.equal(moved(1, defense), off)
    assert torch.equal(moved(2, defense), on)
    assert not torch.allclose(on, off)


def test_wrong_options_are_refused() -> None:
    for options in ({"smoothing": 0.05}, {"smoothing": -1.5}, {"start": -1}, {"start": 5, "full": 4}):
        with pytest.raises(ConfigError):
            NegLabelSmoothing(**options)  # type: ignore[arg-type]
