"""Lifting: shared leaves stay as they are, `None` passes through, and trials can be stacked and taken."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from keyhole.core.types import Observation, Weights
from keyhole.solve.lift import Shared, lift, stack, take


class Pair(NamedTuple):
    left: Tensor
    right: dict[str, Tensor | None]


def test_a_lifted_function_is_the_loop() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3, 2)
    got = lift(lambda p: Pair(p.left * 2, {"a": p.right["y"].sum(0) + p.left.sum()}), Shared())(Pair(x, {"y": y}))
    assert isinstance(got, Pair)
    for i in range(5):
        assert torch.allclose(got.left[i], 2 * x[i])
        assert torch.allclose(got.right["a"], torch.stack([y[i].sum(0) + x[i].sum() for i in range(5)]))


def test_shared_leaves_are_not_lifted() -> None:
    weights = Weights({"w": torch.randn(3, 2)}, {"b": torch.randn(2)})
    shapes: list[Any] = []

    def fn(w: Weights, x: Tensor) -> Tensor:
        shapes.append((tuple(w.params["w"].shape), torch._C._functorch.is_batchedtensor(w.params["w"])))
        return x @ w.params["w"] + w.buffers["b"]

    x = torch.randn(4, 3)
    got = lift(fn, Shared(weights))(weights, x)
    assert shapes == [((3, 2), False)]
    assert torch.allclose(got, x @ weights.params["w"] + weights.buffers["b"], atol=1e-6)


def test_shared_leaves_come_back_as_the_same_objects() -> None:
    weights = Weights({"w": torch.randn(3, 2)}, {})
    got = lift(lambda w, x: Observation(weights=w, update={"u": x * 2}), Shared(weights))(weights, torch.ones(4))
    assert got.weights.params["w"] is weights.params["w"]
    assert got.update["u"].tolist() == [2, 2, 2, 2]
    again = lift(lambda o: o.update["u"] + o.weights.params["w"].sum(), Shared(weights))(got)
    assert again.shape == (4,)


def test_an_equal_tensor_is_not_a_shared_one() -> None:
    weights = torch.randn(4, 2)
    assert weights in Shared({"w": weights})
    assert weights.clone() not in Shared({"w": weights})
    assert None not in Shared()


def test_none_and_plain_values_pass_through() -> None:
    def fn(o: Observation, images: Tensor | None, flag: str) -> tuple[Observation, Tensor | None, str]:
        assert o.weights is None
        assert images is None
        return o._replace(update={"u": o.update["u"] + 1}), images, flag

    seen, images, flag = lift(fn, Shared())(Observation(update={"u": torch.zeros(3, 2)}), None, "x")
    assert seen.update["u"].shape == (3, 2)
    assert bool((seen.update["u"] == 1).all())
    assert (seen.weights, seen.targets, seen.statistics, images, flag) == (None, None, None, None, "x")


def test_constant_results_get_a_trial_axis() -> None:
    got = lift(lambda x: (x, torch.tensor(7.0)), Shared())(torch.zeros(3))
    assert got[1].tolist() == [7, 7, 7]


def test_trials_of_different_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="same size"):
        lift(lambda x, y: x + y, Shared())(torch.zeros(3), torch.zeros(4))


def test_stack_and_take() -> None:
    weights = torch.randn(2)
    shared = Shared(weights)
    trials = [
        Observation(weights=Weights({"w": weights}, {}), update={"u": torch.full((2,), float(i))}) for i in range(4)
    ]
    joined = stack(trials, shared)
    assert joined.weights.params["w"] is weights
    assert joined.update["u"].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert joined.targets is None
    some = take(joined, torch.tensor([3, 1]), shared)
    assert some.update["u"].tolist() == [[3, 3], [1, 1]]
    assert some.weights.params["w"] is weights
    assert some.targets is None
    some.update["u"].zero_()
    assert joined.update["u"][3].tolist() == [3, 3]
