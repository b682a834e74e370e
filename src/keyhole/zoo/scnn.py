"""The small network that judges inverted images: another one than was attacked."""

from __future__ import annotations

from torch import nn

from keyhole.core.registry import MODELS
from keyhole.errors import check_range
from keyhole.zoo.mcnn import conv_blocks


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

    Reference: Peng et al., "Bilateral Dependency Optimization: Defending Against Model-inversion Attacks", KDD 2022,
    https://arxiv.org/abs/2206.05483, whose code names it; reads pixels in [0, 1] without normalisation. The width is a
    constant there, and only 32x32 fits.
    """
    check_range("model.width", width, 1)
    blocks = (
        (width, 7, 1, True), (2 * width, 5, 0, True), (4 * width, 5, 0, False),
        (8 * width, 3, 1, False), (16 * width, 3, 1, False),
    )  # fmt: skip
    return conv_blocks("scnn", blocks, input_shape, num_classes)
