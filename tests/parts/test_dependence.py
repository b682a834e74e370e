"""Dependence of two samples, against closed forms, eigenvalues and matrices by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from keyhole.core.keys import fold_in, new_key, normal, permutation, split, uniform
from keyhole.parts.dependence import RIDGE, coco, gaussian, linear, nhsic, squared_distances

KEY = new_key(11)
ALL = [nhsic, coco]
Fn = Callable[..., Tensor]
each = pytest.mark.parametrize("measure", ALL, ids=lambda fn: fn.__name__)


def rows(count: int, width: int = 6, purpose: str = "a") -> Tensor:
    return normal(fold_in(KEY, purpose), (count, width), torch.float64)


def by_hand(x: Tensor, sigma: float = 5.0) -> np.ndarray:
    """The centred Gaussian kernel, entry by entry."""
    points = x.numpy()
    m, d = points.shape
    kernel = np.array([[math.exp(-np.sum((p - q) ** 2) / (2 * sigma**2 * d)) for q in points] for p in points])
    h = np.eye(m) - np.ones((m, m)) / m
    return h @ kernel @ h  # type: ignore[no-any-return]


def test_nhsic_is_a_sum_over_eigenvectors() -> None:
    a, b = rows(7), a_like_b()
    (values_a, vectors_a), (values_b, vectors_b) = (np.linalg.eigh(by_hand(x)) for x in (a, b))
    shrunk_a, shrunk_b = values_a / (values_a + RIDGE * 7), values_b / (values_b + RIDGE * 7)
    expected = float(shrunk_a @ np.square(vectors_a.T @ vectors_b) @ shrunk_b)
    assert float(nhsic(a, b)) == pytest.approx(expected, rel=1e-8)


def a_like_b() -> Tensor:
    return rows(7)[:, :4].sin() + 0.3 * rows(7, 4, "b")


def test_centring_from_one_side_gives_the_same_trace() -> None:
    m, h = 7, torch.eye(7).double() - 1 / 7

    def one_sided(x: Tensor) -> Tensor:
        right = gaussian()(x) @ h
        return right @ torch.linalg.inv(right + RIDGE * m * torch.eye(m).double())

    a, b = rows(m), a_like_b()
    assert float(nhsic(a, b)) == pytest.approx(float((one_sided(a) @ one_sided(b)).trace()), rel=1e-8)


def test_coco_by_hand() -> None:
    a, b = rows(7), a_like_b()
    assert float(coco(a, b)) == pytest.approx(math.sqrt(np.linalg.norm(by_hand(a) @ by_hand(b))) / 7, rel=1e-10)


def test_two_rows_have_a_closed_form() -> None:
    a, b = rows(2), rows(2, 3, "b")
    expected = 1.0
    for x in (a, b):
        alike = math.exp(-float((x[0] - x[1]).square().sum()) / (50 * x.shape[1]))
        expected *= (1 - alike) / (1 - alike + 2e-5)
    assert float(nhsic(a, b)) == pytest.approx(expected, rel=1e-9)


def test_far_apart_rows_reach_the_largest_value() -> None:
    a, b = 100 * rows(8), 100 * rows(8, 6, "b")
    assert float(nhsic(a, b, gaussian(0.1), gaussian(0.1))) == pytest.approx(7, rel=1e-3)
    assert float(nhsic(a, b)) <= 7


@each
def test_the_same_row_everywhere_depends_on_nothing(measure: Fn) -> None:
    a, b = rows(1).expand(5, 6), rows(5, 4, "b")
    for dtype in (torch.float32, torch.float64):
        assert float(measure(a.to(dtype), b.to(dtype))) == pytest.approx(0, abs=1e-12)
        assert float(measure(b.to(dtype), a.to(dtype))) == pytest.approx(0, abs=1e-12)


@each
def test_a_batch_of_one_class_has_labels_that_nothing_depends_on(measure: Fn) -> None:
    one_hot = torch.eye(4).double()[torch.full((6,), 2)]
    assert float(measure(rows(6), one_hot, gaussian(), linear)) == 0.0


@each
@pytest.mark.parametrize("kernel", [gaussian(5.0), gaussian(0.0), linear])
def test_pairs_may_come_in_any_order(measure: Fn, kernel: Fn) -> None:
    a, b, order = rows(7), a_like_b(), permutation(KEY, 7)
    value = float(measure(a, b, kernel, kernel))
    assert float(measure(a[order], b[order], kernel, kernel)) == pytest.approx(value, rel=1e-10)
    assert float(measure(b, a, kernel, kernel)) == pytest.approx(value, rel=1e-10)
    assert float(measure(a[order], b, kernel, kernel)) != pytest.approx(value, rel=5e-10)


@each
@pytest.mark.parametrize("kernel", [gaussian(5.0), gaussian(0.0), linear])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True])
def test_gradients_of_gradients_are_finite_also_where_rows_are_the_same(
    measure: Fn, kernel: Fn, count: int, same: bool
) -> None:
    a = torch.zeros(count, 6).double() if same else rows(count)
    b = torch.ones(count, 3).double() if same else rows(count, 3, "b")

    def steepness(x: Tensor) -> Tensor:
        return grad(lambda y: measure(y, b, kernel, kernel))(x).square().sum()

    slopes = grad(lambda x: measure(x, b, kernel, kernel))(a), grad(steepness)(a)
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    assert not (same or count == 1) or not slopes[0].any()


@each
def test_lifted_equals_looped_and_follows_a_numeric_gradient(measure: Fn) -> None:
    several = normal(KEY, (3, 5, 4), torch.float64)
    b = rows(5, 3, "b")
    slopes = vmap(grad(lambda x: measure(x, b)))(several)
    for own, slope in zip(several, slopes, strict=True):
        assert torch.allclose(slope, grad(lambda x: measure(x, b))(own), rtol=1e-9, atol=1e-14)
    bump = torch.zeros(5, 4).double()
    bump[2, 1] = 1e-6
    numeric = float(measure(several[0] + bump, b) - measure(several[0] - bump, b)) / 2e-6
    assert float(slopes[0][2, 1]) == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize(("count", "sigma", "spread", "expected"), [
    (2, 5, 0.05, 0.009), (2, 5, 0.1, 0.086), (2, 5, 0.3, 0.62), (2, 5, 1, 0.95),
    (16, 5, 0.05, 0.002), (16, 5, 0.1, 0.037), (16, 5, 0.3, 1.52), (16, 5, 1, 10.5),
    (30, 5, 0.1, 0.021), (30, 5, 0.3, 1.14), (30, 5, 1, 15.5),
    (16, 1, 0.05, 0.89), (16, 1, 0.1, 4.7), (16, 1, 0.3, 12.7), (16, 1, 1, 14.8),
])  # fmt: skip
def test_images_of_known_spread(count: int, sigma: float, spread: float, expected: float) -> None:
    def value(key: Tensor) -> Tensor:
        a, b = (0.5 + spread * (uniform(k, (count, 1024), torch.float64) - 0.5) / 2 for k in split(key, 2))
        return nhsic(a, b, gaussian(sigma), gaussian(sigma))

    # Measured once, elsewhere and on other images: two digits at most.
    assert float(vmap(value)(split(KEY, 8)).mean()) == pytest.approx(expected, rel=0.3, abs=6e-4)


def test_the_median_kernel_by_hand() -> None:
    x = rows(4)
    stacked = np.concatenate([x.numpy(), x.numpy()])
    apart = [np.sum((stacked[i] - stacked[j]) ** 2) for i in range(8) for j in range(i)]
    expected = np.exp(-squared_distances(x).numpy() / (2 * np.median(apart) ** 2))
    assert np.allclose(gaussian(0.0)(x).numpy(), expected, rtol=1e-10)
    near = 1e-3 * x
    assert np.allclose(gaussian(0.0)(near), np.exp(-squared_distances(near).numpy() / 2e-4))


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    x = rows(5)
    expected = torch.cdist(x, x).square()
    assert torch.allclose(squared_distances(x + 1e6), expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(squared_distances(x).diagonal(), torch.zeros(5).double())
