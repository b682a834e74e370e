"""The small network that model inversion attacks, and another one that judges inverted images."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from keyhole.core.registry import MODELS
from keyhole.errors import check_range
from keyhole.zoo.shapes import as_image

_Block = tuple[int, int, int, bool]
"""Channels in units of the width, side of the kernel, padding, and whether pooling follows."""

_FIRST: tuple[_Block, ...] = ((1, 7, 1, True), (2, 5, 0, True), (4, 5, 0, False))
"""With which both networks begin."""


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
    return _conv_blocks("mcnn", _FIRST, input_shape, num_classes, width)


@MODELS.add(
    name="scnn",
    paper="Peng et al. 2022",
    arxiv="2206.05483",
    facts={"normalize": False},
)
def scnn(*, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> nn.Module:
    """Five convolutions with BatchNorm and leaky ReLUs of slope 0.2: the evaluator of inverted digits.

    As `mcnn` with w, 2w and 4w channels, and then two 3x3 convolutions with padding 1 of 8w and 16w channels. The head
    sees 16w features for 32x32, 512 of them at width 32. 1,740,234 parameters for ten classes and one channel.

    Args:
        input_shape: (c, h, w), sides of at least 32.
        num_classes: number of classes k.
        width: channels w of the first convolution, at least 1.

    Returns:
        A module from (b, c, h, w) to logits (b, k).

    Reference: as for `mcnn`, and with the same differences.
    """
    return _conv_blocks("scnn", (*_FIRST, (8, 3, 1, False), (16, 3, 1, False)), input_shape, num_classes, width)


def _conv_blocks(
    name: str, blocks: tuple[_Block, ...], input_shape: tuple[int, ...], num_classes: int, width: int
) -> nn.Module:
    check_range("model.width", width, 1)
    channels, rows, columns = as_image(input_shape, name, least=32)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (factor, side, padding, pooled) in enumerate(blocks, start=1):
        outputs = factor * width
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, side, padding=padding)
        layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"leaky{number}"] = nn.LeakyReLU(0.2)
        channels, rows, columns = outputs, *(n + 2 * padding - side + 1 for n in (rows, columns))
        if pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            rows, columns = rows // 2, columns // 2
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels * rows * columns, num_classes)
    return nn.Sequential(layers)
