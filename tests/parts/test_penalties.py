"""Total variation against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad

from keyhole.core.keys import new_key, uniform
from keyhole.parts.penalties import smooth_total_variation, total_variation

#   1 2 4
#   1 0 4      across: |1| |2| |-1| |4| = 8 over 4;  down: |0| |-2| |0| = 2 over 3
IMAGE = torch.tensor([[[[1.0, 2.0, 4.0], [1.0, 0.0, 4.0]]]]).double()


def test_total_variation_by_hand() -> None:
    assert float(total_variation(IMAGE)) == pytest.approx(8 / 4 + 2 / 3, rel=1e-14)


def test_smooth_total_variation_by_hand() -> None:
    across = sum(math.sqrt(d * d + 1e-6) for d in (1, 2, -1, 4)) / 4
    down = sum(math.sqrt(d * d + 1e-6) for d in (0, -2, 0)) / 3
    assert float(smooth_total_variation(IMAGE)) == pytest.approx(across + down, rel=1e-14)


def test_a_flat_image_has_none_and_the_smooth_one_next_to_none() -> None:
    assert float(total_variation(torch.full((2, 3, 5, 4), 0.7))) == 0
    assert float(smooth_total_variation(torch.full((2, 3, 5, 4), 0.7).double())) == pytest.approx(2e-3, rel=1e-9)


def test_images_and_channels_are_averaged() -> None:
    batch = torch.cat([IMAGE, 3 * IMAGE, 0 * IMAGE])
    assert float(total_variation(batch)) == pytest.approx((1 + 3 + 0) / 3 * (2 + 2 / 3), rel=1e-14)
    colours = torch.cat([IMAGE, 2 * IMAGE], dim=1)
    assert float(total_variation(colours)) == pytest.approx(1.5 * (2 + 2 / 3), rel=1e-14)


def test_the_border_does_not_wrap() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    assert float(total_variation(ramp)) == pytest.approx(1.0)
    assert float(total_variation(ramp.mT)) == pytest.approx(1.0)


@pytest.mark.parametrize("penalty", [total_variation, smooth_total_variation])
def test_gradients_are_finite_on_a_flat_image_and_right_elsewhere(penalty: Callable[[Tensor], Tensor]) -> None:
    assert bool(grad(penalty)(torch.full((1, 1, 4, 4), 0.5)).isfinite().all())
    x = uniform(new_key(0), (1, 2, 4, 3), torch.float64)
    got, step = grad(penalty)(x), 1e-7
    for index in ((0, 0, 0, 0), (0, 1, 3, 2), (0, 1, 1, 1)):
        up, down = x.clone(), x.clone()
        up[index] += step
        down[index] -= step
        assert float(got[index]) == pytest.approx(float(penalty(up) - penalty(down)) / (2 * step), rel=1e-4, abs=1e-8)
