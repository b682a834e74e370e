"""Image metrics on pixels in [0, 1], one number for each pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from keyhole.core.metric import Metric
from keyhole.core.registry import METRICS

PSNR_CAP = 100.0
"""Decibels given to a perfect copy, whose PSNR is infinite; float32 pixels cannot do better than about 140."""


def mean_squared_error(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of pixels: (b, c, h, w) twice to (b,)."""
    return (guess - truth).square().flatten(1).mean(1)


def peak_signal_to_noise_ratio(guess: Tensor, truth: Tensor) -> Tensor:
    """``10 log10(1 / MSE)`` of each image, in dB, at most `PSNR_CAP`: (b, c, h, w) twice to (b,).

    Never the logarithm of a pooled error, which one good image would dominate.
    """
    return (-10.0 * torch.log10(mean_squared_error(guess, truth).clamp(min=1e-30))).clamp(max=PSNR_CAP)


def structural_similarity(guess: Tensor, truth: Tensor) -> Tensor:
    """SSIM with a uniform 7x7 window and data range 1, mean over the window positions inside the image.

    (b, c, h, w) twice to (b,). Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, computed by torchmetrics.
    Equals scikit-image's default up to its factor 49/48 on the (co)variances. Images need at least 7x7 pixels.
    """
    _, everywhere = structural_similarity_index_measure(
        guess.double(),
        truth.double(),
        gaussian_kernel=False,
        kernel_size=7,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics' own mean takes in windows that hang over the border into a reflection; these do not.
    return everywhere[..., 3:-3, 3:-3].flatten(1).mean(1)


@METRICS.add(name="mse")
def mse() -> Metric:
    """Mean squared error of pixels in [0, 1]."""
    return Metric(mean_squared_error, higher_is_leakier=False, perfect=0.0)


@METRICS.add(name="psnr")
def psnr() -> Metric:
    """Peak signal-to-noise ratio of each image."""
    return Metric(peak_signal_to_noise_ratio, higher_is_leakier=True, perfect=PSNR_CAP, unit="dB")


@METRICS.add(
    name="ssim", paper="Wang, Bovik, Sheikh and Simoncelli 2004", url="https://doi.org/10.1109/TIP.2003.819861"
)
def ssim() -> Metric:
    """Structural similarity of each image, uniform 7x7 window."""
    return Metric(structural_similarity, higher_is_leakier=True, perfect=1.0)
