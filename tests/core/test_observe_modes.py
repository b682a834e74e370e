"""`observe` under BatchNorm and dropout: statistics and masks only when seen, in the order of the labels."""

from __future__ import annotations

import copy
import itertools
from typing import Any, get_args

import pytest
import torch
from torch.func import vmap

from keyhole.core.belief import exact
from keyhole.core.defense import chain
from keyhole.core.keys import new_key, split
from keyhole.core.rule import LocalSGD
from keyhole.core.task import plain_gradient
from keyhole.core.tensors import map_tensors
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Field, Observation, Tensors

KEY = new_key(41)
EVERYTHING = frozenset(get_args(Field))


def watched(own: Any, batch: Batch, sees: frozenset = EVERYTHING, key: torch.Tensor = KEY) -> Observation:
    threat = ThreatModel(batch_size=len(batch.inputs), sees=sees)
    (seen,) = observe(own.task, threat, chain(), own.weights, (batch,), key)
    return seen


def off(a: Tensors, b: Tensors) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in b)


@pytest.mark.parametrize("sees", [c for r in range(6) for c in itertools.combinations(sorted(EVERYTHING), r)])
def test_exactly_the_fields_that_are_seen_are_filled(sees: tuple[Field, ...], make_bench: Any) -> None:
    own = make_bench("conv_all", "train_shared", "active")
    seen = watched(own, own.batch(2), frozenset(sees))
    assert {name for name in get_args(Field) if getattr(seen, name) is not None} == set(sees)


def test_statistics_are_those_of_torch_in_the_defended_pass(make_bench: Any) -> None:
    """A module in train mode whose momentum is 1, on the same batch."""
    own, batch = make_bench("conv_norm", "train_shared"), make_bench("conv_norm", "train_shared").batch(3)
    seen = watched(own, batch)
    p = own.weights.params
    maps = torch.conv2d(batch.inputs, p["0.weight"], p["0.bias"], stride=2, padding=1)
    layer = torch.nn.BatchNorm2d(8, momentum=1.0).double().train()
    layer(maps)
    count = maps.numel() / 8
    assert set(seen.statistics) == {"1.mean", "1.var"}
    assert torch.allclose(seen.statistics["1.mean"], layer.running_mean, rtol=1e-12)
    assert torch.allclose(seen.statistics["1.var"], layer.running_var * (count - 1) / count, rtol=1e-12)


MIXED = [3, 1, 0, 2]


def test_masks_stand_beside_their_labels(make_bench: Any) -> None:
    """A client's batch comes in any order: sorted by class, images and given masks belong together again."""
    own = make_bench("conv_drop", dropout="active")
    batch = own.batch(4)
    mixed = Batch(*(part[MIXED] for part in batch))
    seen = watched(own, mixed)
    threat = ThreatModel(batch_size=4, sees=EVERYTHING)
    assert torch.equal(seen.targets, batch.targets)
    simulated = threat.simulate(own.task, seen, batch, {}, {}, new_key(99))
    assert off(simulated, seen.update) < 1e-14
    turned = seen._replace(masks={n: m[MIXED] for n, m in seen.masks.items()})
    assert off(threat.simulate(own.task, turned, batch, {}, {}, KEY), seen.update) > 1e-4


def test_seen_masks_leave_no_loss_at_the_truth_and_others_do(make_bench: Any) -> None:
    own = make_bench("conv_drop", dropout="active")
    batch = own.batch(3)
    seen, other = watched(own, batch), watched(own, batch, key=new_key(42))
    threat = ThreatModel(batch_size=3, sees=EVERYTHING)
    assert off(threat.simulate(own.task, seen, batch, {}, {}, KEY), seen.update) < 1e-14
    assert off(threat.simulate(own.task, seen._replace(masks=other.masks), batch, {}, {}, KEY), seen.update) > 1e-4
    assert not all(torch.equal(seen.masks[n], other.masks[n]) for n in seen.masks)


def test_hidden_masks_start_as_if_dropout_were_off(make_bench: Any) -> None:
    own, without = make_bench("conv_drop", dropout="active"), make_bench("conv_drop", dropout="off")
    batch = own.batch(3)
    threat = ThreatModel(batch_size=3)
    seen = watched(own, batch, threat.sees)
    unknowns = threat.unknowns(own.task, batch.inputs, KEY)
    assert {n: tuple(v.shape) for n, v in unknowns.items()} == {"mask.2.mask": (3, 8, 1, 1), "mask.4.mask": (3, 128)}
    simulated = threat.simulate(own.task, seen, batch, {}, unknowns, KEY)
    assert off(simulated, plain_gradient(without.task)(own.weights, batch, KEY)) < 1e-14


def test_the_right_masks_can_be_found(make_bench: Any) -> None:
    """Logits far enough to either side are the client's masks, so that the truth is among the candidates."""
    own = make_bench("conv_drop", dropout="active")
    batch = own.batch(3)
    seen = watched(own, batch)
    logits = {f"mask.{n}": torch.where(m > 0, 40.0, -40.0).double() for n, m in seen.masks.items()}
    hidden = ThreatModel(batch_size=3)
    simulated = hidden.simulate(own.task, seen._replace(masks=None), batch, {}, logits, KEY)
    # The client draws its masks in single precision.
    assert off(simulated, seen.update) < 1e-7


def test_who_sees_the_masks_has_nothing_to_find(make_bench: Any) -> None:
    own = make_bench("conv_drop", dropout="active")
    like = own.batch(2).inputs
    assert ThreatModel(batch_size=2, sees=EVERYTHING).unknowns(own.task, like, KEY) == {}
    assert ThreatModel(batch_size=2).unknowns(make_bench("conv").task, like, KEY) == {}
    epochs = ThreatModel(batch_size=2, belief=exact(LocalSGD()))
    assert epochs.unknowns(make_bench("conv_drop", dropout="off").task, like, KEY) == {}


@pytest.mark.parametrize("mode", ["eval", "train_shared", "train_hidden"])
@pytest.mark.parametrize("rule", [LocalSGD(1, 0.3, 2), LocalSGD(3, 0.3, 1), LocalSGD(2, 0.3, 3)], ids=str)
def test_local_steps_in_every_mode_have_no_loss_at_the_truth(mode: str, rule: LocalSGD, make_bench: Any) -> None:
    own = make_bench("conv_norm", mode)
    batch = own.batch(4)
    threat = ThreatModel(rule, exact(rule), 4)
    (seen,) = observe(own.task, threat, chain(), own.weights, (batch,), KEY)
    assert off(threat.simulate(own.task, seen, batch, {}, {}, new_key(99)), seen.update) < 1e-14
    moved = batch._replace(inputs=batch.inputs + 0.1 * torch.sin(torch.arange(256.0).double()).reshape(4, 1, 8, 8))
    assert off(threat.simulate(own.task, seen, moved, {}, {}, KEY), seen.update) > 1e-5


def test_every_round_has_its_own_network(bench: Any) -> None:
    batches = tuple(bench.batch(2, seed) for seed in range(3))
    networks = [
        bench.weights._replace(params=map_tensors(lambda w, k=k: w * k, bench.weights.params)) for k in (1, 2, 3)
    ]
    threat = ThreatModel(batch_size=2)
    seen = observe(bench.task, threat, chain(), networks, batches, KEY)
    for one, own, batch in zip(seen, networks, batches, strict=True):
        assert one.weights is own
        assert off(one.update, plain_gradient(bench.task)(own, batch, KEY)) < 1e-14
    same = observe(bench.task, threat, chain(), bench.weights, batches, KEY)
    assert all(one.weights is bench.weights for one in same)


def test_every_round_has_its_own_masks(make_bench: Any) -> None:
    own = make_bench("conv_drop", dropout="active")
    batch, threat = own.batch(2), ThreatModel(batch_size=2, sees=EVERYTHING)
    first, second = observe(own.task, threat, chain(), own.weights, (batch, batch), KEY)
    assert not torch.equal(first.masks["4.mask"], second.masks["4.mask"])
    for seen in (first, second):
        assert off(threat.simulate(own.task, seen, batch, {}, {}, KEY), seen.update) < 1e-14


def test_all_of_it_lifts(make_bench: Any) -> None:
    own = make_bench("conv_all", "train_shared", "active")
    keys, trials = split(KEY, 3), own.secrets(3, 3)[0]

    def see(batch: Batch, key: torch.Tensor) -> tuple[Tensors, Tensors, Tensors]:
        seen = watched(own, batch, key=key)
        return seen.update, seen.statistics, seen.masks

    lifted = vmap(see)(trials, keys)
    for i in range(3):
        for got, wanted in zip(lifted, see(own.batch(3, i), keys[i]), strict=True):
            assert all(torch.allclose(got[n][i], v, rtol=1e-10, atol=1e-14) for n, v in wanted.items())


def test_observing_leaves_the_model_alone(make_bench: Any) -> None:
    own = make_bench("conv_all", "train_shared", "active")
    before = copy.deepcopy(own.task.model.state_dict())
    weights = {n: t.clone() for part in own.weights for n, t in part.items()}
    watched(own, own.batch(3))
    assert all(torch.equal(t, own.task.model.state_dict()[n]) for n, t in before.items())
    assert all(torch.equal(weights[n], t) for part in own.weights for n, t in part.items())
