"""Soteria against scores worked out row by row, the authors' percentile rule, pseudo-inverses and distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from keyhole.core.defense import Context, Counter, Defense, chain
from keyhole.core.keys import fold_in, new_key, normal, split, uniform
from keyhole.core.registry import DEFENSES
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task, plain_gradient, weights_of
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Tensors, Weights
from keyhole.defenses.soteria import joint_gain, largest_stretch, row_norms, smallest
from keyhole.errors import ConfigError, ModelError, UnknownName
from keyhole.experiment.plan import Group
from keyhole.experiment.run import run_group
from keyhole.parts.distances import relative_l2

KEY = new_key(8)
SHAPE, CLASSES = (2, 6, 6), 4
SILENCE = 0.3
"""Taken off a bias, so that some units are dead."""


def task_of(*body: nn.Module, features: int) -> tuple[Task, Weights]:
    model = nn.Sequential(*body, nn.Linear(features, CLASSES)).double()
    bounds = Bounds.of((0.4, 0.5), (0.3, 0.2), torch.float64)
    task = Task.of(model, SHAPE, CLASSES, bounds)
    drawn = {
        name: (uniform(fold_in(KEY, name), tuple(value.shape), torch.float64) - 0.5) / math.sqrt(value[0].numel())
        for name, value in weights_of(model, torch.float64).params.items()
    }
    return task, Weights(drawn, {})


@pytest.fixture(scope="module")
def relu() -> tuple[Task, Weights]:
    """20 units, of which several are dead: rectified, then the largest of a window."""
    task, weights = task_of(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), features=20)
    lower = weights.params["0.bias"] - SILENCE
    return task, weights._replace(params={**weights.params, "0.bias": lower})


@pytest.fixture(scope="module")
def linear() -> tuple[Task, Weights]:
    """An invertible linear body of 72 units."""
    return task_of(nn.Flatten(), nn.Linear(72, 72), features=72)


def batch_of(size: int, seed: int = 0) -> Batch:
    pixels = uniform(fold_in(new_key(seed), "pixels"), (size, *SHAPE), torch.float64)
    inputs = (pixels - torch.tensor([0.4, 0.5]).double().reshape(2, 1, 1)) / torch.tensor([0.3, 0.2]).double().reshape(
        2, 1, 1
    )
    targets = torch.eye(CLASSES, dtype=torch.float64)[(torch.arange(size) + seed) % CLASSES]
    return Batch(inputs, targets, torch.full((size,), 1.0 / size, dtype=torch.float64))


def defend(task: Task, weights: Weights, batch: Batch, **options: Any) -> tuple[Tensors, dict[str, Tensor], Tensors]:
    """The defended gradient, what was noted, and the plain gradient."""
    ctx, plain = Context(task, weights, KEY), plain_gradient(task)
    found = DEFENSES.build("soteria", **options).on_gradient(plain, ctx)(weights, batch, KEY)
    return found, {name: values[0] for name, values in ctx.notes.items()}, plain(weights, batch, KEY)


def features_of(task: Task, weights: Weights, inputs: Tensor) -> Tensor:
    return task.trace(weights, inputs).features


def jacobians(task: Task, weights: Weights, inputs: Tensor) -> Tensor:
    """(b, d, n), one image and one unit at a time."""
    rows = []
    for image in inputs:
        x = image[None].clone().requires_grad_(True)
        r = features_of(task, weights, x)[0]
        rows.append(torch.stack([torch.autograd.grad(u, x, retain_graph=True)[0].flatten() for u in r]))
    return torch.stack(rows)


def authors_mask(scores: np.ndarray, rate: float) -> np.ndarray:
    """The public code's rule: what is below the percentile is pruned."""
    return ~(np.abs(scores) < np.percentile(scores, 100 * rate))


# The mask.


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_the_columns_that_go_are_those_of_the_authors_rule(rate: float, constant: float, bench: Any) -> None:
    batch = bench.batch(3)
    norms = jacobians(bench.task, bench.weights, batch.inputs).norm(dim=2)
    size = features_of(bench.task, bench.weights, batch.inputs)
    scores = (norms / (size + constant)).sum(0).numpy()
    found, _, plain = defend(bench.task, bench.weights, batch, rate=rate, constant=constant)
    kept = torch.from_numpy(authors_mask(scores, rate))
    assert int((~kept).sum()) == math.ceil(rate * 127)
    assert torch.equal(found["3.weight"], plain["3.weight"] * kept)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.5, 0.8, 0.95])
def test_dead_units_change_nothing_against_the_authors_rule(rate: float, relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batch = batch_of(1)
    size = features_of(task, weights, batch.inputs)[0]
    norms = jacobians(task, weights, batch.inputs)[0].norm(dim=1)
    dead = size == 0
    assert 0.2 < float(dead.double().mean()) < 0.8
    scores = torch.where(dead, 0.0, norms / (size + 0.1)).numpy()
    found, _, plain = defend(task, weights, batch, rate=rate, constant=0.1)
    assert torch.equal(found["4.weight"], plain["4.weight"] * torch.from_numpy(authors_mask(scores, rate)))


def test_of_768_units_one_percent_is_8_and_of_2304_sixty_is_1382() -> None:
    alive = torch.ones(2304, dtype=torch.bool)
    scores = normal(KEY, (2304,), torch.float64).abs()
    assert int(smallest(scores[:768], alive[:768], 0.01, False).sum()) == 8  # as printed by the authors' notebook
    assert int(smallest(scores, alive, 0.6, False).sum()) == 1382
    assert int(smallest(scores[:101], alive[:101], 0.07, False).sum()) == 7  # 0.07 x 100 is a little more in floats
    ties = torch.zeros(10)
    assert int(smallest(ties, alive[:10], 0.5, False).sum()) == 5


def test_one_images_gradient_is_an_outer_product_with_the_pruned_representation(bench: Any) -> None:
    batch = bench.batch(1)
    found, _, plain = defend(bench.task, bench.weights, batch, rate=0.5)
    r = features_of(bench.task, bench.weights, batch.inputs)[0]
    delta = plain["3.bias"]
    assert torch.allclose(plain["3.weight"], torch.outer(delta, r), rtol=1e-12, atol=1e-15)
    kept = (found["3.weight"] != 0).any(0)
    assert int((~kept).sum()) == 64
    assert torch.allclose(found["3.weight"], torch.outer(delta, r * kept), rtol=1e-12, atol=1e-15)
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != "3.weight")
    assert list(found) == list(plain)


def test_a_rate_of_zero_is_the_identity(bench: Any) -> None:
    for options in ({}, {"live_only": True}, {"score": "exact"}):
        found, notes, plain = defend(bench.task, bench.weights, bench.batch(2), rate=0.0, **options)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
        assert float(notes["certified_mse"].max()) == 0


def test_padding_has_no_say(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    one, two = batch_of(1), batch_of(2)
    padded = two._replace(share=torch.tensor([1.0, 0.0]).double())
    found, _, _ = defend(task, weights, padded, rate=0.7)
    alone, _, _ = defend(task, weights, one._replace(inputs=two.inputs[:1], targets=two.targets[:1]), rate=0.7)
    assert torch.allclose(found["4.weight"], alone["4.weight"], rtol=1e-12, atol=1e-15)


def test_any_named_linear_layer(make_bench: Any) -> None:
    own = make_bench("mlp")
    batch = own.batch(1)
    found, notes, plain = defend(own.task, own.weights, batch, rate=0.5, layer="1")
    assert int((found["1.weight"] == 0).all(0).sum()) == 32  # of the 64 pixels that this layer reads
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != "1.weight")
    # Pixels are their own representation: rows have norm 1, so the largest inputs go.
    largest = batch.inputs.flatten().abs().argsort(descending=True)[:32]
    assert set(largest.tolist()) == set((found["1.weight"] == 0).all(0).nonzero().flatten().tolist())
    gone = batch.inputs.flatten()[largest].square().sum()
    assert float(notes["certified_mse"]) == pytest.approx(float(gone) * 0.3**2 / 64, rel=1e-6)
    with pytest.raises(UnknownName, match="Accepted: 1, 3"):
        defend(own.task, own.weights, batch, layer="fc1")


def test_a_layer_that_reads_more_than_a_vector_is_refused() -> None:
    task, weights = task_of(nn.Linear(6, 6), nn.Flatten(), features=72)
    with pytest.raises(ModelError, match="reads"):
        defend(task, weights, batch_of(1), layer="0")


def test_options_out_of_range_are_refused() -> None:
    for options in ({"rate": 1.0}, {"rate": -0.1}, {"constant": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DEFENSES.build("soteria", **options)


def test_the_representation_is_that_of_the_gradients_own_dropout_and_batch_statistics(make_bench: Any) -> None:
    own = make_bench("conv_all", "train_hidden", "active")
    batch = own.batch(3)
    found, notes, plain = defend(own.task, own.weights, batch, rate=0.6)
    x = batch.inputs.clone().requires_grad_(True)
    r = own.task.trace(own.weights, x, masks=own.task.masks(KEY, 3)).features
    # All images at once: under batch statistics a unit of one moves with the pixels of the others.
    norms = torch.stack([torch.autograd.grad(u.sum(), x, retain_graph=True)[0].flatten(1).norm(dim=1) for u in r.T])
    alive = r.T != 0
    scores = torch.where(alive, norms / torch.where(alive, r.T, 1.0), 0.0).sum(1).detach().numpy()
    kept = torch.from_numpy(authors_mask(scores, 0.6))
    head = f"{own.task.head}.weight"
    assert 0 < float(notes["dead_units"]) < 0.3  # dropped for all three images
    assert torch.equal(found[head], plain[head] * kept)


# Scores.


def test_row_norms_and_the_largest_singular_value(bench: Any, relu: tuple[Task, Weights]) -> None:
    for task, weights, batch in ((bench.task, bench.weights, bench.batch(3)), (*relu, batch_of(3))):
        found = jacobians(task, weights, batch.inputs)

        def body(x: Tensor, task: Task = task, weights: Weights = weights) -> Tensor:
            return features_of(task, weights, x)

        assert torch.allclose(row_norms(body, batch.inputs), found.norm(dim=2), rtol=1e-12)
        stretch = largest_stretch(body, batch.inputs, normal(KEY, tuple(batch.inputs.shape), torch.float64))
        top = torch.linalg.svdvals(found)[:, 0]
        assert bool((stretch <= top * (1 + 1e-12)).all()), "the power method comes from below"
        assert torch.allclose(stretch, top, rtol=2e-3)


def test_the_joint_score_is_a_column_of_the_pseudo_inverse_over_live_units(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batch = batch_of(3)
    features = features_of(task, weights, batch.inputs)
    alive = features != 0
    found = joint_gain(lambda x: features_of(task, weights, x), batch.inputs, alive)
    assert not alive.all()
    for gain, live, jacobian in zip(found, alive, jacobians(task, weights, batch.inputs), strict=True):
        expected = np.linalg.norm(np.linalg.pinv(jacobian[live].numpy()), axis=0)
        assert gain[live].numpy() == pytest.approx(expected, rel=1e-5)
        assert bool(gain[~live].isinf().all())
        assert bool((gain[live] >= (1 - 1e-8) / jacobian[live].norm(dim=1)).all()), "a row alone gives the least"
    assert float(found[alive].max()) > 1.05 * float(
        (1 / jacobians(task, weights, batch.inputs).norm(dim=2))[alive].max()
    )


def test_orthogonal_rows_have_one_score() -> None:
    task, weights = task_of(nn.Flatten(), nn.Linear(72, 72), features=72)
    basis, _ = torch.linalg.qr(normal(KEY, (72, 72), torch.float64))
    scale = 0.5 + uniform(KEY, (72, 1), torch.float64)
    weights = weights._replace(params={**weights.params, "1.weight": scale * basis})
    batch = batch_of(2)
    body_norms = row_norms(lambda x: features_of(task, weights, x), batch.inputs)
    gain = joint_gain(lambda x: features_of(task, weights, x), batch.inputs, torch.ones(2, 72, dtype=torch.bool))
    assert torch.allclose(gain, 1 / body_norms, rtol=1e-7)
    assert torch.allclose(body_norms, scale.T.expand(2, -1), rtol=1e-12)
    one, _, _ = defend(task, weights, batch, rate=0.5)
    two, _, _ = defend(task, weights, batch, rate=0.5, score="exact")
    assert torch.equal(one["2.weight"], two["2.weight"])


def test_the_joint_score_prunes_by_the_pseudo_inverse(linear: tuple[Task, Weights]) -> None:
    task, weights = linear
    batch = batch_of(2)
    features = features_of(task, weights, batch.inputs).abs().numpy()
    columns = np.linalg.norm(np.linalg.inv(weights.params["1.weight"].numpy()), axis=0)
    scores = (1 / (columns * features)).sum(0)
    found, _, plain = defend(task, weights, batch, rate=0.4, score="exact")
    assert torch.equal(found["2.weight"], plain["2.weight"] * torch.from_numpy(authors_mask(scores, 0.4)))
    other, _, _ = defend(task, weights, batch, rate=0.4)
    assert not torch.equal(found["2.weight"], other["2.weight"])


def test_in_float32_the_joint_score_is_still_worked_out_in_float64(linear: tuple[Task, Weights]) -> None:
    task, weights = linear
    batch = batch_of(2)
    single = Weights({name: value.float() for name, value in weights.params.items()}, {})
    small = Batch(*(part.float() for part in batch))
    bounds = Bounds(task.bounds.mean.float(), task.bounds.std.float())
    narrow = Task(task.model, task.loss, task.input_shape, CLASSES, bounds, task.head, frozenset())
    found, _, plain = defend(narrow, single, small, rate=0.4, score="exact")
    exact, _, _ = defend(task, weights, batch, rate=0.4, score="exact")
    assert torch.equal(found["2.weight"] == 0, exact["2.weight"] == 0)
    assert found["2.weight"].dtype == plain["2.weight"].dtype == torch.float32


# What is removed.


def test_rates_up_to_the_dead_share_remove_nothing_and_say_so(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batch = batch_of(1)
    dead = float((features_of(task, weights, batch.inputs) == 0).double().mean())
    below, above = dead - 0.06, min(dead + 0.3, 0.95)
    found, notes, plain = defend(task, weights, batch, rate=below)
    assert float(notes["dead_units"]) == dead
    assert float(notes["representation_energy_removed"]) == 0
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    soteria = DEFENSES.build("soteria", rate=below)
    assert "removed nothing" in soteria.remark({name: value.flatten().tolist() for name, value in notes.items()})
    for options in ({"rate": above}, {"rate": below, "live_only": True}):
        found, notes, _ = defend(task, weights, batch, **options)
        r, kept = features_of(task, weights, batch.inputs)[0], (found["4.weight"] != 0).any(0)
        removed = float((r * ~kept).square().sum() / r.square().sum())
        assert float(notes["representation_energy_removed"]) == pytest.approx(removed, rel=1e-12)
        assert removed > 0
        assert soteria.remark({name: value.flatten().tolist() for name, value in notes.items()}) == ""


def test_live_only_counts_live_units(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batch = batch_of(1)
    live = int((features_of(task, weights, batch.inputs) != 0).sum())
    for rate in (0.1, 0.5, 0.9):
        found, _, _ = defend(task, weights, batch, rate=rate, live_only=True)
        assert live - int((found["4.weight"] != 0).any(0).sum()) == math.ceil(rate * (live - 1))


def test_a_representation_of_zeros_gives_finite_numbers(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    silent = weights._replace(params={**weights.params, "0.bias": torch.full((5,), -99.0).double()})
    for options in ({}, {"score": "exact"}, {"live_only": True}):
        found, notes, _ = defend(task, silent, batch_of(2), rate=0.5, **options)
        assert all(bool(value.isfinite().all()) for value in (*found.values(), *notes.values()))
        assert float(notes["dead_units"]) == 1


# The certificate.


def test_no_exact_inverse_of_a_linear_body_beats_the_certificate(linear: tuple[Task, Weights]) -> None:
    task, weights = linear
    std = task.bounds.std
    for seed in range(4):
        batch = batch_of(1, seed)
        found, notes, _ = defend(task, weights, batch, rate=0.5)
        r = features_of(task, weights, batch.inputs)[0]
        shared = r * (found["2.weight"] != 0).any(0)
        # The attacker who honours the assumption has one answer, A^-1 (r' - b).
        flat = torch.linalg.solve(weights.params["1.weight"], shared - weights.params["1.bias"])
        error = float(((flat.reshape(SHAPE) - batch.inputs[0]) * std).square().mean())
        by_hand = weights.params["1.weight"] * std.expand(SHAPE).flatten().reciprocal()
        bound = float((r - shared).square().sum() / torch.linalg.svdvals(by_hand)[0] ** 2 / 72)
        assert float(notes["certified_mse"]) == pytest.approx(bound, rel=5e-3)
        assert error >= bound > 0


def test_no_guess_that_fits_a_wide_body_beats_the_certificate() -> None:
    task, weights = task_of(nn.Flatten(), nn.Linear(72, 10), features=10)
    batch = batch_of(1)
    found, notes, _ = defend(task, weights, batch, rate=0.5)
    matrix, std = weights.params["1.weight"], task.bounds.std.expand(SHAPE).flatten()
    r = features_of(task, weights, batch.inputs)[0]
    shared = r * (found["2.weight"] != 0).any(0)
    scaled = matrix / std  # by pixel
    nearest = torch.linalg.pinv(scaled) @ (shared - r)  # the fit that is nearest to the truth, which none can know
    free = torch.eye(72, dtype=torch.float64) - torch.linalg.pinv(scaled) @ scaled
    certified = float(notes["certified_mse"])
    assert float(nearest.square().mean()) >= certified > 0
    for seed in range(20):
        guess = nearest + free @ normal(new_key(seed), (72,), torch.float64)
        assert torch.allclose(scaled @ guess, shared - r, atol=1e-9)
        assert float(guess.square().mean()) >= certified


@pytest.mark.parametrize(("bias", "void"), [(100.0, False), (1e4, True)])
def test_the_certificate_is_met_where_only_the_most_stretched_direction_goes(bias: float, void: bool) -> None:
    """And nothing is certified where no picture in [0, 1] is so far away."""
    task, weights = task_of(nn.Flatten(), nn.Linear(72, 72), features=72)
    scale = torch.linspace(1.0, 2.0, 72).double()
    scale[0] = 40.0
    images = batch_of(1)
    strong = {"1.weight": torch.diag(scale), "1.bias": torch.zeros(72).double()}
    strong["1.bias"][0] = bias  # by far the largest unit for its row
    weights = weights._replace(params={**weights.params, **strong})
    found, notes, _ = defend(task, weights, images, rate=0.01)
    assert (found["2.weight"] == 0).all(0).nonzero().flatten().tolist() == [0]
    r = features_of(task, weights, images.inputs)[0, 0]
    error = float((0.3 * r / scale[0]) ** 2 / 72)  # only pixel 0 moves, of a channel of deviation 0.3
    assert (error > 1) == void
    assert float(notes["certified_mse"]) == pytest.approx(math.nan if void else error, rel=1e-6, nan_ok=True)


def test_the_certificate_is_in_pixels_whatever_the_normalisation(relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batch = batch_of(2)
    _, notes, _ = defend(task, weights, batch, rate=0.8)
    found, _, _ = defend(task, weights, batch, rate=0.8)
    kept = (found["4.weight"] != 0).any(0)
    std = task.bounds.std.expand(SHAPE).flatten()
    r = features_of(task, weights, batch.inputs)
    for own, jacobian, certified in zip(r, jacobians(task, weights, batch.inputs), notes["certified_mse"], strict=True):
        lost = float((own * ~kept).square().sum())
        assert float(certified) == pytest.approx(
            lost / float(torch.linalg.svdvals(jacobian / std)[0]) ** 2 / 72, rel=1e-2
        )


# At every local step, under many trials, and in counters.


def test_it_acts_at_every_local_step(bench: Any) -> None:
    batch, defense = bench.batch(2), DEFENSES.build("soteria", rate=0.5)
    threat = ThreatModel(rule=LocalSGD(epochs=2, lr=0.3, batch_size=1), batch_size=2)
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), KEY)
    here = bench.weights
    for step in (0, 1, 0, 1):
        one = Batch(batch.inputs[step : step + 1], batch.targets[step : step + 1], torch.ones(1).double())
        slope, _, _ = defend(bench.task, here, one, rate=0.5)
        here = Weights({name: w - 0.3 * slope[name] for name, w in here.params.items()}, here.buffers)
    for name, w in bench.weights.params.items():
        assert torch.allclose(seen.update[name], w - here.params[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"score": "exact"}, {"live_only": True, "constant": 0.1}], ids=str)
def test_lifted_equals_looped(options: dict[str, Any], relu: tuple[Task, Weights]) -> None:
    task, weights = relu
    batches = [batch_of(2, seed) for seed in range(3)]
    joined = Batch(*(torch.stack(parts) for parts in zip(*batches, strict=True)))
    defense = DEFENSES.build("soteria", rate=0.7, **options)

    def see(batch: Batch, key: Tensor) -> tuple[Tensors, dict[str, Tensor]]:
        notes: dict[str, list[Tensor]] = {}
        (seen,) = observe(task, ThreatModel(batch_size=2), defense, weights, (batch,), key, notes=[notes])
        return seen.update, {name: values[0] for name, values in notes.items()}

    updates, notes = vmap(see)(joined, split(KEY, 3))
    for i, batch in enumerate(batches):
        update, noted = see(batch, split(KEY, 3)[i])
        assert all(torch.allclose(updates[n][i], update[n], rtol=1e-9, atol=1e-13) for n in update)
        assert all(torch.allclose(notes[n][i], noted[n].to(notes[n]), rtol=1e-6, atol=1e-13) for n in noted)


def truth_loss(bench: Any, defense: Defense, counter: Counter, size: int = 1) -> float:
    threat = ThreatModel(batch_size=size, counter=counter)
    batch = bench.batch(size)
    (seen,) = observe(bench.task, threat, defense, bench.weights, (batch,), KEY)
    facts = counter.facts(bench.task, (seen,))
    simulated = threat.simulate(bench.task, seen, batch, facts, {}, KEY)
    mine, theirs = counter.compare(simulated, seen.update, facts)
    return float(relative_l2(mine, theirs, torch.cat([v.flatten() for v in theirs.values()]).square().sum()))


@pytest.mark.parametrize("model", ["conv", "mlp"])
@pytest.mark.parametrize("size", [1, 3])
def test_who_knows_it_has_no_loss_at_the_truth(model: str, size: int, make_bench: Any) -> None:
    own = make_bench(model)
    for defense in (
        DEFENSES.build("soteria", rate=0.5),
        DEFENSES.build("soteria", rate=0.5, score="exact"),
        *([DEFENSES.build("soteria", rate=0.5, layer="1")] if model == "mlp" else []),
    ):
        assert truth_loss(own, defense, Counter(), size) > 1e-3
        assert [counter.name for counter in defense.counters()] == ["drop_layer", "mask_columns"]
        for counter in defense.counters():
            assert counter.truth_loss == "zero"
            assert truth_loss(own, defense, counter, size) < 1e-24
            assert truth_loss(own, chain(), counter, size) < 1e-24, "nothing to undo"


def test_the_counters_still_see_all_else(bench: Any) -> None:
    defense = DEFENSES.build("soteria", rate=0.5)
    (seen,) = observe(bench.task, ThreatModel(), defense, bench.weights, (bench.batch(),), KEY)
    drop, mask = defense.counters()
    other = {name: normal(fold_in(KEY, name), tuple(v.shape), v.dtype) for name, v in seen.update.items()}
    mine, theirs = drop.compare(other, seen.update, drop.facts(bench.task, (seen,)))
    for name in other:
        if name == "3.weight":
            assert not mine[name].any()
            assert not theirs[name].any()
        else:
            assert torch.equal(mine[name], other[name])
            assert torch.equal(theirs[name], seen.update[name])
    believed = mask.believe(lambda *_: other, mask.facts(bench.task, (seen,)), {})(bench.weights, bench.batch(), KEY)
    sent = (seen.update["3.weight"] != 0).any(0)
    assert 0 < int(sent.sum()) < 128
    assert torch.equal(believed["3.weight"], other["3.weight"] * sent)
    assert all(torch.equal(believed[name], other[name]) for name in other if name != "3.weight")


# In an audit.


def test_numbers_of_each_image_come_in_the_order_of_the_episode(make_setup: Any, make_trial: Any) -> None:
    setup = make_setup()
    options = {"rate": 0.5}
    trial = make_trial(
        options={"steps": 1}, episode=(3, 0, 2), batch_size=3, defense=(("soteria", options),)
    )  # classes 3, 0, 2: the client has them in another order
    (outcome,) = run_group(Group((trial,)), setup).outcomes
    images = setup.task.bounds.from_pixels(setup.data.target.images[[3, 0, 2]])
    targets = torch.eye(CLASSES, dtype=torch.float64)[[3, 0, 2]]
    batch = Batch(images, targets, torch.full((3,), 1 / 3, dtype=torch.float64))
    _, notes, _ = defend(setup.task, setup.weights[0][0], batch, **options)
    for name, rel in (("representation_energy_removed", 1e-9), ("certified_mse", 1e-2)):
        assert outcome.notes[name] == pytest.approx(notes[name].tolist(), rel=rel), name
        assert len(set(outcome.notes[name])) == 3


def test_over_uneven_local_steps_there_is_one_number_for_an_update(make_setup: Any, make_trial: Any) -> None:
    from keyhole.core.trial import Spec

    rule = Spec.of("sgd", {"epochs": 1, "lr": 0.1, "batch_size": 2, "order": "fixed"})
    trial = make_trial(
        options={"steps": 1}, episode=(0, 1, 2), batch_size=3, defense=(("soteria", {"rate": 0.5}),), rule=rule
    )
    (outcome,) = run_group(Group((trial,)), make_setup()).outcomes
    assert outcome.status == "budget", outcome.detail
    assert all(len(values) == 1 for values in outcome.notes.values())


def test_in_training_nobody_reads_a_certificate_and_none_is_worked_out(bench: Any) -> None:
    noted = {}
    for recorded in (True, False):
        ctx = Context(bench.task, bench.weights, KEY, recorded=recorded)
        soteria = DEFENSES.build("soteria", rate=0.4).on_gradient(plain_gradient(bench.task), ctx)
        noted[recorded] = (soteria(bench.weights, bench.batch(2), KEY), set(ctx.notes))
    assert noted[True][1] - noted[False][1] == {"certified_mse"}
    assert all(torch.equal(noted[True][0][name], value) for name, value in noted[False][0].items())
