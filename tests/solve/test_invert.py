"""The lifted loop of model inversion, on a toy whose optimum is known in closed form."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.errors import ConfigError, ModelError
from keyhole.solve.invert import invert
from keyhole.solve.optimizers import SGD, Nesterov


def linear_task(dtype=torch.float64):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    return Task.of(model, (1, 2, 2), 3, Bounds.of((0.0,), (1.0,), dtype))


def some_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return weights_of(model, torch.float64)


@dataclass(frozen=True)
class Toy(Inversion):
    """Pixels themselves, pulled to the target's row of weights for each class, with a little noise of each step."""

    steps: int = 20
    rate: float = 0.1
    noise: float = 0.0
    together: int = 1
    final: int = 1
    initial: int = 1
    optimizer: Any = field(init=False, default=None)

    def __post_init__(self):
        object.__setattr__(self, "optimizer", SGD(self.rate))

    def prepare(self, target: Target, public, key, place: Place, before=None):
        return None

    def infer(self, target, prior, public):
        return {"shift": public.mean() * target.weights.params["1.weight"].mean()}

    def start(self, target, prior, key):
        return {"x": normal(key, (self.together, 3, 4), torch.float64)}

    def loss(self, target, prior, facts, candidate, key):
        noise = self.noise * normal(key, (self.together, 3, 4), torch.float64)
        return 0.5 * (candidate["x"] + noise - self.goal(target, facts)).square().sum()

    def goal(self, target, facts):
        return target.weights.params["1.weight"] + facts["shift"]

    def images(self, prior, candidate, count, key):
        return candidate["x"].reshape(-1, 3, 1, 2, 2)


PUBLIC = torch.rand(7, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def run(method, weights, samples=3, keys=None, **more):
    keys = keys or [new_key(i) for i in range(len(weights))]
    return invert(method, linear_task(), weights, None, PUBLIC, samples, keys, **more)


def test_a_quadratic_is_descended_as_its_closed_form_says():
    weights = some_weights(0)
    found = run(Toy(steps=7), [weights], samples=2)[0]
    goal = weights.params["1.weight"] + PUBLIC.mean() * weights.params["1.weight"].mean()
    for search in range(2):
        begin = normal(fold_in(fold_in(new_key(0), search), "start"), (1, 3, 4), torch.float64)[0]
        expected = goal + 0.9**7 * (begin - goal)  # x - goal shrinks by 1 - rate a step
        made = found.images.flatten(2)
        near = (made - expected[:, None]).abs().amax(-1) < 1e-12
        assert near.any(1).all()
    assert found.images.shape == (3, 2, 1, 2, 2)
    assert found.searches == 2


def test_lifted_searches_are_those_of_single_ones():
    method, weights = Toy(noise=0.3), some_weights(1)
    whole = run(method, [weights], samples=4)[0]
    for size in (1, 2, 3):
        # Searches are numbered, so that fewer of them are the first ones of more.
        part = run(method, [weights], samples=size)[0].images
        for row in part.flatten(0, 1):
            assert (whole.images.flatten(0, 1) - row).abs().flatten(1).amax(1).min() < 1e-12


def test_targets_lifted_together_are_those_one_at_a_time():
    method, weights = Toy(noise=0.3), [some_weights(seed) for seed in range(3)]
    apart, at_once = run(method, weights, at_once=1), run(method, weights, at_once=3)
    for one, other in zip(apart, at_once, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-12)


def test_another_key_gives_other_images_and_the_same_key_the_same():
    weights = some_weights(2)
    first, again, other = (run(Toy(), [weights], keys=[new_key(seed)])[0].images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_images_the_target_is_surest_of_are_kept():
    weights = some_weights(3)
    method = Toy(steps=2, final=4)
    found = run(method, [weights], samples=2)[0]
    every = run(Toy(steps=2), [weights], samples=8)[0]
    assert found.searches == 8
    best = every.confidence.topk(2, dim=1).values
    torch.testing.assert_close(found.confidence, best)
    # The confidence is the target's own softmax of its class.
    flat = found.images.flatten(0, 1)
    logits = linear_task().logits(weights, flat).softmax(-1).reshape(3, 2, 3)
    torch.testing.assert_close(found.confidence, torch.stack([logits[k, :, k] for k in range(3)]))


def test_several_images_of_a_class_in_one_search():
    found = run(Toy(together=2), [some_weights(4)], samples=3)[0]
    assert found.images.shape == (3, 3, 1, 2, 2)
    assert found.searches == 2


def test_an_objective_that_explodes_is_an_error():
    with pytest.raises(ModelError, match="lower its lr"):
        run(Toy(steps=2000, rate=3.0), [some_weights(5)])
    with pytest.raises(ConfigError, match="samples"):
        run(Toy(), [some_weights(5)], samples=0)


def test_nesterov_is_the_update_of_the_released_code():
    x, velocity = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    state, optimizer = Nesterov(0.02).init(x), Nesterov(0.02)
    for slope in ([1.0, -2.0], [0.5, 0.1], [-3.0, 40.0]):
        gradient = torch.tensor(slope, dtype=torch.float64)
        before = velocity.clone()
        velocity = 0.9 * velocity - 0.02 * gradient
        x = (x + -0.9 * before + 1.9 * velocity).clamp(-1, 1)
        state = optimizer.update(state, torch.tensor(0.0), gradient, 0, lambda flat: flat.clamp(-1, 1))
        torch.testing.assert_close(state.x, x, rtol=0, atol=1e-15)
