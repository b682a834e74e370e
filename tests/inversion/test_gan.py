"""Training GANs: steps by hand, resumed bit for bit, found again, and refused with a sentence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keyhole.core.keys import advance, fold_in, new_key, normal, permutation, uniform
from keyhole.core.told import silent
from keyhole.errors import ConfigError, DataError, ModelError, StoreError
from keyhole.inversion import gan
from keyhole.inversion.gan import (
    GAN,
    DCGANSettings,
    SoftLabelSettings,
    WassersteinSettings,
    train_dcgan,
    train_soft_label_gan,
    train_wgan_gp,
)

torch.set_num_threads(1)

PUBLIC = uniform(new_key(9), (11, 1, 32, 32))
SMALL = {"batch": 4, "latent": 3, "width": 2}
WGAN = WassersteinSettings(steps=10, lr=1e-3, **SMALL)
SOFT = SoftLabelSettings(steps=10, lr=1e-3, kernels=3, kernel_size=2, **SMALL)
DC = DCGANSettings(steps=4, lr=1e-3, **SMALL)
TARGET = normal(new_key(8), (1024, 3)) / 8


def target(pixels: Tensor) -> Tensor:
    return pixels.flatten(1) @ TARGET


def wgan(folder: Path, **changed: Any) -> GAN:
    return train_wgan_gp(**{"public": PUBLIC, "settings": WGAN, "key": new_key(0), "folder": folder, **changed})


def soft(folder: Path, **changed: Any) -> GAN:
    given: dict[str, Any] = {
        "public": PUBLIC, "target_logits": target, "target_digest": "a", "num_classes": 3, "settings": SOFT,
        "key": new_key(0), "folder": folder,
    }  # fmt: skip
    return train_soft_label_gan(**{**given, **changed})


def dcgan(folder: Path, **changed: Any) -> GAN:
    return train_dcgan(**{"public": PUBLIC, "settings": DC, "key": new_key(0), "folder": folder, **changed})


TRAININGS: dict[str, Callable[..., GAN]] = {"wgan": wgan, "soft": soft, "dcgan": dcgan}


class Steps:
    """Counts the steps that were trained, and may interrupt."""

    def __init__(self, stop: int | None = None) -> None:
        self.fractions: list[float] = []
        self.stop = stop

    def __call__(self, what: str, fraction: float) -> None:
        self.fractions.append(fraction)
        if len(self.fractions) == self.stop:
            raise KeyboardInterrupt


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


# The maths


def test_a_wasserstein_step_by_hand(tmp_path: Path) -> None:
    """Two steps of the discriminator and one of the generator, with Adam written out and no pass shared."""
    settings = replace(WGAN, steps=2, critic=2)
    key = new_key(0)
    game = gan._Wasserstein(PUBLIC, settings, key)
    g, d = copy.deepcopy(game.generator).train(), copy.deepcopy(game.discriminator).train()
    memory: dict[nn.Parameter, tuple[Tensor, Tensor, int]] = {}

    def adam(net: nn.Module, loss: Tensor) -> None:
        parameters = list(net.parameters())
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
        with torch.no_grad():
            for p, slope in zip(parameters, slopes, strict=True):
                m, v, t = memory.get(p, (torch.zeros_like(p), torch.zeros_like(p), 0))
                m, v, t = 0.5 * m + 0.5 * slope, 0.999 * v + 0.001 * slope**2, t + 1
                memory[p] = (m, v, t)
                p -= 1e-3 * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    order = permutation(fold_in(key, "real"), 11)
    for step in range(2):
        real = PUBLIC[order[4 * step : 4 * step + 4]]
        fake = g(normal(advance(fold_in(key, "z"), step), (4, 3))).detach()
        along = uniform(advance(fold_in(key, "along"), step), (4, 1, 1, 1))
        between = (real + along * (fake - real)).requires_grad_()
        (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
        loss_d = d(fake).mean() - d(real).mean() + 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        adam(d, loss_d)
    loss_g = -d(g(normal(advance(fold_in(key, "z of the generator"), 1), (4, 3)))).mean()
    adam(g, loss_g)
    made = wgan(tmp_path, settings=settings)
    assert made.facts.losses == ((pytest.approx(loss_d.item(), rel=1e-4), pytest.approx(loss_g.item(), rel=1e-4)),)
    for ours, theirs in ((made.generator.module, g), (made.discriminator.module, d)):
        for name, tensor in theirs.state_dict().items():
            if name in ("features.2.bias", "features.5.bias"):
                continue  # instance normalisation takes them away again, so that their gradients are rounding errors
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=2e-5)


def test_the_soft_label_losses_are_those_of_three_batches_apart() -> None:
    game = gan._SoftLabel(PUBLIC, target, 3, SOFT, new_key(0), None)
    d, draws = game.discriminator, game.draws
    batches = {name: draws.which(name, 0).tolist() for name in ("labelled", "unlabelled")}
    assert batches["labelled"] != batches["unlabelled"]
    fake = copy.deepcopy(game.generator)(draws.z("z", 0)).detach()
    x, u = PUBLIC[batches["labelled"]], PUBLIC[batches["unlabelled"]]
    p, q = torch.softmax(target(x), 1), torch.log_softmax(d(x), 1)
    s = [torch.logsumexp(d(images), 1) for images in (u, fake)]
    soft_plus = torch.nn.functional.softplus
    wanted = -(p * q).sum(1).mean() + 0.5 * (soft_plus(s[0]).mean() - s[0].mean() + soft_plus(s[1]).mean())
    torch.testing.assert_close(game.against(0), wanted)
    fake = copy.deepcopy(game.generator)(draws.z("z of the generator", 0))
    other = PUBLIC[draws.which("unlabelled for the generator", 0)]
    gap = (d.features(fake).mean(0) - d.features(other).mean(0)).abs().mean()
    spread = torch.softmax(d(fake), 1)
    torch.testing.assert_close(game.fool(0), gap - 1e-4 * (spread * spread.log()).sum())


def test_each_pass_over_the_images_has_an_order_of_its_own() -> None:
    draws = gan._Draws(PUBLIC, 4, 3, new_key(0))
    passes = [[i for step in (2 * n, 2 * n + 1) for i in draws.which("real", step).tolist()] for n in range(3)]
    assert all(len(set(seen)) == 8 for seen in passes)  # the incomplete batch of three is left out
    assert len({tuple(seen) for seen in passes}) == 3
    assert draws.which("real", 0).tolist() == passes[0][:4]


def test_the_target_is_asked_once_for_each_image(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(pixels: Tensor) -> Tensor:
        asked.append(len(pixels))
        assert not torch.is_grad_enabled()
        return target(pixels)

    soft(tmp_path, target_logits=counting)
    assert sum(asked) == len(PUBLIC)
    soft(tmp_path, target_logits=counting)
    assert sum(asked) == len(PUBLIC)  # found, so it was not asked again


@pytest.mark.parametrize("kind", TRAININGS)
def test_training_changes_both_networks_and_gives_pixels(tmp_path: Path, kind: str) -> None:
    steps = Steps()
    made = TRAININGS[kind](tmp_path, told=steps)
    count = made.facts.steps
    assert steps.fractions == [i / count for i in range(1, count + 1)]
    assert len(made.facts.losses) == count // (1 if kind == "dcgan" else 5)
    assert made.facts.seconds > 0 and not made.facts.cached
    fresh = TRAININGS[kind](tmp_path, settings=replace({"wgan": WGAN, "soft": SOFT, "dcgan": DC}[kind], lr=1e-30))
    for ours, theirs in ((made.generator, fresh.generator), (made.discriminator, fresh.discriminator)):
        for name, tensor in ours.module.named_parameters():
            # A constant on all numbers does not change what a Wasserstein critic says of real against generated.
            idle = kind == "wgan" and name == "head.bias"
            assert torch.equal(tensor, theirs.module.get_parameter(name)) == idle, name
        assert not ours.module.training and not any(p.requires_grad for p in ours.module.parameters())
    pixels = made.generator(normal(new_key(1), (5, 3)))
    assert pixels.shape == (5, 1, 32, 32) and 0 <= pixels.min() < pixels.max() <= 1
    assert made.discriminator(pixels).shape == ((5, 3) if kind == "soft" else (5,))


def test_settings_of_the_papers_code_and_lean_ones() -> None:
    assert asdict(WassersteinSettings()) == {
        "steps": 53_500, "batch": 64, "lr": 2e-4, "latent": 100, "width": 64, "critic": 5, "penalty": 10.0
    }  # fmt: skip
    assert WassersteinSettings().steps == 100 * (34_265 // 64)
    soft_label, dc = SoftLabelSettings(), DCGANSettings()
    assert (soft_label.kernels, soft_label.kernel_size, soft_label.entropy) == (64, 50, 1e-4)
    assert (dc.latent, dc.critic, dc.noise) == (50, 1, 0.1)
    assert (SoftLabelSettings.lean().kernels, DCGANSettings.lean().width) == (32, 16)
    assert WassersteinSettings.lean().steps // WassersteinSettings.lean().critic == 2000
    assert WassersteinSettings.smoke().batch == 32


# The cache


@pytest.mark.parametrize("kind", TRAININGS)
def test_an_interrupted_training_goes_on_to_the_same_bits(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TRAININGS[kind](tmp_path / "whole")
    monkeypatch.setattr(gan, "CHECKPOINT_STEPS", 2)
    broken, rest = tmp_path / "broken", Steps()
    with pytest.raises(KeyboardInterrupt):
        TRAININGS[kind](broken, told=Steps(stop=3))
    resumed = TRAININGS[kind](broken, told=rest)
    assert len(rest.fractions) == whole.facts.steps - 2
    assert resumed.digest() == whole.digest()
    assert resumed.facts.losses == whole.facts.losses
    assert not resumed.facts.cached


@pytest.mark.parametrize("kind", TRAININGS)
def test_what_was_trained_is_found_again(tmp_path: Path, kind: str) -> None:
    first, again = TRAININGS[kind](tmp_path), Steps()
    found = TRAININGS[kind](tmp_path, told=again)
    assert again.fractions == []
    assert found.digest() == first.digest()
    assert found.facts == replace(first.facts, cached=True)
    assert the_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert not any("exp_avg" in name for name in load_file(the_file(tmp_path)))


def test_a_training_takes_little_time_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        wgan(tmp_path, told=Steps(stop=3))
    rest = Steps()
    wgan(tmp_path, told=rest)
    assert len(rest.fractions) == 7


CHANGES: dict[str, Any] = {
    "images": {"public": PUBLIC.flip(0)},
    "key": {"key": new_key(1)},
    "target": {"target_digest": "b"},
    "settings": {"settings": replace(SOFT, lr=2e-3)},
    "entropy": {"settings": replace(SOFT, entropy=2e-4)},
}


@pytest.mark.parametrize("what", [*CHANGES, "begin", "version", "kind"])
def test_whatever_changes_the_training_is_part_of_the_name(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = soft(tmp_path)
    if what == "version":
        monkeypatch.setattr(gan, "GAN_VERSION", 99)
    if what == "kind":
        wgan(tmp_path)
    else:
        assert not soft(tmp_path, **CHANGES.get(what, {"begin": first} if what == "begin" else {})).facts.cached
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_warm_start_begins_with_the_other_networks(tmp_path: Path) -> None:
    first = soft(tmp_path)
    still = soft(tmp_path, begin=first, settings=replace(SOFT, steps=1, lr=1e-30))
    for name, tensor in first.generator.module.named_parameters():
        torch.testing.assert_close(still.generator.module.get_parameter(name), tensor)
    for other in (wgan(tmp_path), soft(tmp_path, settings=replace(SOFT, width=3))):
        with pytest.raises(ConfigError, match="begin with has other networks"):
            soft(tmp_path, begin=other)


@pytest.mark.parametrize(
    "how", ["cut off", "one bit", "no account", "too many steps", "a tensor is missing", "NaN", "a wrong shape"]
)
def test_a_damaged_file_is_trained_anew_with_a_warning(tmp_path: Path, how: str) -> None:
    wanted = dcgan(tmp_path)
    path = the_file(tmp_path)
    data = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(str(path), framework="pt") as file:
        account = file.metadata()
    bias = next(name for name in tensors if name.endswith(".bias"))
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "one bit":
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    elif how == "no account":
        save_file(tensors, path)
    elif how == "too many steps":
        save_file(tensors, path, {"account": account["account"].replace('"step": 4', '"step": 5')})
    elif how == "a tensor is missing":
        del tensors[bias]
        save_file(tensors, path, account)
    elif how == "NaN":
        save_file({**tensors, bias: tensors[bias] * torch.nan}, path, account)
    else:
        save_file({**tensors, bias: tensors[bias][:-1]}, path, account)
    with pytest.warns(UserWarning, match="is damaged .*; the GAN is trained anew"):
        again = dcgan(tmp_path)
    assert again.digest() == wanted.digest() and not again.facts.cached
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dcgan(tmp_path).facts.cached


# Requests that cannot be met


@pytest.mark.parametrize(
    ("public", "said"),
    [
        (PUBLIC[:0], "needs public images"),
        (PUBLIC[0], "needs public images"),
        (PUBLIC[:3], "3 public images, fewer than one batch of 4"),
        (PUBLIC[..., :28, :28], "1x28x28; a GAN needs 32x32"),
        (PUBLIC.repeat(1, 2, 1, 1), "2x32x32"),
        (PUBLIC * 2 - 0.5, r"pixels in \[0, 1\]"),
        (PUBLIC * torch.nan, r"pixels in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("kind", TRAININGS)
def test_images_that_no_gan_can_be_trained_on(tmp_path: Path, kind: str, public: Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        TRAININGS[kind](tmp_path, public=public)
    assert not list(tmp_path.iterdir())


def test_a_dcgan_makes_small_images_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1x64x64; a GAN needs 32x32, 1 or 3"):
        dcgan(tmp_path, public=uniform(new_key(0), (4, 1, 64, 64)))
    large = wgan(tmp_path, public=uniform(new_key(0), (4, 3, 64, 64)), settings=replace(WGAN, steps=1))
    assert large.generator(torch.zeros(2, 3)).shape == (2, 3, 64, 64)


def test_images_in_other_types_are_the_same_images(tmp_path: Path) -> None:
    wgan(tmp_path)
    assert wgan(tmp_path, public=PUBLIC.double()).facts.cached


def test_a_target_must_give_logits_of_the_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives \(11, 3\) for 11 images; finite logits of 4 classes"):
        soft(tmp_path, num_classes=4)
    with pytest.raises(ModelError, match="finite logits"):
        soft(tmp_path, target_logits=lambda pixels: target(pixels) * torch.nan)


def test_a_training_that_diverges_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the GAN diverged at step 5; lower"):
        wgan(tmp_path, settings=replace(WGAN, lr=1e30))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="set KEYHOLE_CACHE"):
        wgan(tmp_path / "file", told=silent)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WassersteinSettings(steps=0), "steps is 0"),
        (lambda: WassersteinSettings(batch=1), "batch is 1"),
        (lambda: WassersteinSettings(penalty=-1), "penalty is -1"),
        (lambda: SoftLabelSettings(lr=0), "lr is 0; it must be above 0"),
        (lambda: SoftLabelSettings(kernels=0), "kernels is 0"),
        (lambda: DCGANSettings(noise=-0.1), "noise is -0.1"),
        (lambda: DCGANSettings(critic=0), "critic is 0"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
