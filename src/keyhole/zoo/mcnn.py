"""The small network that model inversion attacks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from keyhole.core.registry import MODELS
from keyhole.errors import check_range
from keyhole.zoo.shapes import as_image


@MODELS.add(
    name="mcnn",
    paper="Peng et al. 2022",
    arxiv="2206.05483",
    facts={"normalize": False},
)
def mcnn(*, input_shape: tuple[int, ...], num_classes: int, width: int = 64) -> nn.Module:
    """Three convolutions with BatchNorm and leaky ReLUs of slope 0.2: the target of model inversion on digits.

    A 7x7 convolution with padding 1, then two 5x5 ones without, of w, 2w and 4w channels; 2x2 maximum pooling after the
    first two. The head sees 4w features for 32x32, 256 of them at width 64. 1,029,765 parameters for five classes and
    one channel, 258,885 at width 32. PyTorch's own initialisation.

    Args:
        input_shape: (c, h, w), sides of at least 32.
        num_classes: number of classes k.
        width: channels w of the first convolution, at least 1.

    Returns:
        A module from (b, c, h, w) to logits (b, k).

    Reference: Peng et al., "Bilateral Dependency Optimization: Defending Against Model-inversion Attacks", KDD 2022,
    https://arxiv.org/abs/2206.05483, whose code names it; reads pixels in [0, 1] without normalisation. The width is a
    constant there, and only 32x32 fits.
    """
    check_range("model.width", width, 1)
    blocks = ((width, 7, 1, True), (2 * width, 5, 0, True), (4 * width, 5, 0, False))
    return conv_blocks("mcnn", blocks, input_shape, num_classes)


def conv_blocks(
    name: str, blocks: tuple[tuple[int, int, int, bool], ...], input_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    """Blocks of (channels, side of the kernel, padding, whether pooling follows), and a linear head."""
    channels, height, width = as_image(input_shape, name, least=32)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (outputs, side, padding, pooled) in enumerate(blocks, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, side, padding=padding)
        layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"leaky{number}"] = nn.LeakyReLU(0.2)
        channels, height, width = outputs, *(n + 2 * padding - side + 1 for n in (height, width))
        if pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels * height * width, num_classes)
    return nn.Sequential(layers)
