"""What the tests share: one torch thread, the folder of real data, and tiny problems in float64."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keyhole.core.defense import Context, Defense, chain
from keyhole.core.keys import fold_in, new_key, split, uniform
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.task import Bounds, Task, fit_weights, weights_of
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.trial import Spec, Trial
from keyhole.core.types import Batch, Observation, Tensors, Weights
from keyhole.solve.lift import Shared, lift, stack

torch.set_num_threads(1)

_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
if _DATA.is_dir():
    os.environ.setdefault("KEYHOLE_DATA", str(_DATA))
# What is printed must not hang on the terminal.
os.environ["COLUMNS"] = "80"
for _name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
    os.environ.pop(_name, None)

SHAPE, CLASSES = (1, 8, 8), 4


def pytest_runtest_setup() -> None:
    """Global generators stand where they stood for every other test, whichever of them run, and in whatever order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def draw_weights(task: Task, seed: int, dtype: torch.dtype = torch.float64) -> Weights:
    """Every parameter and running mean uniform in (-0.5, 0.5), running variances in (0.5, 1.5), all from keys.

    Dropout masks are left out: a task adds them to what it calls its model with.
    """
    key = fold_in(new_key(seed), "test weights")
    masks = {f"{name}.mask" for name, *_ in task.drops}

    def draw(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like
        low = 0.5 if name.endswith("running_var") else -0.5
        return low + uniform(fold_in(key, name), tuple(like.shape), dtype)

    plain = weights_of(task.model, dtype)
    return Weights(*({name: draw(name, t) for name, t in part.items() if name not in masks} for part in plain))


@dataclass(frozen=True)
class Bench:
    """A task, its weights, and secrets for it."""

    task: Task
    weights: Weights

    def batch(self, size: int = 1, seed: int = 0) -> Batch:
        """Random images with classes in ascending order, equal shares."""
        key = fold_in(new_key(seed), "test batch")
        pixels = uniform(fold_in(key, "pixels"), (size, *SHAPE), torch.float64)
        classes = (torch.arange(size) + seed) % CLASSES
        targets = torch.eye(CLASSES, dtype=torch.float64)[classes.sort().values]
        return Batch(
            self.task.bounds.from_pixels(pixels), targets, torch.full((size,), 1.0 / size, dtype=torch.float64)
        )

    def under(self, defense: Defense) -> Bench:
        """The same problem with the model as a defense changes it."""
        task = defense.on_task(self.task)
        return replace(self, task=task, weights=fit_weights(task, self.weights))

    @property
    def public(self) -> Batch:
        """Eight public images, two of each class."""
        return self.batch(2 * CLASSES, seed=977)

    def secrets(self, trials: int, size: int = 1, rounds: int = 1) -> tuple[Batch, ...]:
        """Batches of several trials with a leading trial axis, one for each round."""
        return tuple(
            stack([self.batch(size, 100 * turn + i) for i in range(trials)], Shared()) for turn in range(rounds)
        )

    def see(
        self,
        secrets: tuple[Batch, ...],
        threat: ThreatModel,
        defense: Defense | None = None,
        seed: int = 0,
        weights: tuple[Weights, ...] | None = None,
    ) -> tuple[Observation, ...]:
        """`observe`, lifted; the weights are shared by all trials."""
        defense = defense or chain()
        keys = split(fold_in(new_key(seed), "test client"), secrets[0].inputs.shape[0])
        received, public = weights or self.weights, self.public
        shared = Shared(received)
        return lift(lambda b, k: observe(self.task, threat, defense, received, b, k, public), shared)(secrets, keys)


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, CLASSES))


def _conv_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, CLASSES)
    )


def _conv_drop() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128, CLASSES),
    )


def _conv_all() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(128, CLASSES),
    )


def _wide_norm() -> nn.Module:
    """Batch statistics of one image are 192 numbers of 64 pixels."""
    return nn.Sequential(nn.Conv2d(1, 96, 7), nn.BatchNorm2d(96), nn.Sigmoid(), nn.Flatten(), nn.Linear(384, CLASSES))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, CLASSES))


MODELS = {
    "conv": _conv,
    "mlp": _mlp,
    "conv_norm": _conv_norm,
    "conv_drop": _conv_drop,
    "conv_all": _conv_all,
    "wide_norm": _wide_norm,
}
BOUNDS = Bounds.of((0.4,), (0.3,), torch.float64)


@lru_cache
def _bench(model: str, batchnorm: str | None, dropout: str | None, seed: int) -> Bench:
    task = Task.of(MODELS[model]().double(), SHAPE, CLASSES, BOUNDS, batchnorm=batchnorm, dropout=dropout)
    return Bench(task, draw_weights(task, seed))


@pytest.fixture(scope="session")
def make_bench() -> Callable[..., Bench]:
    """Makes a `Bench` of one of `MODELS`, with BatchNorm and dropout as asked."""

    def make(model: str = "conv", batchnorm: str | None = None, dropout: str | None = None, seed: int = 0) -> Bench:
        return _bench(model, batchnorm, dropout, seed)

    return make


@pytest.fixture(scope="session")
def bench() -> Bench:
    """A sigmoid network of 596 parameters on 1 x 8 x 8 images with 4 classes, which gradient inversion solves."""
    return _bench("conv", None, None, 0)


@pytest.fixture(scope="session")
def norm_bench() -> Bench:
    """The same with BatchNorm in eval mode and running statistics that matter."""
    return _bench("conv_norm", "eval", None, 1)


@pytest.fixture
def make_setup() -> Callable[..., Any]:
    """Makes a `Setup` of random images that belongs to the test alone, which may destroy it."""
    from keyhole.experiment.setup import Setup
    from keyhole.zoo.datasets import Data, Pool

    def make(
        dtype: torch.dtype = torch.float64,
        model: str = "conv",
        batchnorm: str | None = None,
        dropout: str | None = None,
        networks: int = 1,
    ) -> Setup:
        bounds = Bounds.of((0.4,), (0.3,), dtype)
        task = Task.of(MODELS[model]().to(dtype), SHAPE, CLASSES, bounds, batchnorm=batchnorm, dropout=dropout)

        def pool(name: str, count: int) -> Pool:
            images = uniform(fold_in(new_key(5), name), (count, *SHAPE), torch.float32)
            return Pool(images.to(dtype), torch.arange(count) % CLASSES, tuple(range(count)))

        pools = {"target": pool("target", 8), "tune": pool("tune", 4), "public": pool("public", 6)}
        empty = {"candidates": pool("none", 0), "train": pool("none", 0)}
        data = Data("test", **pools, **empty, num_classes=CLASSES, mean=(0.4,), std=(0.3,), digest="0")
        weights = {0: tuple(draw_weights(task, 7 * number, dtype) for number in range(networks))}
        return Setup(data, task, weights, "test#0", {0: "untrained#0"}, {0: {}}, "0", dtype, torch.device("cpu"))

    return make


class Dropping(Defense):
    """Sends nothing."""

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        return {name: torch.zeros_like(value) for name, value in update.items()}


@pytest.fixture
def dropping() -> Iterator[None]:
    """A defense of this name is registered for one test: its clients send nothing."""
    DEFENSES.add(name="dropping", paper="test", arxiv="0000.00000")(Dropping)
    yield
    DEFENSES._cards.pop("dropping")


@pytest.fixture
def make_trial() -> Callable[..., Trial]:
    """Makes a `Trial` for `make_setup`'s setups."""

    def make(
        attack: str = "idlg",
        options: dict[str, Any] | None = None,
        episode: tuple[int, ...] = (0,),
        defense: tuple[tuple[str, dict[str, Any]], ...] = (),
        **fields: Any,
    ) -> Trial:
        specs = tuple(Spec.of(name, given, DEFENSES.card(name).version) for name, given in defense)
        given: dict[str, Any] = {
            "source": "test#0",
            "model": "test",
            "state": "untrained#0",
            "rule": Spec.of("gradient"),
            "belief": Spec.of("exact"),
            "sees": ("update", "weights"),
            "defense": specs,
            "attack": Spec.of(attack, options, ATTACKS.card(attack).version),
            "attacker": "naive",
            "episode": episode,
            "batch_size": 1,
            "seed": 0,
            "dtype": "float64",
            **fields,
        }
        return Trial(**given)

    return make
