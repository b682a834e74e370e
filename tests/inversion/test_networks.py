"""Generators, discriminators and their losses: published sizes, ranges, and formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from keyhole.core.keys import new_key, seeded
from keyhole.errors import ConfigError
from keyhole.inversion.gan import Discriminator, Generator
from keyhole.inversion.losses import (
    feature_gap,
    gradient_penalty,
    log_odds_of_real,
    real_or_not,
    soft_cross_entropy,
    soft_label_loss,
    surprise_of_real,
    total_entropy,
)
from keyhole.inversion.networks import (
    MinibatchDiscrimination,
    dcgan_critic,
    dcgan_generator,
    inversion_generator,
    soft_label_critic,
    wasserstein_critic,
)

torch.set_num_threads(1)

SHAPES = [(1, 32, 32), (3, 32, 32), (1, 64, 64), (3, 64, 64)]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Networks


def test_published_sizes() -> None:
    assert count(inversion_generator((1, 32, 32))) == 1_443_777
    assert count(wasserstein_critic((1, 32, 32))) == 1_030_913
    assert count(soft_label_critic((1, 32, 32), 5)) == 14_154_949
    sizes = [count(dcgan_generator(1, latent=50, width=n)) for n in (64, 32, 16, 10)]
    assert sizes == [3_034_880, 862_080, 267_200, 128_600]


def test_lean_sizes() -> None:
    assert count(inversion_generator((1, 32, 32), width=32)) == 465_889  # 0.466 million
    assert count(wasserstein_critic((1, 32, 32), width=32)) == 259_457  # 0.259 million
    assert count(soft_label_critic((1, 32, 32), 5, width=32, kernels=32, kernel_size=8)) == 792_165  # 0.79 million


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_ranges(shape: tuple[int, int, int]) -> None:
    with seeded(new_key(0)):
        generator = inversion_generator(shape, latent=7, width=4)
        critic = wasserstein_critic(shape, width=4)
        classifier = soft_label_critic(shape, 5, width=4, kernels=3, kernel_size=2)
        images = generator(10 * torch.randn(6, 7))
    assert images.shape == (6, *shape)
    assert 0 <= images.min() < images.max() <= 1
    assert critic(images).shape == (6,)
    assert critic.features(images).shape == (6, 4 * (4 if shape[1] == 32 else 8) * 16)
    assert classifier(images).shape == (6, 5)
    assert classifier.features(images).shape == (6, 4 * 4 * 16)


def test_dcgan_shapes_and_ranges() -> None:
    with seeded(new_key(0)):
        generator, critic = dcgan_generator(3, latent=7, width=4), dcgan_critic(3, width=4)
        images = generator(torch.randn(6, 7))
    assert images.shape == (6, 3, 32, 32)
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert critic(images).shape == (6,)


def test_the_plan_of_the_generator() -> None:
    layers = list(inversion_generator((1, 32, 32)))  # type: ignore[call-overload]
    doubling = [m for m in layers if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in doubling] == [(256, 128), (128, 64), (64, 1)]
    assert [m.bias is None for m in doubling] == [True, True, False]
    large = [m for m in inversion_generator((3, 64, 64)) if isinstance(m, nn.ConvTranspose2d)]  # type: ignore[attr-defined]
    assert [(m.in_channels, m.out_channels) for m in large] == [(512, 256), (256, 128), (128, 64), (64, 3)]


def test_the_wasserstein_critic_judges_each_image_alone() -> None:
    critic = wasserstein_critic((1, 32, 32), width=4).double()
    images = draws(5, 1, 32, 32)
    alone = torch.cat([critic(image[None]) for image in images])
    torch.testing.assert_close(critic(images), alone)
    first = critic.features[0]
    assert isinstance(first, nn.Conv2d)
    kinds = [type(m).__name__ for m in critic.features]  # type: ignore[attr-defined]
    assert kinds == ["Conv2d", "LeakyReLU", *(2 * ["Conv2d", "InstanceNorm2d", "LeakyReLU"]), "Flatten"]


def test_dcgan_weights_have_spectral_norm_one_and_are_drawn_small() -> None:
    with seeded(new_key(0)):
        nets = (dcgan_generator(1, latent=8, width=4), dcgan_critic(1, width=4))
    for net in nets:
        for _ in range(100):  # each pass in train mode is one power iteration
            net(torch.zeros(2, 8) if net is nets[0] else torch.zeros(2, 1, 32, 32))
        for layer in (m for m in net.eval().modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)):
            drawn = layer.parametrizations.weight.original.detach()
            assert float(drawn.std()) == pytest.approx(0.02, rel=0.2)
            rows = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
            assert float(torch.linalg.matrix_norm(rows.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-3)


def test_minibatch_discrimination_by_hand() -> None:
    layer = MinibatchDiscrimination(3, 4, 2).double()
    x, a = draws(5, 3), layer.tensor.detach()
    wanted = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        for j in set(range(5)) - {i}:
            for b in range(4):
                wanted[i, b] += math.exp(-sum(abs(float((x[i] - x[j]) @ a[:, b, c])) for c in range(2)))
    found = layer(x)
    assert torch.equal(found[:, :3], x)
    torch.testing.assert_close(found[:, 3:], wanted)
    assert torch.allclose(layer(x[:1])[:, 3:], torch.zeros(1, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, draws(3, 3, seed=1).requires_grad_())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 64), (2, 32, 32)])
def test_other_sizes_are_refused(shape: tuple[int, int, int]) -> None:
    for make in (inversion_generator, wasserstein_critic, lambda s: soft_label_critic(s, 5)):
        with pytest.raises(ConfigError, match="32x32 or 64x64 in 1 or 3 channels"):
            make(shape)


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match="width is 0"):
        inversion_generator((1, 32, 32), width=0)
    with pytest.raises(ConfigError, match="latent is 0"):
        dcgan_generator(1, latent=0)
    with pytest.raises(ConfigError, match="num_classes is 1"):
        soft_label_critic((1, 32, 32), 1, width=2)
    with pytest.raises(ConfigError, match="kernels is 0"):
        soft_label_critic((1, 32, 32), 2, width=2, kernels=0)


# Wrappers


def test_generators_map_their_range_to_pixels_and_are_private() -> None:
    with seeded(new_key(0)):
        plain, wide = inversion_generator((1, 32, 32), latent=6, width=2), dcgan_generator(1, latent=6, width=2)
        z = torch.randn(4, 6)
        wide(z)
    ours, theirs = Generator.of(plain, 6), Generator.of(wide, 6, low=-1.0)
    assert torch.equal(ours(z), plain.eval()(z))
    torch.testing.assert_close(theirs(z), (wide.eval()(z) + 1) / 2)
    before = ours(z)
    assert ours(z).requires_grad is False
    for parameter in plain.parameters():
        parameter.data.zero_()
    plain.train()(z)
    assert torch.equal(ours(z), before)


def test_discriminators_read_pixels() -> None:
    with seeded(new_key(0)):
        net, pixels = dcgan_critic(1, width=2), torch.rand(4, 1, 32, 32)
        net(pixels)
    critic = Discriminator.of(net, low=-1.0)
    torch.testing.assert_close(critic(pixels), net.eval()(2 * pixels - 1))
    torch.testing.assert_close(critic.module.head(critic.features(pixels)).squeeze(1), critic(pixels))


@pytest.mark.parametrize("kind", ["inversion", "dcgan"])
def test_generator_and_critic_lift(kind: str) -> None:
    """One gradient in z for each latent vector, lifted as one by one."""
    with seeded(new_key(0)):
        if kind == "inversion":
            made, low = inversion_generator((1, 32, 32), latent=6, width=2), 0.0
            judge = wasserstein_critic((1, 32, 32), width=2)
        else:
            made, low = dcgan_generator(1, latent=6, width=2), -1.0
            judge = dcgan_critic(1, width=2)
    generator = Generator.of(made.double(), 6, low)
    critic = Discriminator.of(judge.double(), low)

    def loss(z: Tensor) -> Tensor:
        return critic(generator(z[None])).sum()

    z = draws(3, 6)
    lifted = vmap(grad(loss))(z)
    for one, slope in zip(z, lifted, strict=True):
        leaf = one.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(slope, alone, rtol=1e-9, atol=1e-12)
    assert lifted.abs().max() > 0


def test_the_soft_label_critic_lifts_over_batches() -> None:
    with seeded(new_key(0)):
        critic = Discriminator.of(soft_label_critic((1, 32, 32), 3, width=2, kernels=3, kernel_size=2).double())

    def loss(pixels: Tensor) -> Tensor:
        return surprise_of_real(critic(pixels))

    batches = draws(2, 4, 1, 32, 32)
    lifted = vmap(grad(loss))(batches)
    for batch, slope in zip(batches, lifted, strict=True):
        leaf = batch.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(slope, alone, rtol=1e-9, atol=1e-12)


# Losses


@pytest.mark.parametrize(("scale", "wanted"), [(1.0, 0.0), (2.0, 1.0), (0.5, 0.25)])
def test_penalty_of_a_linear_critic(scale: float, wanted: float) -> None:
    direction = draws(48)
    direction *= scale / direction.norm()
    found = gradient_penalty(lambda x: x.flatten(1) @ direction, draws(6, 3, 4, 4, seed=1))
    assert float(found) == pytest.approx(wanted, abs=1e-12)


def test_penalty_and_its_slope_by_hand() -> None:
    """D(x) = a |x|^2 has the gradient 2 a x, and the penalty the slope 4 |x| (2 a |x| - 1) / n in a."""
    x, a = draws(5, 1, 2, 2), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda y: a * y.flatten(1).square().sum(1), x)
    norms = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(penalty, (2 * a * norms - 1).square().mean())
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, (2 * (2 * 0.7 * norms - 1) * 2 * norms).mean())


def test_surprise_of_real() -> None:
    assert float(surprise_of_real(torch.zeros(7, 5, dtype=torch.float64))) == pytest.approx(math.log(1.2), abs=1e-12)
    logits = draws(6, 4)
    odds = logits.exp().sum(1)
    torch.testing.assert_close(log_odds_of_real(logits), odds.log())
    torch.testing.assert_close(surprise_of_real(logits), -(odds / (1 + odds)).log().mean())


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_soft_cross_entropy_of_uniform_logits(classes: int) -> None:
    even = torch.full((3, classes), 1 / classes, dtype=torch.float64)
    assert float(soft_cross_entropy(even, torch.zeros_like(even))) == pytest.approx(math.log(classes), abs=1e-12)


def test_soft_label_loss() -> None:
    wanted = torch.softmax(draws(4, 5), 1)
    labelled, unlabelled, generated = (draws(4, 5, seed=seed) for seed in (1, 2, 3))

    def share(logits: Tensor) -> Tensor:
        return logits.exp().sum(1) / (1 + logits.exp().sum(1))

    by_hand = -(wanted * torch.softmax(labelled, 1).log()).sum(1).mean()
    by_hand += -(share(unlabelled).log().mean() + (1 - share(generated)).log().mean()) / 2
    loss = soft_label_loss(wanted, labelled, unlabelled, generated)
    torch.testing.assert_close(loss, by_hand)
    assert abs(float(loss - soft_label_loss(wanted, labelled, generated, unlabelled))) > 1e-3
    # A constant on all logits moves how real all images look, but not what class they are of.
    shifted = soft_label_loss(wanted, labelled + 3, unlabelled + 3, generated + 3)
    assert abs(float(loss - shifted)) > 1e-3
    torch.testing.assert_close(soft_label_loss(wanted, labelled + 3, unlabelled, generated), loss)
    torch.testing.assert_close(soft_cross_entropy(wanted, labelled + 3), soft_cross_entropy(wanted, labelled))


def test_total_entropy_is_a_sum() -> None:
    assert float(total_entropy(torch.zeros(7, 5, dtype=torch.float64))) == pytest.approx(7 * math.log(5))
    logits = draws(3, 4)
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(total_entropy(logits), -(p * p.log()).sum())
    torch.testing.assert_close(total_entropy(torch.cat([logits, logits])), 2 * total_entropy(logits))


def test_feature_gap_and_real_or_not() -> None:
    a, b = draws(4, 3), draws(5, 3, seed=1)
    wanted = sum(abs(float(a[:, j].mean() - b[:, j].mean())) for j in range(3)) / 3
    assert float(feature_gap(a, b)) == pytest.approx(wanted)
    odds = draws(6)
    torch.testing.assert_close(real_or_not(odds, True), -torch.sigmoid(odds).log().mean())
    torch.testing.assert_close(real_or_not(odds, False), -(1 - torch.sigmoid(odds)).log().mean())
