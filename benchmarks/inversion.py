"""Model inversion: what its parts cost.

    python benchmarks/inversion.py [--part gan|search] [--json FILE]

``gan``: steps of the discriminator, with the generator's share of a step, in Keyhole's training and in the loop as one
would write it first (a pass for each batch, gradients to every weight that asks for one, the target asked in each step,
Adam parameter by parameter). Both take turns, block by block; a ratio is that of the medians.

``search``: steps that GMI takes per second of one core, with all classes and searches lifted together, against the loop
as one would write it first: one class and one search after the other. Networks are untrained, which costs the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.core.keys import new_key, uniform
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.federation.norms import evaluating
from keyhole.inversion import gan, gan_training, soft_label_gan, wgan_gp
from keyhole.inversion.gmi import GMI
from keyhole.inversion.soft_label_gan import SoftLabelSettings
from keyhole.inversion.wgan_gp import WassersteinSettings
from keyhole.solve.invert import invert
from keyhole.solve.threads import one_thread
from keyhole.zoo.models import build_model

CLASSES = 5
PUBLIC = uniform(new_key(0), (512, 1, 32, 32))


class Plain:
    """The loop as one would write it first, on copies of the same networks."""

    def __init__(self, game: Any, target: nn.Module | None) -> None:
        self.g, self.d = copy.deepcopy(game.generator), copy.deepcopy(game.discriminator)
        self.settings, self.target = game.settings, target
        self.adams = [
            torch.optim.Adam(net.parameters(), lr=game.settings.lr, betas=(0.5, 0.999)) for net in (self.g, self.d)
        ]

    def images(self) -> Tensor:
        """A batch of public images."""
        return PUBLIC[torch.randperm(len(PUBLIC))[: self.settings.batch]]

    def z(self) -> Tensor:
        """Latent vectors."""
        return torch.randn(self.settings.batch, self.settings.latent)

    def against(self) -> Tensor:
        """The discriminator's loss."""
        real, fake = self.images(), self.g(self.z()).detach()
        if self.target is None:
            between = (real + torch.rand(len(real), 1, 1, 1) * (fake - real)).requires_grad_()
            (slope,) = torch.autograd.grad(self.d(between).sum(), between, create_graph=True)
            penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
            return self.d(fake).mean() - self.d(real).mean() + self.settings.penalty * penalty
        with torch.no_grad():
            wanted = torch.softmax(self.target(real), 1)
        own = -(wanted * torch.log_softmax(self.d(real), 1)).sum(1).mean()
        unlabelled, generated = (torch.logsumexp(self.d(images), 1) for images in (self.images(), fake))
        odds = F.softplus(unlabelled).mean() - unlabelled.mean() + F.softplus(generated).mean()
        return own + odds / 2

    def fool(self) -> Tensor:
        """The generator's loss."""
        fake = self.g(self.z())
        if self.target is None:
            return -self.d(fake).mean()
        gap = (self.d.features(fake).mean(0) - self.d.features(self.images()).mean(0)).abs().mean()
        spread = torch.log_softmax(self.d(fake), 1)
        return gap - self.settings.entropy * (spread.exp() * spread).sum()

    def step(self, number: int) -> None:
        """One step of the discriminator, and of the generator where it is due."""
        for net, adam, loss in ((self.d, self.adams[1], self.against), (self.g, self.adams[0], self.fool)):
            if net is self.g and (number + 1) % self.settings.critic:
                continue
            adam.zero_grad()
            loss().backward()
            adam.step()


def ours(game: Any) -> Callable[[int], None]:
    """A step of Keyhole's training, without its files."""
    game.generator.train()
    game.discriminator.train()
    training = gan_training._Training(game)

    def step(number: int) -> None:
        training._descend("discriminator", game.against(number))
        if (number + 1) % game.settings.critic == 0:
            training._descend("generator", game.fool(number))

    return step


def turns(one: Callable[[int], None], other: Callable[[int], None], blocks: int, length: int) -> tuple[float, float]:
    """Median seconds of a step of each."""
    took: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks + 1):
        for step, times in zip((one, other), took, strict=True):
            before = time.perf_counter()
            for number in range(block * length, (block + 1) * length):
                step(number)
            times.append((time.perf_counter() - before) / length)
    # The first block of each warms up.
    return statistics.median(took[0][1:]), statistics.median(took[1][1:])


def part_gan(blocks: int) -> list[dict[str, Any]]:
    """Both trainings at the sizes of the smoke, lean and reference settings."""
    target = build_model("mcnn", input_shape=(1, 32, 32), num_classes=CLASSES, options={}, seed=0).eval()
    cases = [
        ("wgan_gp smoke", WassersteinSettings.smoke()),
        ("wgan_gp lean", WassersteinSettings.lean()),
        ("wgan_gp reference", WassersteinSettings()),
        ("soft_label lean", SoftLabelSettings.lean()),
        ("soft_label reference", SoftLabelSettings()),
    ]
    rows = []
    for name, settings in cases:
        game: Any
        if isinstance(settings, WassersteinSettings):
            game = wgan_gp._Wasserstein(PUBLIC, settings, new_key(0))
        else:
            game = soft_label_gan._SoftLabel(PUBLIC, target, CLASSES, settings, new_key(0), None)
            game.labels()
        plain = Plain(game, None if isinstance(settings, WassersteinSettings) else target)
        fast, slow = turns(ours(game), plain.step, blocks, settings.critic)
        rows.append({"case": name, "steps_per_second": 1 / fast, "plain": 1 / slow, "ratio": slow / fast})
        print(f"{name:22} {1 / fast:8.2f} steps/s   plain loop {1 / slow:8.2f}   ratio {slow / fast:5.2f}", flush=True)
    return rows


def part_search(blocks: int) -> list[dict[str, Any]]:
    """GMI at the sizes of the smoke and lean settings."""
    rows = []
    for name, settings, width, samples in (
        ("gmi smoke", WassersteinSettings.smoke(), 32, 6),
        ("gmi lean", WassersteinSettings.lean(), 64, 5),
    ):
        model = build_model("mcnn", input_shape=(1, 32, 32), num_classes=CLASSES, options={"width": width}, seed=0)
        bounds = Bounds.of((0.0,), (1.0,))
        task = evaluating(Task.of(model, (1, 32, 32), CLASSES, bounds, batchnorm="eval"))
        game = wgan_gp._Wasserstein(PUBLIC, settings, new_key(0))
        prior = gan.GAN(
            gan.Generator.of(game.generator, settings.latent),
            gan.Discriminator.of(game.discriminator),
            gan.Facts(0, (), 0.0, False),
        )
        steps = 5
        method = GMI(steps=steps)
        weights = weights_of(model)

        def lifted(number: int, method: GMI = method, task: Task = task, weights: Any = weights, n: int = samples,
                   prior: Any = prior) -> None:  # fmt: skip
            invert(method, task, [weights], prior, PUBLIC, n, [new_key(number)])

        plain_model = model.eval().requires_grad_(False)

        def plain(number: int, n: int = samples, net: nn.Module = plain_model, prior: Any = prior,
                  steps: int = steps) -> None:  # fmt: skip
            for label in range(CLASSES):
                for _ in range(n):
                    one_by_one(net, prior, label, steps)

        fast, slow = turns(lifted, plain, blocks, 1)
        made = CLASSES * samples
        row = {"case": name, "images": made, "steps_per_second": steps * made / fast, "plain": steps * made / slow}
        rows.append({**row, "ratio": slow / fast})
        print(
            f"{name:22} {steps * made / fast:8.1f} image steps/s   one at a time {steps * made / slow:8.1f}   "
            f"ratio {slow / fast:5.2f}",
            flush=True,
        )
    return rows


def one_by_one(net: nn.Module, prior: Any, label: int, steps: int) -> Tensor:
    """One search for one class, as one would write it first."""
    z = torch.randn(1, prior.generator.latent)
    velocity = torch.zeros_like(z)
    for _ in range(steps):
        z.requires_grad_(True)
        image = prior.generator(z)
        loss = -prior.discriminator(image).mean() + 100.0 * F.cross_entropy(net(image), torch.tensor([label]))
        (slope,) = torch.autograd.grad(loss, z)
        before, velocity = velocity, 0.9 * velocity - 2e-3 * slope
        z = (z.detach() - 0.9 * before + 1.9 * velocity).clamp(-1.0, 1.0)
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["gan", "search"], help="by default both")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of five steps of each loop")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with one_thread(torch.device("cpu")):
        parts = {"gan": part_gan, "search": part_search}
        rows = [row for name in ([given.part] if given.part else parts) for row in parts[name](given.blocks)]
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
