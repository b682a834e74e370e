"""Local training: against PyTorch's own module, optimizer and autograd; lifted against client by client."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import keyhole.defenses  # noqa: F401  (fills the registry)
from keyhole.core.defense import Context, Defense, chain
from keyhole.core.keys import fold_in, new_key, normal, uniform
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Bounds, Task, plain_gradient, weights_of
from keyhole.core.types import Batch, GradFn, Key, Tensors, Weights
from keyhole.errors import ConfigError
from keyhole.federation.local import LocalTraining, Round, default_together, train_round

SHAPE, CLASSES, IMAGES = (1, 8, 8), 4, 40


def net(rate: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drop = [nn.Dropout(rate)] if rate else []
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), *drop,
            nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(),
            nn.Linear(12, CLASSES),
        )  # fmt: skip
    return model.double()


def task_of(model: nn.Module, batchnorm: str = "train_shared") -> tuple[Task, Weights]:
    bounds = Bounds.of((0.5,), (0.5,), torch.float64)
    task = Task.of(model, SHAPE, CLASSES, bounds, batchnorm=batchnorm, dropout="active")
    return task, weights_of(model, torch.float64)


def data(count: int = IMAGES) -> tuple[Tensor, Tensor]:
    inputs = normal(fold_in(new_key(1), "inputs"), (count, *SHAPE), torch.float64)
    labels = (uniform(fold_in(new_key(1), "labels"), (count,)) * CLASSES).long()
    return inputs, torch.eye(CLASSES, dtype=torch.float64)[labels]


def distance(a: Any, b: Any) -> float:
    leaves = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in leaves)


def trained_by_torch(model: nn.Module, inputs: Tensor, targets: Tensor, local: LocalTraining) -> Weights:
    """Full-batch training with PyTorch alone."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )
    for _ in range(local.epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        if local.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), local.clip)
        optimizer.step()
    return weights_of(model, torch.float64)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0, "clip": None}, {"clip": None}, {"momentum": 0.5, "weight_decay": 0.01}, {"clip": 0.3}, {}],
    ids=str,
)
def test_one_client_with_full_batches_trains_as_pytorch_does(options: dict[str, Any]) -> None:
    model, (inputs, targets) = net(), data(10)
    task, weights = task_of(model)
    local = LocalTraining(epochs=5, lr=0.1, batch_size=10, **options)
    got = train_round(task, weights, inputs, targets, [torch.arange(10)], local, new_key(0))
    wanted = trained_by_torch(model, inputs, targets, local)
    assert distance(weights, wanted) > 0.01
    for name, value in {**wanted.params, **wanted.buffers}.items():
        mine = {**got.weights.params, **got.weights.buffers}[name]
        assert mine.shape == (1, *value.shape)
        assert mine.dtype == value.dtype
        assert float((mine[0] - value).abs().max()) < 1e-8, name
    assert got.weights.buffers["1.num_batches_tracked"].tolist() == [5]
    assert got.examples.tolist() == [10]


def test_clipping_bites_where_the_limit_is_small_only() -> None:
    inputs, targets = data(10)
    task, weights = task_of(net())

    def run(clip: float | None) -> Round:
        local = LocalTraining(lr=0.1, batch_size=10, clip=clip)
        return train_round(task, weights, inputs, targets, [torch.arange(10)], local, new_key(0))

    assert distance(run(None), run(100.0)) == 0
    step = torch.cat([(run(0.3).weights.params[n][0] - w).flatten() for n, w in weights.params.items()])
    assert float(step.norm()) == pytest.approx(0.1 * 0.3, rel=1e-4)


PARTS = [torch.arange(0, 3), torch.arange(3, 20), torch.arange(20, 21), torch.arange(21, 30), torch.arange(30, 40)]


@pytest.mark.parametrize("together", [2, 3, 5, 64])
def test_clients_lifted_together_train_as_they_do_one_by_one(together: int) -> None:
    inputs, targets = data()
    task, weights = task_of(net(rate=0.3))
    local = LocalTraining(epochs=2, lr=0.05, batch_size=4, weight_decay=1e-3, clip=2.0)
    key = new_key(5)
    alone = train_round(task, weights, inputs, targets, PARTS, local, key, together=1)
    lifted = train_round(task, weights, inputs, targets, PARTS, local, key, together=together)
    assert distance(alone, lifted) < 1e-10
    assert lifted.examples.tolist() == [3, 17, 1, 9, 10]
    # Steps of each client: two epochs of ceil(n / 4) batches.
    assert lifted.weights.buffers["1.num_batches_tracked"].tolist() == [2, 10, 2, 6, 6]
    assert distance(weights, train_round(task, weights, inputs, targets, PARTS, local, key).weights) > 0.01


def test_the_result_belongs_to_the_key() -> None:
    inputs, targets = data()
    task, weights = task_of(net(rate=0.3))
    local = LocalTraining(batch_size=4)

    def run(seed: int) -> Round:
        return train_round(task, weights, inputs, targets, PARTS, local, new_key(seed), together=1)

    assert distance(run(1), run(1)) == 0
    assert distance(run(1), run(2)) > 1e-4


def test_weights_and_data_are_left_as_they_are() -> None:
    inputs, targets = data()
    task, weights = task_of(net())
    before = copy.deepcopy((weights, inputs, targets, task.model.state_dict()))
    train_round(task, weights, inputs, targets, PARTS, LocalTraining(batch_size=4), new_key(0), together=2)
    assert distance(before, (weights, inputs, targets, task.model.state_dict())) == 0


def linear() -> tuple[Task, Weights]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).double()
    return task_of(model)


@pytest.mark.parametrize(("count", "size"), [(8, 4), (5, 4), (7, 3), (2, 4), (3, 2)])
def test_an_epoch_sees_every_image_and_fills_its_last_batch_with_images_seen_first(count: int, size: int) -> None:
    # With a tiny learning rate all gradients are those at the start, so that an epoch's change is their weighted sum.
    inputs, targets = data(count)
    task, weights = linear()
    each = [
        plain_gradient(task)(weights, Batch(inputs[[i]], targets[[i]], torch.ones(1).double()), new_key(0))["1.weight"]
        for i in range(count)
    ]
    local = LocalTraining(lr=1e-6, batch_size=size, momentum=0.0, clip=None)
    got = train_round(task, weights, inputs, targets, [torch.arange(count)], local, new_key(2))
    moved = (weights.params["1.weight"] - got.weights.params["1.weight"][0]) / 1e-6
    whole, extra = divmod(-(-count // size) * size, count)
    fits = [
        set(twice)
        for twice in itertools.combinations(range(count), extra)
        if torch.allclose(moved * size, sum((whole + (i in twice)) * g for i, g in enumerate(each)), atol=1e-4)
    ]
    assert len(fits) == 1


def test_the_order_of_images_changes_from_epoch_to_epoch() -> None:
    # Two epochs of one batch that takes 4 of 5 images twice in one order: equal orders would repeat the same image.
    inputs, targets = data(5)
    task, weights = linear()

    def moved(epochs: int, seed: int) -> Tensor:
        local = LocalTraining(epochs=epochs, lr=1e-6, batch_size=4, momentum=0.0, clip=None)
        got = train_round(task, weights, inputs, targets, [torch.arange(5)], local, new_key(seed))
        return (weights.params["1.weight"] - got.weights.params["1.weight"][0]) / 1e-6

    # The same three images come twice in both epochs for one seed in ten.
    assert sum(bool((moved(2, seed) - 2 * moved(1, seed)).abs().max() > 1e-3) for seed in range(10)) >= 6


def test_the_loss_is_the_mean_over_steps_before_each_step() -> None:
    model, (inputs, targets) = net(), data(10)
    task, weights = task_of(model)
    local = LocalTraining(epochs=3, lr=0.1, batch_size=10, momentum=0.0)
    got = train_round(task, weights, inputs, targets, [torch.arange(10)], local, new_key(0))
    losses = []
    for epochs in range(3):
        trained = copy.deepcopy(model)
        if epochs:
            wanted = trained_by_torch(model, inputs, targets, LocalTraining(epochs, 0.1, 10, 0.0))
            trained.load_state_dict({**wanted.params, **wanted.buffers})
        losses.append(nn.functional.cross_entropy(trained.train()(inputs), targets).item())
    assert got.loss.tolist() == pytest.approx([sum(losses) / 3], abs=1e-8)


def test_batchnorm_in_eval_mode_keeps_its_running_statistics() -> None:
    inputs, targets = data()
    task, weights = task_of(net(), batchnorm="eval")
    got = train_round(task, weights, inputs, targets, PARTS, LocalTraining(batch_size=4), new_key(0), together=5)
    for name, buffer in weights.buffers.items():
        assert torch.equal(got.weights.buffers[name], buffer.expand(5, *buffer.shape))
    assert distance({n: p[0] for n, p in got.weights.params.items()}, weights.params) > 1e-3


def test_dropout_is_that_of_the_task_with_a_fresh_mask_each_step() -> None:
    # A linear model behind dropout, and a tiny learning rate: a weight stays as it is where its input is dropped.
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES)).double()
    task, weights = task_of(model)
    inputs, targets = data(1)

    def kept(epochs: int) -> Tensor:
        local = LocalTraining(epochs, lr=1e-6, batch_size=1, momentum=0.0)
        got = train_round(task, weights, inputs, targets, [torch.arange(1)], local, new_key(0))
        return (got.weights.params["2.weight"][0] != weights.params["2.weight"]).any(0)

    share = [float(kept(epochs).double().mean()) for epochs in (1, 2, 8)]
    assert 0.3 < share[0] < 0.7
    assert share[0] < share[1] < share[2]


# Defenses


class Doubling(Defense):
    """Doubles what leaves the client, and counts and adds what it has seen of it."""

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        seen = ctx.state.get("seen", {name: torch.zeros_like(value) for name, value in update.items()})
        ctx.state["seen"] = {name: seen[name] + value for name, value in update.items()}
        return {name: 2 * value for name, value in update.items()}


class Noise(Defense):
    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        def noisy(weights: Weights, batch: Batch, key: Key) -> Tensors:
            own = fold_in(fold_in(ctx.key, "noise"), f"{ctx.round} {ctx.step}")
            made = gradient(weights, batch, key)
            return {n: g + 0.01 * normal(fold_in(own, n), tuple(g.shape), g.dtype) for n, g in made.items()}

        return noisy


class Silence(Defense):
    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        return lambda weights, batch, key: {n: torch.zeros_like(p) for n, p in weights.params.items()}


def protected(defense: Defense | None, rate: float = 0.0, **options: Any) -> tuple[Weights, Round]:
    inputs, targets = data()
    task, weights = task_of(net(rate))
    local = LocalTraining(batch_size=4)
    return weights, train_round(task, weights, inputs, targets, PARTS, local, new_key(5), defense=defense, **options)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("together", [1, 3])
def test_a_defense_that_does_nothing_changes_nothing(rate: float, together: int) -> None:
    _, plain = protected(None, rate, together=together)
    _, neutral = protected(Defense(), rate, together=together)
    assert distance(plain, neutral) < 1e-10


def test_a_defense_acts_on_what_leaves_the_client() -> None:
    weights, plain = protected(None)
    _, doubled = protected(Doubling(), together=2)
    for name, start in weights.params.items():
        moved = start - plain.weights.params[name]
        assert torch.allclose(doubled.weights.params[name], start - 2 * moved, atol=1e-10)
        for client in range(5):
            assert torch.allclose(doubled.states[client]["seen"][name], moved[client], atol=1e-10)
    assert distance(plain.weights.buffers, doubled.weights.buffers) < 1e-10


def test_what_a_defense_keeps_of_a_client_comes_back_to_the_same_client() -> None:
    _, first = protected(Doubling(), together=2)
    before = copy.deepcopy(first.states)
    _, again = protected(Doubling(), together=3, states=first.states)
    for client in range(5):
        for name, value in before[client]["seen"].items():
            assert torch.allclose(again.states[client]["seen"][name], 2 * value, atol=1e-10)
    assert distance(before, first.states) == 0


@pytest.mark.parametrize("make", [Noise, lambda: chain(Noise(), Doubling())])
def test_defended_clients_lifted_together_train_as_they_do_one_by_one(make: Callable[[], Defense]) -> None:
    _, alone = protected(make(), 0.3, together=1, number=2)
    _, lifted = protected(make(), 0.3, together=4, number=2)
    assert distance(alone, lifted) < 1e-10


def test_each_client_step_and_round_has_its_own_noise() -> None:
    class NoiseAlone(Noise):
        def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
            return super().on_gradient(Silence().on_gradient(gradient, ctx), ctx)

    inputs, targets = data(8)
    task, weights = linear()
    local = LocalTraining(epochs=1, lr=1.0, batch_size=2, momentum=0.0, clip=None)
    parts = [torch.arange(0, 2), torch.arange(2, 8)]

    def noise(number: int) -> Tensor:
        got = train_round(
            task, weights, inputs, targets, parts, local, new_key(0), number=number, defense=NoiseAlone(), together=2
        )
        return (got.weights.params["1.weight"] - weights.params["1.weight"]).flatten(1)

    first, second = noise(0), noise(1)
    assert float(first[0].std()) == pytest.approx(0.01, rel=0.2)  # one step
    assert float(first[1].std()) == pytest.approx(0.01 * 3**0.5, rel=0.2)  # three steps, independent
    rows = torch.cat([first, second])
    assert (torch.corrcoef(rows) - torch.eye(4).double()).abs().max() < 0.3


class Swap(Defense):
    """Replaces images by their negatives, remembers them, and counts how often it was asked."""

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        before = ctx.state.get("swap", {"count": torch.zeros(())})["count"]
        ctx.state["swap"] = {"count": before + 1, "own": batch.inputs, "again": torch.tensor(ctx.again)}
        return batch._replace(inputs=-batch.inputs)


@pytest.mark.parametrize("together", [1, 4])
def test_a_defense_of_images_trains_on_what_it_put_in_their_place(together: int) -> None:
    (inputs, targets), (task, weights) = data(), task_of(net())
    local, parts = LocalTraining(batch_size=4), [torch.arange(0, 7), torch.arange(7, 12), torch.arange(5, 12)]
    how: dict[str, Any] = {"together": together}
    got = train_round(task, weights, inputs, targets, parts, local, new_key(5), defense=Swap(), **how)
    wanted = train_round(task, weights, -inputs, targets, parts, local, new_key(5), **how)
    plain = train_round(task, weights, inputs, targets, parts, local, new_key(5), defense=chain(), **how)
    assert distance((got.weights, got.loss), (wanted.weights, wanted.loss)) < 1e-10
    assert distance(got.weights.params, plain.weights.params) > 1e-3
    for client, part in enumerate(parts):
        assert torch.equal(got.states[client]["swap"]["own"], inputs[part])
        assert not bool(got.states[client]["swap"]["again"])
        moved = [float((got.weights.params[n][client] - w).abs().max()) for n, w in weights.params.items()]
        assert max(moved) > 1e-3, "a defended client learns"
    again = train_round(
        task, weights, inputs, targets, parts, local, new_key(6), number=1, defense=Swap(), states=got.states, **how
    )
    assert [float(state["swap"]["count"]) for state in again.states] == [2.0] * 3
    assert all(bool(state["swap"]["again"]) for state in again.states)


def test_a_defense_of_images_has_the_public_ones() -> None:
    class FromPublic(Defense):
        def on_batch(self, batch: Batch, ctx: Context) -> Batch:
            assert ctx.public is not None
            return batch._replace(inputs=ctx.public.inputs[: len(batch.inputs)])

    (inputs, targets), (task, weights) = data(), task_of(net())
    public = Batch(inputs[30:], targets[30:], torch.full((10,), 0.1).double())
    local, part = LocalTraining(batch_size=4), [torch.arange(0, 6)]
    got = train_round(task, weights, inputs, targets, part, local, new_key(5), defense=FromPublic(), public=public)
    moved = torch.cat([inputs[30:36], inputs[6:]])
    wanted = train_round(task, weights, moved, targets, part, local, new_key(5))
    assert distance(got.weights, wanted.weights) < 1e-10


def test_running_statistics_move_under_a_defense_too() -> None:
    weights, silent = protected(Silence())
    assert distance({n: p[0] for n, p in silent.weights.params.items()}, weights.params) == 0
    model = net().train()
    inputs, _ = data()
    functional_call(model, weights.params, (inputs[20].expand(4, *SHAPE),))  # the client with one image
    assert torch.allclose(silent.weights.buffers["1.running_var"][2], model[1].running_var, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soteria", {"rate": 0.4}),
        ("concealing", {"steps": 3, "start": "noise"}),
        ("obscuring", {"steps": 3}),
        ("dp_sgd", {"clip": 0.5, "noise_multiplier": 0.1}),
        ("user_dp", {"clip": 0.5}),
        ("random_masking", {}),
        ("gaussian_noise", {}),
        ("top_k", {}),
    ],
)
def test_every_client_of_a_published_defense_learns_its_head_too(name: str, options: dict[str, Any]) -> None:
    """A public reference implementation silently sent the defended client's weights back as they came."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, CLASSES)).double()
    task = Task.of(model, SHAPE, CLASSES, Bounds.of((0.5,), (0.5,), torch.float64))
    weights = weights_of(model, torch.float64)
    inputs, targets = data(24)
    clients = tuple(torch.arange(start, start + 8) for start in (0, 8, 16))
    public = Batch(inputs[:8], targets[:8], torch.full((8,), 1 / 8).double())
    sent = train_round(
        task, weights, inputs, targets, clients, LocalTraining(lr=0.1, batch_size=4), new_key(3),
        defense=DEFENSES.build(name, **options), public=public,
    )  # fmt: skip
    bare = train_round(task, weights, inputs, targets, clients, LocalTraining(lr=0.1, batch_size=4), new_key(3))
    learned, undefended = sent.weights.params, bare.weights.params
    for client in range(3):
        for part in ("3.weight", "3.bias", "1.weight"):
            assert not torch.equal(learned[part][client], weights.params[part]), "this client has learned nothing"
        changed = [not torch.equal(learned[name][client], undefended[name][client]) for name in learned]
        assert any(changed), "this client is not defended"


def test_what_cannot_be_trained_is_refused() -> None:
    inputs, targets = data()
    task, weights = task_of(net())
    with pytest.raises(ConfigError, match="client 1 has no images"):
        train_round(task, weights, inputs, targets, [PARTS[0], torch.arange(0)], LocalTraining(), new_key(0))
    for name, value in {
        "epochs": 0,
        "lr": 0.0,
        "batch_size": 0,
        "momentum": 1.0,
        "weight_decay": -1,
        "clip": 0,
    }.items():
        with pytest.raises(ConfigError, match=name):
            LocalTraining(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="together is 0"):
        train_round(task, weights, inputs, targets, PARTS, LocalTraining(), new_key(0), together=0)


def test_clients_train_one_by_one_on_a_cpu_and_together_elsewhere() -> None:
    assert default_together(torch.device("cpu")) == 1
    assert default_together(torch.device("cuda")) > 1
