"""Image metrics against scikit-image, and identification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor

import keyhole.metrics  # noqa: F401  (fills the registry)
from keyhole.core.keys import fold_in, new_key, normal, uniform
from keyhole.core.metric import Metric
from keyhole.core.registry import METRICS, Card
from keyhole.metrics.identify import identified

KEY = new_key(21)
SHAPES = [(4, 1, 8, 8), (3, 1, 25, 31), (3, 3, 16, 16), (2, 3, 7, 9)]


def pairs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Truths, and guesses from nearly right to unrelated."""
    truth = uniform(fold_in(KEY, f"truth {shape}"), shape, dtype)
    truth = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(truth, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = normal(fold_in(KEY, "noise"), shape, dtype)
    amount = torch.linspace(0.01, 0.5, shape[0], dtype=dtype).reshape(-1, 1, 1, 1)
    return (truth + amount * noise).clamp(0, 1), truth


def build(name: str) -> Metric:
    return METRICS.build(name)


def images(batch: Tensor) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).double().numpy() for image in batch]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    guess, truth = pairs(shape, dtype)
    got = build("ssim")(guess, truth)
    for value, a, b in zip(got, images(guess), images(truth), strict=True):
        expected = structural_similarity(a, b, win_size=7, use_sample_covariance=False, data_range=1.0, channel_axis=2)
        assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_and_psnr_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    guess, truth = pairs(shape)
    mse, psnr = build("mse")(guess, truth), build("psnr")(guess, truth)
    for i, (a, b) in enumerate(zip(images(guess), images(truth), strict=True)):
        assert float(mse[i]) == pytest.approx(mean_squared_error(a, b), rel=1e-10)
        assert float(psnr[i]) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0), rel=1e-10)


@pytest.mark.parametrize("card", list(METRICS), ids=lambda card: card.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_are_perfect(card: Card, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    metric = card.factory()
    truth = pairs(shape, dtype)[1]
    for same in (truth, torch.zeros_like(truth), torch.ones_like(truth)):
        assert torch.allclose(metric(same, same).double(), torch.full((shape[0],), metric.perfect).double(), atol=1e-9)


@pytest.mark.parametrize("card", list(METRICS), ids=lambda card: card.name)
def test_a_worse_guess_leaks_less(card: Card) -> None:
    metric = card.factory()
    values = metric(*pairs((4, 1, 25, 31)))
    assert values.shape == (4,)
    falling = values if metric.higher_is_leakier else -values
    assert bool((falling.diff() < 0).all())
    assert float(falling[0]) < (metric.perfect if metric.higher_is_leakier else -metric.perfect)


@pytest.mark.parametrize("card", list(METRICS), ids=lambda card: card.name)
def test_each_pair_is_measured_by_itself(card: Card) -> None:
    metric = card.factory()
    guess, truth = pairs((4, 3, 9, 9))
    together = metric(guess, truth)
    alone = torch.cat([metric(guess[i : i + 1], truth[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize("card", list(METRICS), ids=lambda card: card.name)
def test_one_image_without_numbers_does_not_spoil_the_others(card: Card) -> None:
    metric = card.factory()
    guess, truth = pairs((3, 1, 9, 9))
    sick = guess.clone()
    sick[1] = float("nan")
    values = metric(sick, truth)
    assert torch.allclose(values[[0, 2]], metric(guess, truth)[[0, 2]], rtol=1e-12)
    assert bool(values[1].isnan())


def test_a_guess_nearer_than_every_candidate_is_identified() -> None:
    truth = uniform(fold_in(KEY, "t"), (3, 1, 8, 8), torch.float64)
    others = uniform(fold_in(KEY, "o"), (50, 1, 8, 8), torch.float64)
    noise = normal(fold_in(KEY, "n"), truth.shape, torch.float64)
    assert identified(truth + 0.05 * noise, truth, others).tolist() == [1, 1, 1]
    assert identified(others[:3], truth, others).tolist() == [0, 0, 0]
    mixed = torch.stack([truth[0], others[4], truth[2]])
    assert identified(mixed, truth, others).tolist() == [1, 0, 1]


@pytest.mark.parametrize("step", [0.45, 0.55])
def test_the_border_is_half_way_to_the_nearest_candidate(step: float) -> None:
    truth, other = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    far = 5 * torch.ones(40, 1, 8, 8)
    assert bool(identified(truth + step, truth, torch.cat([other, far]))) == (step < 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("candidates", [1, 20, 40, 200])
def test_a_tie_with_a_copy_of_the_secret_is_not_identified(candidates: int, dtype: torch.dtype) -> None:
    truth = uniform(fold_in(KEY, "t"), (5, 1, 32, 32), dtype)
    others = uniform(fold_in(KEY, "o"), (candidates, 1, 32, 32), dtype)
    others[: min(5, candidates)] = truth[: min(5, candidates)]
    copied = min(5, candidates)
    assert identified(truth, truth, others)[:copied].tolist() == [0] * copied


def test_a_guess_without_numbers_is_not_identified() -> None:
    truth = uniform(KEY, (2, 1, 8, 8))
    guess = torch.full_like(truth, float("nan"))
    assert identified(guess, truth, uniform(fold_in(KEY, "o"), (30, 1, 8, 8))).tolist() == [0, 0]
