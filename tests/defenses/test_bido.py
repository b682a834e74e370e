"""BiDO, and the dependence of logits on images alone: which layers, which terms, when, and what attackers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from keyhole.core.defense import Context, Counter, Defense, chain, defended_gradient
from keyhole.core.keys import new_key, permutation
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Bounds, Task, plain_gradient, weights_of
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Batch, Tensors
from keyhole.defenses.bido import BiDO, block_ends
from keyhole.defenses.mid_unilateral import MIDUnilateral
from keyhole.errors import ConfigError, UnknownName
from keyhole.zoo.models import build_model

KEY = new_key(13)


def kernel(x: Tensor, sigma: float = 5.0) -> np.ndarray:
    rows = x.flatten(1).numpy()
    apart = np.square(rows[:, None] - rows[None]).sum(-1)
    return _centred(np.exp(-apart / (2 * sigma**2 * rows.shape[1])))


def _centred(k: np.ndarray) -> np.ndarray:
    h = np.eye(len(k)) - 1 / len(k)
    return h @ k @ h  # type: ignore[no-any-return]


def nhsic(k: np.ndarray, other: np.ndarray) -> float:
    ridge = 1e-5 * len(k) * np.eye(len(k))
    return float(np.trace(k @ np.linalg.inv(k + ridge) @ other @ np.linalg.inv(other + ridge)))


def coco(k: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.linalg.norm(k @ other)) / len(k))


def added(bench: Any, defense: Defense, batch: Batch, notes: dict[str, list[Tensor]] | None = None) -> float:
    """What the defense adds to the loss."""
    trace, zero = bench.task.trace(bench.weights, batch.inputs), torch.zeros(()).double()
    ctx = Context(bench.task, bench.weights, KEY, notes={} if notes is None else notes)
    return float(defense.on_loss(zero, trace, batch, ctx))


@pytest.mark.parametrize(("measure", "by_hand"), [("hsic", nhsic), ("coco", coco)])
def test_the_terms_by_hand(measure: Any, by_hand: Callable[..., float], make_bench: Any) -> None:
    bench = make_bench("mlp")
    batch = bench.batch(6)
    pixels = bench.task.bounds.to_pixels(batch.inputs)
    w, x = bench.weights.params, batch.inputs.flatten(1)
    hidden = torch.sigmoid(x @ w["1.weight"].T + w["1.bias"])
    on_images = by_hand(kernel(hidden), kernel(pixels))
    on_labels = by_hand(kernel(hidden), _centred((batch.targets @ batch.targets.T).numpy()))
    assert min(on_images, on_labels) > 1e-3
    got = added(bench, BiDO(inputs=0.3, labels=0.7, measure=measure), batch)
    assert got == pytest.approx(0.3 * on_images - 0.7 * on_labels, rel=1e-6)
    logits = bench.task.logits(bench.weights, batch.inputs)
    alone = added(bench, MIDUnilateral(0.4, measure), batch)
    assert alone == pytest.approx(0.4 * by_hand(kernel(logits), kernel(pixels)), rel=1e-6)


def test_layers_are_summed_and_may_be_chosen(make_bench: Any) -> None:
    bench = make_bench("conv")
    batch = bench.batch(5)
    one, two = (added(bench, BiDO(layers=name), batch) for name in ("0", "1"))
    assert added(bench, BiDO(layers="0, 1"), batch) == pytest.approx(one + two)
    # A flattened layer is the layer itself.
    assert added(bench, BiDO(), batch) == pytest.approx(two)
    with pytest.raises(UnknownName, match="Accepted: 0, 1, 2, 3"):
        added(bench, BiDO(layers="7"), batch)


@pytest.mark.parametrize(("name", "ends"), [
    ("lenet_zhu", ("sigmoid1", "sigmoid2", "flatten")), ("cnn6", None), ("convnet", None),
])  # fmt: skip
def test_blocks_end_before_the_next_convolution(name: str, ends: tuple[str, ...] | None) -> None:
    model = build_model(name, input_shape=(1, 32, 32), num_classes=5, options={}, seed=0)
    task = Task.of(model, (1, 32, 32), 5, Bounds.of((0.0,), (1.0,)), batchnorm="eval", dropout="off")
    trace = task.trace(weights_of(model), torch.rand(2, 1, 32, 32))
    found = block_ends(task, tuple(trace.activations))
    weighted = [n for n, m in task.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(found) == len(weighted) - 1
    assert not any(isinstance(task.model.get_submodule(n), nn.Conv2d | nn.Linear) for n in found)
    assert trace.activations[found[-1]].shape == trace.features.shape
    assert ends is None or found == ends


@pytest.mark.parametrize("defense", [BiDO(inputs=0.0, labels=0.0), MIDUnilateral(0.0), BiDO(), MIDUnilateral()])
def test_without_weights_or_enough_images_gradients_keep_their_bits(defense: Defense, bench: Any) -> None:
    small = getattr(defense, "inputs", getattr(defense, "weight", 0.0)) > 0
    batch, notes = bench.batch(3 if small else 8), {}  # type: ignore[var-annotated]
    ctx = Context(bench.task, bench.weights, KEY, notes=notes)
    got = defended_gradient(bench.task, defense, ctx)(bench.weights, batch, KEY)
    plain = plain_gradient(bench.task)(bench.weights, batch, KEY)
    assert all(torch.equal(got[n], plain[n]) for n in plain)
    assert ("fewer than 4" in defense.remark({n: [float(v[0])] for n, v in notes.items()})) == small


def test_one_class_leaves_the_term_of_the_images(bench: Any) -> None:
    batch = bench.batch(6)._replace(targets=torch.eye(4).double()[torch.zeros(6, dtype=torch.int64)])
    assert added(bench, BiDO(labels=50.0), batch) == pytest.approx(added(bench, BiDO(labels=0.0), batch), rel=1e-12)


@pytest.mark.parametrize("defense", [BiDO(), BiDO(measure="coco"), BiDO(sigma=0.0), MIDUnilateral(measure="hsic")])
def test_gradients_are_finite_where_all_images_are_the_same(defense: Defense, bench: Any) -> None:
    batch = bench.batch(5)
    batch = batch._replace(inputs=batch.inputs[:1].expand_as(batch.inputs), targets=batch.targets[:1].expand(5, 4))
    ctx = Context(bench.task, bench.weights, KEY)

    def size(inputs: Tensor) -> Tensor:
        update = defended_gradient(bench.task, defense, ctx)(bench.weights, batch._replace(inputs=inputs), KEY)
        return torch.stack([value.square().sum() for value in update.values()]).sum()

    assert bool(size(batch.inputs).isfinite())
    assert bool(grad(size)(batch.inputs).isfinite().all())


def test_pixels_count_whatever_the_model_reads(bench: Any) -> None:
    """A model that undoes another normalisation has the same terms."""
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 4)).double()
    raw = Task.of(model, (1, 8, 8), 4, Bounds.of((0.0,), (1.0,), torch.float64))
    batch = bench.batch(5)
    pixels = batch._replace(inputs=bench.task.bounds.to_pixels(batch.inputs))
    zero, features = torch.zeros(()).double(), {"0": batch.inputs}
    terms = []
    for task, own in ((bench.task, batch), (raw, pixels)):
        ctx = Context(task, bench.weights, KEY)
        trace = raw.trace(weights_of(model, torch.float64), batch.inputs)._replace(activations=features)
        terms.append(float(BiDO(layers="0").on_loss(zero, trace, own, ctx)))
    assert terms[0] == pytest.approx(terms[1], rel=1e-9)


def test_who_knows_the_objective_explains_the_update_up_to_the_order_of_images(bench: Any) -> None:
    defense, secret = BiDO(), bench.batch(5)
    counters: dict[str, Counter] = {"naive": Counter(), **{c.name: c for c in defense.counters()}}
    order = permutation(KEY, 5)
    turned = Batch(*(part[order] for part in secret))
    alone = Batch(*(part[None] for part in secret))
    (seen,) = bench.see((alone,), ThreatModel(batch_size=5), defense)
    update: Tensors = {n: v[0] for n, v in seen.update.items()}
    observation = seen._replace(update=update)
    off = {}
    for name, counter in counters.items():
        threat = ThreatModel(batch_size=5, counter=counter)
        simulated = threat.simulate(bench.task, observation, turned, {}, {}, KEY)
        off[name] = max(float((simulated[n] - update[n]).abs().max()) for n in update)
    assert off["knows_loss"] < 1e-9
    assert off["naive"] > 1e-2


def test_two_objectives_in_a_chain_are_known_together(bench: Any) -> None:
    both = chain(BiDO(), DEFENSES.build("neg_label_smoothing", smoothing=-0.5))
    (counter,) = both.counters()
    assert counter.name == "knows_loss+knows_loss"
    assert counter.objective is not None
    batch, zero = bench.batch(5), torch.zeros(()).double()
    trace, ctx = bench.task.trace(bench.weights, batch.inputs), Context(bench.task, bench.weights, KEY)
    assert float(counter.objective(zero, trace, batch, ctx)) == float(both.on_loss(zero, trace, batch, ctx))
    assert chain(DEFENSES.build("clip"), DEFENSES.build("prune")).counters()[0].objective is None


def test_wrong_options_are_refused() -> None:
    for options in ({"inputs": -1.0}, {"labels": -0.1}, {"sigma": -1.0}, {"smallest": 1}):
        with pytest.raises(ConfigError):
            BiDO(**options)  # type: ignore[arg-type]
    for options in ({"weight": -1.0}, {"sigma": -1.0}, {"smallest": 1}):
        with pytest.raises(ConfigError):
            MIDUnilateral(**options)  # type: ignore[arg-type]
