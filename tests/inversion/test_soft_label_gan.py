"""A GAN that learns what a target says: its losses by hand, what it asks the target, and where it begins."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gan_cases import PUBLIC, SOFT, soft, target, wgan
from torch import Tensor

from keyhole.core.keys import new_key
from keyhole.errors import ConfigError, ModelError
from keyhole.inversion.soft_label_gan import _SoftLabel


def test_the_soft_label_losses_are_those_of_three_batches_apart() -> None:
    game = _SoftLabel(PUBLIC, target, 3, SOFT, new_key(0), None)
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


def test_a_warm_start_begins_with_the_other_networks(tmp_path: Path) -> None:
    first = soft(tmp_path)
    still = soft(tmp_path, begin=first, settings=replace(SOFT, steps=1, lr=1e-30))
    for name, tensor in first.generator.module.named_parameters():
        torch.testing.assert_close(still.generator.module.get_parameter(name), tensor)
    for other in (wgan(tmp_path), soft(tmp_path, settings=replace(SOFT, width=3))):
        with pytest.raises(ConfigError, match="begin with has other networks"):
            soft(tmp_path, begin=other)


def test_a_target_must_give_logits_of_the_classes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives \(11, 3\) for 11 images; finite logits of 4 classes"):
        soft(tmp_path, num_classes=4)
    with pytest.raises(ModelError, match="finite logits"):
        soft(tmp_path, target_logits=lambda pixels: target(pixels) * torch.nan)
