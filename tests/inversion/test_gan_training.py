"""Training GANs: resumed bit for bit, found again, and refused with a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gan_cases import DC, PUBLIC, SOFT, TRAININGS, WGAN, Steps, dcgan, soft, the_file, wgan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from keyhole.core.keys import new_key, normal, uniform
from keyhole.core.told import silent
from keyhole.errors import ConfigError, DataError, ModelError, StoreError
from keyhole.inversion import gan_training
from keyhole.inversion.dcgan import DCGANSettings
from keyhole.inversion.gan_training import Draws
from keyhole.inversion.soft_label_gan import SoftLabelSettings
from keyhole.inversion.wgan_gp import WassersteinSettings

# What comes out


def test_each_pass_over_the_images_has_an_order_of_its_own() -> None:
    draws = Draws(PUBLIC, 4, 3, new_key(0))
    passes = [[i for step in (2 * n, 2 * n + 1) for i in draws.which("real", step).tolist()] for n in range(3)]
    assert all(len(set(seen)) == 8 for seen in passes)  # the incomplete batch of three is left out
    assert len({tuple(seen) for seen in passes}) == 3
    assert draws.which("real", 0).tolist() == passes[0][:4]


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
    monkeypatch.setattr(gan_training, "CHECKPOINT_STEPS", 2)
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
    monkeypatch.setattr(gan_training, "CHECKPOINT_SECONDS", 0.0)
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
        monkeypatch.setattr(gan_training, "GAN_VERSION", 99)
    if what == "kind":
        wgan(tmp_path)
    else:
        assert not soft(tmp_path, **CHANGES.get(what, {"begin": first} if what == "begin" else {})).facts.cached
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


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
