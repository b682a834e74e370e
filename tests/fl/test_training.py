from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import context

from keyhole.core.defense import Context, Defense, chain
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.types import Batch, Tensors
from keyhole.errors import ConfigError, DataError, KeyholeError, ModelError
from keyhole.fl import defended_training


def make() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 4))
    return net.double()


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=made, dtype=torch.float64), torch.arange(count) % 4


def moved(defense: Defense, model: nn.Module | None = None, seed: int | None = 0) -> dict[str, Tensor]:
    model = model or make()
    before = copy.deepcopy(dict(model.named_parameters()))
    defended_training(model, defense, *data(), context(), lr=0.5, batch_size=6, seed=seed)
    return {name: before[name].detach() - p.detach() for name, p in model.named_parameters()}


def test_without_a_defense_it_is_plain_sgd() -> None:
    model, (images, labels) = make(), data()
    nn.functional.cross_entropy(model(images), labels).backward()
    for name, value in moved(chain()).items():
        assert torch.allclose(value, 0.5 * dict(model.named_parameters())[name].grad, atol=1e-12)


def test_each_example_is_clipped_under_dp_sgd() -> None:
    """Without noise: the mean of each example's gradient, clipped to the norm by hand."""
    model, (images, labels) = make(), data()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image[None]), label[None]).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1.0, 0.1 / float(norm)) / len(images)
    for name, value in moved(DEFENSES.build("dp_sgd", clip=0.1, noise_multiplier=0.0)).items():
        assert torch.allclose(value, 0.5 * total[name], atol=1e-9), name


def test_noise_is_fresh_unless_a_seed_is_given() -> None:
    noise = DEFENSES.build("dp_sgd", clip=0.1, noise_multiplier=1.0)
    assert torch.equal(moved(noise)["3.bias"], moved(noise)["3.bias"])
    model, other = make(), context(2)
    defended_training(model, noise, *data(), other, lr=0.5, batch_size=6, seed=0)
    assert not torch.equal(make()[3].bias - model[3].bias, moved(noise)["3.bias"]), "clients draw apart"
    assert not torch.equal(moved(noise, seed=None)["3.bias"], moved(noise, seed=None)["3.bias"])


def test_what_is_kept_between_rounds_stays_on_the_client() -> None:
    """What top-k does not send in the first round is sent later: in the end nothing is lost."""
    where, model, defense = context(), make(), DEFENSES.build("top_k", rate=0.9)
    defended_training(model, defense, *data(), where, lr=0.5, batch_size=6)
    (residual,) = [r for name, r in where.state.array_records.items() if name.endswith(".residual")]
    left = torch.from_numpy(residual["3.weight"].numpy().copy())
    sent = moved(defense)["3.weight"]
    assert torch.allclose(left + sent, moved(chain())["3.weight"], atol=1e-12)
    assert int(str(where.state.config_records["keyhole.rounds"]["count"])) == 1


class Grows(Defense):
    def on_task(self, task: Task) -> Task:
        other = copy.deepcopy(task.model)
        other.extra = nn.Linear(1, 1)
        return Task(other, task.loss, task.input_shape, task.num_classes, task.bounds, task.head, task.norm_params)


def test_a_defense_that_adds_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="the server has to have them too"):
        moved(Grows())


class Watching(Defense):
    """Notes what it is told and given in each round."""

    def __init__(self) -> None:
        self.rounds: list[tuple[int, bool]] = []
        self.inputs: list[Tensor] = []

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        self.rounds.append((ctx.round, ctx.again))
        self.inputs.append(batch.inputs)
        return batch


def test_a_client_with_other_images_does_not_train_on_what_was_made_of_those_before() -> None:
    """Also with the same ones in another order, under other labels, and fewer of them."""
    images, labels = data()
    turned = torch.arange(6).flip(0)
    cases = [(images, labels), (images[turned], labels[turned]), (images, labels.flip(0)), (images[:4], labels[:4])]
    for number, case in enumerate(cases):
        where, watching = context(), Watching()
        defense = chain(DEFENSES.build("obscuring", steps=2, start="noise", refresh=4), watching)
        for inputs, targets in (cases[0], case):
            defended_training(make(), defense, inputs, targets, where, lr=0.5, seed=0)
        assert watching.rounds == [(0, False), (1, number == 0)]
        assert torch.equal(*watching.inputs) is (number == 0)


def test_the_servers_number_of_the_round_counts_where_it_is_told() -> None:
    where, watching = context(), Watching()
    for number in (3, 7, None):
        defended_training(make(), watching, *data(), where, lr=0.5, round=number)
    assert watching.rounds == [(2, False), (6, True), (2, True)]
    with pytest.raises(ConfigError, match="round is 0"):
        defended_training(make(), watching, *data(), where, lr=0.5, round=0)


class Seeing(Defense):
    """Adds 1 to all that it is given, and remembers the names."""

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        self.names = list(update)
        return {name: value + 1 for name, value in update.items()}


def test_frozen_layers_stay_and_are_no_part_of_the_update() -> None:
    """The rest moves as in the whole network, by one step of plain SGD."""
    model, defense = make(), Seeing()
    whole, body = moved(chain()), copy.deepcopy(model[0].state_dict())
    model[0].requires_grad_(False)
    got = moved(defense, model)
    assert defense.names == ["3.weight", "3.bias"]
    assert all(torch.equal(model[0].state_dict()[name], value) for name, value in body.items())
    for name in defense.names:
        assert torch.allclose(got[name], whole[name] + 1, atol=1e-12), name
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_the_norm_of_frozen_layers_counts_for_nothing() -> None:
    """Of each example, too: the body's gradient would use up the norm."""
    model = make()
    model[0].requires_grad_(False)
    got = moved(DEFENSES.build("dp_sgd", clip=0.1, noise_multiplier=0.0), model)
    images, labels = data()
    total = torch.zeros_like(model[3].weight)
    for image, label in zip(images, labels, strict=True):
        head = make()[3]
        nn.functional.cross_entropy(head(make()[:3](image[None])), label[None]).backward()
        norm = torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm()
        total += head.weight.grad * min(1.0, 0.1 / float(norm)) / len(images)
    assert torch.allclose(got["3.weight"], 0.5 * total, atol=1e-9)


def test_a_defense_of_a_frozen_layer_is_refused_and_so_is_a_model_that_is_frozen_whole() -> None:
    model = make()
    model[3].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Soteria acts on '3.weight', which is frozen"):
        moved(DEFENSES.build("soteria", rate=0.5), model)
    with pytest.raises(ConfigError, match="nothing to train"):
        moved(chain(), make().requires_grad_(False))


_IMAGES, _LABELS = data()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"inputs": _IMAGES[:0], "labels": _LABELS[:0]}, DataError, "no images"),
        ({"inputs": _IMAGES * float("nan")}, DataError, "NaN"),
        ({"inputs": _IMAGES.numpy()}, ConfigError, "images are a ndarray"),
        ({"labels": _LABELS.tolist()}, ConfigError, "labels are a list"),
        ({"labels": _LABELS[:2]}, ConfigError, "do not fit"),
        ({"labels": _LABELS.double()}, ConfigError, "whole numbers"),
        ({"labels": _LABELS + 1}, DataError, "labels go from 1 to 4"),
        ({"labels": _LABELS - 1}, DataError, "labels go from -1 to 2"),
        ({"defense": "clip"}, ConfigError, "defense is a str"),
        ({"defense": None}, ConfigError, "defense is a NoneType"),
        ({"defense": Seeing}, ConfigError, "defense is the class Seeing"),
        ({"lr": 1e308}, ModelError, "training diverged"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_changes_nothing(
    change: dict[str, Any], kind: type[KeyholeError], said: str
) -> None:
    model, where = make(), context()
    given = {
        "defense": chain(),
        "inputs": _IMAGES,
        "labels": _LABELS,
        "context": where,
        "lr": 0.5,
        "epochs": 4,
    } | change
    with pytest.raises(kind, match=said):
        defended_training(model, **given)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))
    assert not where.state
