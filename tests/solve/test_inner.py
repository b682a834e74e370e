"""The fixed-length loop inside clients: a closed form, staying where it is told to stop, and lifting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from keyhole.solve.inner import minimise
from keyhole.solve.optimizers import SGD

TARGET = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).double()


def bowl(x: Tensor) -> Tensor:
    return 0.5 * (x - TARGET).square().sum()


def test_gradient_descent_on_a_bowl_follows_its_closed_form() -> None:
    for steps in (0, 1, 7):
        found, taken = minimise(bowl, torch.zeros(2, 2).double(), SGD(0.1), steps)
        assert torch.allclose(found, TARGET * (1 - 0.9**steps), rtol=1e-12)
        assert int(taken) == steps


def test_iterates_are_projected() -> None:
    found, _ = minimise(bowl, torch.zeros(2, 2).double(), SGD(0.5), 60, project=lambda x: x.clamp(-1, 1))
    assert torch.allclose(found, TARGET.clamp(-1, 1))


def test_who_is_told_to_stop_stays_and_the_others_go_on() -> None:
    starts = torch.stack([torch.zeros(2, 2), TARGET.float() - 0.4]).double()

    def one(x: Tensor) -> tuple[Tensor, Tensor]:
        return minimise(bowl, x, SGD(0.1), 50, stop=lambda x: (x - TARGET).abs().max() < 0.5)

    lifted, taken = vmap(one)(starts)
    # The second is near enough from the beginning; the first stops where |x - target| = 4 * 0.9^k first is below 0.5.
    assert torch.equal(lifted[1], starts[1])
    assert torch.allclose(lifted[0], TARGET * (1 - 0.9**20), rtol=1e-12)
    assert taken.tolist() == [20, 0]
    assert all(torch.allclose(lifted[i], one(starts[i])[0], rtol=1e-12) for i in range(2))


def test_it_runs_inside_a_gradient_of_something_else() -> None:
    x = torch.zeros(2, 2).double()
    outer = torch.func.grad(lambda s: (s * minimise(bowl, x, SGD(0.1), 3)[0].detach()).sum())(torch.ones(()).double())
    assert torch.allclose(outer, (TARGET * (1 - 0.9**3)).sum())
