"""Priors on images as penalties: functions of inputs (b, c, h, w) to a scalar."""

from __future__ import annotations

from torch import Tensor


def total_variation(inputs: Tensor) -> Tensor:
    """Anisotropic total variation: mean absolute difference along rows plus that along columns.

    In the units of ``inputs``. As in the code of Inverting Gradients (Geiping et al. 2020, arXiv 2003.14053).
    """
    across, down = _differences(inputs)
    return across.abs().mean() + down.abs().mean()


def smooth_total_variation(inputs: Tensor) -> Tensor:
    """Total variation with rounded corners, ``mean sqrt(d^2 + 1e-6)`` along rows plus along columns.

    For optimizers that need curvature, such as L-BFGS.
    """
    across, down = _differences(inputs)
    return (across.square() + 1e-6).sqrt().mean() + (down.square() + 1e-6).sqrt().mean()


def _differences(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs[..., :, 1:] - inputs[..., :, :-1], inputs[..., 1:, :] - inputs[..., :-1, :]
