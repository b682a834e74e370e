"""LeNets of the first gradient inversions: 5x5 convolutions of 12 channels, no pooling, no normalisation."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, get_args

from torch import nn

from keyhole.core.registry import MODELS
from keyhole.errors import UnknownName
from keyhole.zoo.shapes import as_image

_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}

Activation = Literal["sigmoid", "relu"]
Init = Literal["uniform", "default"]


@MODELS.add(
    name="lenet_zhu",
    paper="Zhu, Liu and Han 2019",
    arxiv="1906.08935",
    facts={"normalize": False},
)
def lenet_zhu(
    *, input_shape: tuple[int, ...], num_classes: int, activation: Activation = "sigmoid", init: Init = "uniform"
) -> nn.Module:
    """Three 5x5 convolutions of 12 channels with sigmoids, and a linear head: the network of DLG and iDLG.

    Strides 2, 2 and 1, padding 2, no pooling; every weight and bias is drawn uniformly from [-0.5, 0.5].
    Reads pixels in [0, 1] without normalisation. The head sees 12 * ceil(h/4) * ceil(w/4) features: 768 for
    32x32, 588 for 28x28.

    Args:
        input_shape: (c, h, w).
        num_classes: number of classes k.
        activation: ``sigmoid``, or ``relu`` after each convolution.
        init: ``uniform`` on [-0.5, 0.5], or ``default``, PyTorch's own initialisation.

    Returns:
        A module from (b, c, h, w) to logits (b, k).

    Reference: Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019,
    https://arxiv.org/abs/1906.08935. The paper's own code fixes the head at 768 or 588 inputs; here it fits
    any size. ReLU and PyTorch's initialisation are not in that code.
    """
    return _lenet("lenet_zhu", (2, 2, 1), input_shape, num_classes, activation, init)


@MODELS.add(
    name="lenet_zhu4",
    paper="Sun et al. 2021",
    arxiv="2012.06043",
    facts={"normalize": False},
)
def lenet_zhu4(
    *, input_shape: tuple[int, ...], num_classes: int, activation: Activation = "sigmoid", init: Init = "uniform"
) -> nn.Module:
    """`lenet_zhu` with a fourth convolution like its third: the network on which Soteria was shown.

    Strides 2, 2, 1 and 1; the head's weight is parameter number 8, counted from 0. As many features as `lenet_zhu`
    has: 768 for 32x32, 588 for 28x28.

    Args:
        input_shape: (c, h, w).
        num_classes: number of classes k.
        activation: ``sigmoid``, or ``relu`` after each convolution.
        init: ``uniform`` on [-0.5, 0.5], or ``default``, PyTorch's own initialisation.

    Returns:
        A module from (b, c, h, w) to logits (b, k).

    Reference: Sun et al., "Soteria: Provable Defense against Privacy Leakage in Federated Learning from
    Representation Perspective", CVPR 2021, https://arxiv.org/abs/2012.06043. The authors' attack with L-BFGS draws the
    weights uniformly, the one with a cosine leaves them as PyTorch does. Their module also hands out the features; here
    a trace does, for every model.
    """
    return _lenet("lenet_zhu4", (2, 2, 1, 1), input_shape, num_classes, activation, init)


def _lenet(
    name: str,
    strides: tuple[int, ...],
    input_shape: tuple[int, ...],
    num_classes: int,
    activation: Activation,
    init: Init,
) -> nn.Module:
    if activation not in _ACTIVATIONS:
        raise UnknownName("activation", activation, _ACTIVATIONS, f"model '{name}'")
    if init not in get_args(Init):
        raise UnknownName("init", init, get_args(Init), f"model '{name}'")
    channels, height, width = as_image(input_shape, name, least=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, stride in enumerate(strides, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, 12, 5, stride=stride, padding=2)
        layers[f"{activation}{number}"] = _ACTIVATIONS[activation]()
        channels, height, width = 12, math.ceil(height / stride), math.ceil(width / stride)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels * height * width, num_classes)
    model = nn.Sequential(layers)
    if init == "uniform":
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model
