"""A Wasserstein GAN's steps by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gan_cases import PUBLIC, WGAN, wgan
from torch import Tensor, nn

from keyhole.core.keys import advance, fold_in, new_key, normal, permutation, uniform
from keyhole.inversion.wgan_gp import _Wasserstein


def test_a_wasserstein_step_by_hand(tmp_path: Path) -> None:
    """Two steps of the discriminator and one of the generator, with Adam written out and no pass shared."""
    settings = replace(WGAN, steps=2, critic=2)
    key = new_key(0)
    game = _Wasserstein(PUBLIC, settings, key)
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
