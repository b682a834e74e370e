"""What every registered model inversion promises, on a linear generator and a linear target in float64."""

from __future__ import annotations

import inspect
import math
import tomllib
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn

import keyhole.experiment.spec  # noqa: F401  (fills the registries)
from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, new_key, normal, uniform
from keyhole.core.registry import INVERSIONS, Card
from keyhole.core.task import Bounds, Task
from keyhole.core.types import Weights
from keyhole.experiment.options import method
from keyhole.inversion.gan import GAN, Discriminator, Facts, Generator
from keyhole.inversion.networks import Critic
from keyhole.solve.invert import Inverted, invert

CARDS = list(INVERSIONS)
each = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
SHAPE, CLASSES, LATENT = (1, 2, 3), 3, 4
PUBLIC = uniform(new_key(3), (7, *SHAPE), torch.float64)
SHORT = {"steps": 6, "lr": 1e-3, "weight": 10.0, "gan_latent": LATENT}
ARGUMENTS = {"self", "target", "public", "key", "place", "before", "prior", "facts", "candidate", "count"}


class Linear(nn.Module):
    """z (n, latent), which attacks keep in float32, to images (n, c, h, w) in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(new_key(1), (LATENT, math.prod(SHAPE)), torch.float64) / 4)

    def forward(self, z: Tensor) -> Tensor:
        return (0.5 + z.double() @ self.weight).reshape(-1, *SHAPE)


def critic(numbers: int) -> Critic:
    made = Critic()
    made.features, made.head = nn.Flatten(), nn.Linear(math.prod(SHAPE), numbers).double()
    with torch.no_grad():
        made.head.weight.copy_(normal(new_key(2), (numbers, math.prod(SHAPE)), torch.float64))
        made.head.bias.zero_()
    return made


@cache
def prior_of(numbers: int) -> GAN:
    """A GAN that was never trained, whose discriminator gives so many numbers."""
    return GAN(Generator.of(Linear(), LATENT), Discriminator.of(critic(numbers)), Facts(0, (), 0.0, True))


def numbers(attack: Inversion) -> int:
    """A discriminator that knows the target's classes has a number for each of them."""
    return CLASSES if attack.per_target else 1


@cache
def task() -> Task:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), CLASSES)).double()
    return Task.of(model, SHAPE, CLASSES, Bounds.of((0.2,), (0.7,), torch.float64))


def weights(seed: int) -> Weights:
    shapes = {name: tuple(tensor.shape) for name, tensor in task().model.named_parameters()}
    return Weights({n: normal(fold_in(new_key(seed), n), s, torch.float64) for n, s in shapes.items()}, {})


def build(card: Card, **more: Any) -> Inversion:
    known = card.signature().parameters
    made: Inversion = card.factory(**{n: v for n, v in {**SHORT, **more}.items() if n in known})
    return made


def run(attack: Inversion, targets: list[Weights], samples: int = 2, seed: int = 0, **more: Any) -> list[Inverted]:
    keys = [fold_in(new_key(seed), number) for number in range(len(targets))]
    return invert(attack, task(), targets, prior_of(numbers(attack)), PUBLIC, samples, keys, **more)


@each
def test_it_is_built_without_options_and_sees_the_network_alone(card: Card) -> None:
    attack = card.factory()
    assert isinstance(attack, Inversion) and attack.needs == {"weights"}
    assert attack.steps >= 1 and attack.together >= 0 and attack.final >= 1
    assert card.summary and card.paper and card.link


@each
def test_its_options_survive_toml(card: Card) -> None:
    spec = method(INVERSIONS, {"name": card.name}, "test")
    written = tomli_w.dumps({name: value for name, value in spec.asdict().items() if value is not None})
    assert method(INVERSIONS, {"name": card.name, **tomllib.loads(written)}, "test") == spec


@each
def test_no_argument_can_carry_the_truth(card: Card) -> None:
    hooks = ("check", "prepare", "infer", "start", "loss", "project", "images")
    for hook in hooks:
        given = set(inspect.signature(getattr(card.factory, hook)).parameters)
        assert given <= ARGUMENTS, hook
    assert [field.name for field in fields(Target)] == ["task", "weights"]
    assert Place._fields == ("folder", "told")


@each
def test_one_key_gives_one_result(card: Card) -> None:
    attack = build(card)
    run(attack, [weights(0)])  # makes the networks
    state = torch.random.get_rng_state()
    one, two, other = (run(attack, [weights(0)], seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.images, two.images) and torch.equal(one.confidence, two.confidence)
    assert not torch.equal(one.images, other.images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.images.shape == (CLASSES, 2, *SHAPE) and one.images.dtype == torch.float64


@each
def test_targets_attacked_together_are_those_attacked_apart(card: Card) -> None:
    attack, targets = build(card), [weights(seed) for seed in range(3)]
    together, apart = run(attack, targets, at_once=3), run(attack, targets, at_once=1)
    for one, two in zip(together, apart, strict=True):
        torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.losses, two.losses, rtol=1e-5, atol=0)


@each
def test_searches_lifted_together_are_those_run_apart(card: Card) -> None:
    """Searches are numbered, so that the first of many is the only one of one."""
    attack = build(card)
    if attack.together == 0:
        pytest.skip("one search finds a distribution")
    many = run(attack, [weights(0)], samples=3)[0].images
    alone = run(attack, [weights(0)], samples=1)[0].images
    for own, first in zip(many, alone, strict=True):
        assert (own - first).flatten(1).abs().amax(1).min() < 1e-5


@each
def test_the_loss_falls_and_the_target_agrees_more(card: Card) -> None:
    """Losses of one step are noisy where a search draws, so that several are taken together."""
    short, long = (run(build(card, steps=steps, lr=lr), [weights(0)])[0] for steps, lr in ((1, 1e-9), (300, 2e-2)))
    assert sum(long.losses[-5:]) < sum(long.losses[:5])
    assert long.confidence.mean() > short.confidence.mean()


@each
def test_nothing_that_it_is_given_is_changed(card: Card) -> None:
    attack = build(card)
    own, prior, known = weights(0), prior_of(numbers(attack)), task()
    model = known.model.state_dict()
    before = {
        "weights": {n: t.clone() for n, t in own.params.items()},
        "model": {n: t.clone() for n, t in model.items()},
        "generator": {n: t.clone() for n, t in prior.generator.module.state_dict().items()},
        "critic": {n: t.clone() for n, t in prior.discriminator.module.state_dict().items()},
        "public": {"images": PUBLIC.clone()},
    }
    invert(attack, known, [own], prior, PUBLIC, 2, [new_key(0)])
    after = {
        "weights": own.params, "model": model, "generator": prior.generator.module.state_dict(),
        "critic": prior.discriminator.module.state_dict(), "public": {"images": PUBLIC},
    }  # fmt: skip
    for part, tensors in before.items():
        assert all(torch.equal(tensor, after[part][name]) for name, tensor in tensors.items()), part
    assert all(parameter.grad is None for parameter in known.model.parameters())


@each
def test_what_it_prepares_depends_on_the_target_only_if_it_says_so(card: Card, tmp_path: Any) -> None:
    small = {"gan_steps": 5, "gan_width": 2, "gan_batch": 4, "gan_kernels": 2, "gan_kernel_size": 2}
    attack, public = build(card, **small), uniform(new_key(4), (6, 1, 32, 32))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, CLASSES))
    image_task = Task.of(model, (1, 32, 32), CLASSES, Bounds.of((0.0,), (1.0,)))
    made = []
    for seed in (0, 1):
        given = {n: normal(fold_in(new_key(seed), n), tuple(p.shape)) for n, p in image_task.model.named_parameters()}
        target = Target(image_task, Weights(given, {}))
        made.append(attack.prepare(target, public, new_key(0), Place(tmp_path)).digest())
    assert (made[0] != made[1]) == attack.per_target
