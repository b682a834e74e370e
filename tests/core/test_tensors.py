"""Arithmetic on dictionaries of tensors, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from keyhole.core import tensors
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.types import Tensors

SHAPES = {"w": (3, 4), "b": (4,), "s": (), "k": (2, 1, 3)}


def some(seed: int) -> Tensors:
    return {name: normal(fold_in(new_key(seed), name), shape, torch.float64) for name, shape in SHAPES.items()}


def as_numpy(a: Tensors) -> np.ndarray:
    return np.concatenate([tensor.numpy().ravel() for tensor in a.values()])


def test_flatten_and_unflatten_are_inverse() -> None:
    a = some(0)
    flat = tensors.flatten(a)
    assert np.array_equal(flat.numpy(), as_numpy(a))
    back = tensors.unflatten(flat, SHAPES)
    assert list(back) == list(a)
    assert all(torch.equal(back[name], a[name]) and back[name].shape == a[name].shape for name in a)
    assert torch.equal(tensors.flatten(tensors.unflatten(flat, SHAPES)), flat)


def test_unflatten_refuses_a_vector_of_another_length() -> None:
    with pytest.raises(RuntimeError):
        tensors.unflatten(torch.zeros(5), SHAPES)


def test_products_and_norms_agree_with_numpy() -> None:
    a, b = some(0), some(1)
    x, y = as_numpy(a), as_numpy(b)
    assert float(tensors.dot(a, b)) == pytest.approx(x @ y, rel=1e-13)
    assert float(tensors.squared_norm(a)) == pytest.approx(x @ x, rel=1e-13)
    assert float(tensors.safe_norm(a)) == pytest.approx(np.linalg.norm(x), rel=1e-13)
    assert float(tensors.rms(a)) == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-13)
    assert tensors.size(a) == len(x)


def test_names_decide_which_tensors_meet() -> None:
    a = some(0)
    turned = dict(reversed(a.items()))
    assert float(tensors.dot(a, turned)) == pytest.approx(float(tensors.squared_norm(a)), rel=1e-13)
    difference = tensors.map_tensors(lambda p, q: p - q, a, turned)
    assert list(difference) == list(a)
    assert all(not d.any() for d in difference.values())
    with pytest.raises(KeyError):
        tensors.map_tensors(lambda p, q: p - q, a, {"w": a["w"]})


def test_the_norm_has_a_gradient_of_zero_at_zero_and_the_right_one_elsewhere() -> None:
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    assert all(not g.any() for g in grad(tensors.safe_norm)(zero).values())
    a = some(2)
    expected = as_numpy(a) / np.linalg.norm(as_numpy(a))
    assert np.allclose(as_numpy(grad(tensors.safe_norm)(a)), expected, rtol=1e-12, atol=0)


def test_everything_lifts() -> None:
    trials = [some(i) for i in range(3)]
    lifted = {name: torch.stack([t[name] for t in trials]) for name in SHAPES}
    for fn in (tensors.squared_norm, tensors.safe_norm, tensors.rms, tensors.flatten):
        assert torch.allclose(vmap(fn)(lifted), torch.stack([fn(t) for t in trials]), rtol=1e-14)
