from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import context

from keyhole.core.defense import Context, Defense, chain
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.types import Batch
from keyhole.errors import ConfigError
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
