"""Generators and discriminators of model inversion, without weights that were trained.

Every discriminator is a `Critic`: ``features`` of an image and a ``head`` on them, so that a loss on the features needs
no second pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from keyhole.errors import ConfigError, check_range

SIDES = (32, 64)
"""Sides of the images that the networks here are made for."""


class Critic(nn.Module):
    """A discriminator in two parts."""

    features: nn.Module
    """Images (b, c, h, w) to vectors (b, f)."""
    head: nn.Module
    """Vectors to what is said of the image."""

    def forward(self, images: Tensor) -> Tensor:
        """The head's word on images (b, c, h, w); one number each comes as (b,)."""
        said: Tensor = self.head(self.features(images))
        return said.squeeze(1) if said.shape[1] == 1 else said


# Generative model inversion and its successor


def inversion_generator(shape: tuple[int, int, int], *, latent: int = 100, width: int = 64) -> nn.Module:
    """A linear layer to 4x4, then 5x5 transposed convolutions that double the side: z (b, latent) to pixels in [0, 1].

    Channels 4w, 2w, w for 32x32 and 8w, 4w, 2w, w for 64x64; BatchNorm and ReLU after all but the last layer, a sigmoid
    after that. 1,443,777 parameters for 32x32 in one channel.

    Args:
        shape: (c, h, w) of an image, 32x32 or 64x64.
        latent: length of z, at least 1.
        width: w, at least 1; 64 is the paper's code.

    Reference: Zhang et al., "The Secret Revealer: Generative Model-Inversion Attacks Against Deep Neural Networks",
    CVPR 2020, https://arxiv.org/abs/1911.07135, and its code.
    """
    channels, widths = _plan(shape, latent, width)
    widest = widths[-1]
    layers: list[nn.Module] = [
        nn.Linear(latent, widest * 16, bias=False), nn.BatchNorm1d(widest * 16), nn.ReLU(),
        nn.Unflatten(1, (widest, 4, 4)),
    ]  # fmt: skip
    for before, after in zip(widths[:0:-1], widths[-2::-1], strict=True):
        layers += [
            nn.ConvTranspose2d(before, after, 5, stride=2, padding=2, output_padding=1, bias=False),
            nn.BatchNorm2d(after), nn.ReLU(),
        ]  # fmt: skip
    last = nn.ConvTranspose2d(width, channels, 5, stride=2, padding=2, output_padding=1)
    return nn.Sequential(*layers, last, nn.Sigmoid())


def wasserstein_critic(shape: tuple[int, int, int], *, width: int = 64) -> Critic:
    """5x5 convolutions of stride 2, and a 4x4 one to a single number: pixels (b, c, h, w) to (b,).

    Channels w, 2w, 4w for 32x32 and also 8w for 64x64, leaky ReLUs of slope 0.2; instance normalisation with scale and
    shift from the second layer on stands for layer normalisation, as BatchNorm would couple the examples that the
    gradient penalty takes one by one. 1,030,913 parameters for 32x32 in one channel.

    Args:
        shape: (c, h, w) of an image, 32x32 or 64x64.
        width: w, at least 1; 64 is the paper's code.

    Reference: Zhang et al. 2020, https://arxiv.org/abs/1911.07135, and its code; Gulrajani et al. 2017,
    https://arxiv.org/abs/1704.00028.
    """
    channels, widths = _plan(shape, 1, width)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
    for before, after in zip(widths, widths[1:], strict=False):
        layers += _halving(before, after)
    # On 4x4 maps, the 4x4 convolution without padding is this linear layer.
    return _critic(layers, nn.Linear(widths[-1] * 16, 1))


def soft_label_critic(
    shape: tuple[int, int, int], num_classes: int, *, width: int = 64, kernels: int = 64, kernel_size: int = 50
) -> Critic:
    """A classifier of k classes in which "generated" is one more whose logit is 0: pixels (b, c, h, w) to (b, k).

    Three 5x5 convolutions of stride 2 with w, 2w and 4w channels, for 64x64 also a 3x3 one with 4w, each with instance
    normalisation and a leaky ReLU of slope 0.2; then minibatch discrimination and a linear layer. The logits of an
    image depend on the batch that it comes in. 14,154,949 parameters for 32x32, one channel and five classes, of which
    13.1 million are the tensor of the minibatch discrimination.

    Args:
        shape: (c, h, w) of an image, 32x32 or 64x64.
        num_classes: k, at least 2.
        width: w, at least 1; 64 is the paper's code.
        kernels: features that minibatch discrimination adds, at least 1; 64 is the paper's code, 32 is lean.
        kernel_size: numbers that each compares, at least 1; 50 is the paper's code, 8 is lean.

    Reference: Chen et al., "Knowledge-Enriched Distributional Model Inversion Attacks", ICCV 2021,
    https://arxiv.org/abs/2010.04092, and its code; Salimans et al. 2016, https://arxiv.org/abs/1606.03498.
    """
    channels, _ = _plan(shape, 1, width)
    check_range("num_classes", num_classes, 2)
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += _halving(before, after)
    if shape[1] == 64:
        layers += _halving(4 * width, 4 * width, side=3)
    features = 4 * width * 16
    head = nn.Sequential(
        MinibatchDiscrimination(features, kernels, kernel_size), nn.Linear(features + kernels, num_classes)
    )
    return _critic(layers, head)


class MinibatchDiscrimination(nn.Module):
    """Adds to each example how near the others of its batch are.

    M = x A with A of shape (f, b, c), and o_b(x_i) = sum over j != i of exp(-||M_ib - M_jb||_1); gives (x, o). A is
    drawn from N(0, 1).

    Args:
        features: f, at least 1.
        kernels: b, at least 1.
        kernel_size: c, at least 1.

    Reference: Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 3.2,
    https://arxiv.org/abs/1606.03498.
    """

    def __init__(self, features: int, kernels: int, kernel_size: int) -> None:
        super().__init__()
        check_range("kernels", kernels, 1)
        check_range("kernel_size", kernel_size, 1)
        self.tensor = nn.Parameter(torch.randn(features, kernels, kernel_size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Vectors (n, f) to (n, f + b)."""
        _, kernels, size = self.tensor.shape
        projected = (inputs @ self.tensor.flatten(1)).reshape(-1, kernels, size).transpose(0, 1)
        # An example is at distance 0 of itself, which the sum leaves out.
        near = torch.exp(-torch.cdist(projected, projected, p=1.0)).sum(2) - 1.0
        return torch.cat([inputs, near.T], dim=1)


# The generator of variational model inversion


def dcgan_generator(channels: int, *, latent: int = 50, width: int = 64) -> nn.Module:
    """4x4 transposed convolutions from 1x1 to 32x32: z (b, latent) to images in [-1, 1].

    Channels 8n, 4n, 2n, without bias; BatchNorm and ReLU between, a hyperbolic tangent last, and spectral normalisation
    of every weight. Weights from N(0, 0.02). At 50 latent numbers and one channel 3,034,880, 862,080, 267,200 and
    128,600 parameters for n = 64, 32, 16 and 10.

    Args:
        channels: of an image, 1 or 3.
        latent: length of z, at least 1.
        width: n, at least 1.

    Reference: Wang et al., "Variational Model Inversion Attacks", NeurIPS 2021, https://arxiv.org/abs/2201.10787, and
    its code; Radford, Metz and Chintala 2016, https://arxiv.org/abs/1511.06434.
    """
    _plan((channels, 32, 32), latent, width)
    layers: list[nn.Module] = [
        nn.Unflatten(1, (latent, 1, 1)), nn.ConvTranspose2d(latent, 8 * width, 4, bias=False),
        nn.BatchNorm2d(8 * width), nn.ReLU(),
    ]  # fmt: skip
    for before, after in ((8 * width, 4 * width), (4 * width, 2 * width)):
        layers += [
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        ]  # fmt: skip
    layers += [nn.ConvTranspose2d(2 * width, channels, 4, stride=2, padding=1, bias=False), nn.Tanh()]
    return _spectral(nn.Sequential(*layers))


def dcgan_critic(channels: int, *, width: int = 64) -> Critic:
    """4x4 convolutions from 32x32 to 1x1: images (b, c, 32, 32) in [-1, 1] to (b,), the log-odds of being real.

    Channels 2n, 4n, 8n, without bias; BatchNorm from the second layer on and leaky ReLUs of slope 0.2, and spectral
    normalisation of every weight. Weights from N(0, 0.02). The sigmoid is left to the loss.

    Args:
        channels: of an image, 1 or 3.
        width: n, at least 1.

    Reference: as `dcgan_generator`; without BatchNorm at the images, as Radford et al. advise.
    """
    _plan((channels, 32, 32), 1, width)
    layers: list[nn.Module] = [nn.Conv2d(channels, 2 * width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for before, after in ((2 * width, 4 * width), (4 * width, 8 * width)):
        layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    critic = _critic(layers, nn.Linear(8 * width * 16, 1, bias=False))
    _spectral(critic)
    return critic


def _plan(shape: tuple[int, int, int], latent: int, width: int) -> tuple[int, tuple[int, ...]]:
    """Channels of an image, and of the maps from its side halved down to 4x4."""
    channels, height, breadth = shape
    if channels not in (1, 3) or height != breadth or height not in SIDES:
        raise ConfigError(f"images of shape {tuple(shape)} have no generator here; 32x32 or 64x64 in 1 or 3 channels.")
    check_range("latent", latent, 1)
    check_range("width", width, 1)
    return channels, tuple(width * 2**i for i in range(3 if height == 32 else 4))


def _halving(before: int, after: int, side: int = 5) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, side, stride=2, padding=side // 2),
        nn.InstanceNorm2d(after, affine=True), nn.LeakyReLU(0.2),
    ]  # fmt: skip


def _critic(layers: list[nn.Module], head: nn.Module) -> Critic:
    critic = Critic()
    critic.features, critic.head = nn.Sequential(*layers, nn.Flatten()), head
    return critic


def _spectral(model: nn.Module) -> nn.Module:
    """Weights drawn from N(0, 0.02), then divided by their largest singular value whenever they are used."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            spectral_norm(layer)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return model
