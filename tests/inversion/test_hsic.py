import pytest
import torch

from keyhole.errors import ConfigError
from keyhole.inversion.hsic import Dependence
from keyhole.parts.dependence import gaussian, nhsic

IMAGES = torch.rand(8, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_halves_are_of_all_images_class_after_class():
    rows = IMAGES[:3].flatten(0, 1)  # nine images: the last one is left out
    expected = 2.0 * nhsic(rows[:4], rows[4:8], gaussian(5.0), gaussian(5.0))
    torch.testing.assert_close(Dependence(2.0)(IMAGES[:3]), expected)


def test_within_classes_is_a_mean_over_them():
    expected = sum(nhsic(IMAGES[:4, k], IMAGES[4:, k], gaussian(5.0), gaussian(5.0)) for k in range(3)) / 3
    torch.testing.assert_close(Dependence(1.0, "within_class")(IMAGES), expected)


def test_the_released_sign_rewards_images_that_are_alike():
    alike = 0.5 + 0.1 * (IMAGES - 0.5)
    term = Dependence.preset("faithful")
    assert 0 <= term(alike) < term(IMAGES)
    assert Dependence.preset("diversity")(alike) > Dependence.preset("diversity")(IMAGES)


def test_presets_and_weights():
    assert Dependence.preset("none")(IMAGES) == 0
    assert Dependence.preset("faithful") == Dependence(0.05, "halves", 5.0)
    assert Dependence.preset("faithful", -5.0).weight == -5.0
    with pytest.raises(ConfigError, match="goes with hsic"):
        Dependence.preset("none", 1.0)
    with pytest.raises(ConfigError, match="set together to 8"):
        Dependence.preset("diversity").check(4)
    Dependence.preset("diversity").check(8)
