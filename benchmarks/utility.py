"""What a defense costs: test accuracy on held-out digits after federated training with and without it.

    python benchmarks/utility.py "obscuring refresh=5" "clip norm=0.5 + gaussian_noise std=0.01" [--json FILE]

A defense is its registered name and its options, a chain of several has ``+`` between them. Ten clients share the
bundled digits at random; every defense and the undefended run meet the same networks, clients and orders of images. The
intervals are 95 % Student intervals of the mean over seeds, those of a change paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch.nn.functional import one_hot

import keyhole.defenses  # noqa: F401  (fills the registry)
from keyhole.core.defense import Defense, chain
from keyhole.core.keys import fold_in, new_key
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Bounds, Task, fit_weights, weights_of
from keyhole.core.types import Batch
from keyhole.federation.states import Federation, accuracy, federate
from keyhole.zoo.datasets import load_data
from keyhole.zoo.models import build_model

TEST, PUBLIC, CLIENTS = 400, 97, 10
NETWORK = "lenet_zhu activation=relu init=default"
"""Sigmoids and uniform weights, as the attacks like them, learn too little in so few rounds to tell defenses apart."""


def read_defense(words: str) -> Defense:
    """A defense from ``name key=value ... + name ...``."""
    return chain(*(_link(*part.split()) for part in words.split("+"))) if words else chain()


def _link(name: str, *options: str) -> Defense:
    return DEFENSES.build(name, **_options(options))


def _options(words: Iterable[str]) -> dict[str, Any]:
    return {key: _value(text) for key, text in (word.split("=", 1) for word in words)}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def test_accuracy(words: str, seed: int, rounds: int, network: str) -> float:
    """Share of held-out digits that the network gets right after so many rounds under a defense, in percent."""
    data = load_data("digits", target=TEST, tune=0, public=PUBLIC, candidates=0, train=10_000, seed=seed)
    name, *given = network.split()
    model = build_model(
        name, input_shape=data.image_shape, num_classes=data.num_classes, options=_options(given), seed=seed
    )
    bounds = Bounds.of((0.0,), (1.0,))
    task = Task.of(model, data.image_shape, data.num_classes, bounds, batchnorm="train_shared", dropout="active")
    public = Batch(
        data.public.images, one_hot(data.public.labels, data.num_classes).float(), torch.full((PUBLIC,), 1 / PUBLIC)
    )
    defense = read_defense(words)
    task = defense.on_task(task)
    trained = federate(
        task, fit_weights(task, weights_of(model)), data.train.images, data.train.labels,
        Federation(rounds=rounds, clients=CLIENTS), fold_in(new_key(seed), "utility"),
        defense=defense if words else None, public=public,
    )  # fmt: skip
    return 100.0 * accuracy(task, trained, data.target.images, data.target.labels)


def mean_over_seeds(values: list[float]) -> dict[str, float]:
    """Mean with its 95 % Student interval."""
    mean = math.fsum(values) / len(values)
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else math.nan
    return {"value": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description="Test accuracy under defenses.")
    parser.add_argument("defenses", nargs="*", help='for example "random_masking rate=0.5"')
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default=NETWORK, help="a registered model with its options")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, Any]] = {}
    plain: list[float] = []
    print(f"{chosen.model}, digits, {CLIENTS} clients, {chosen.rounds} rounds, {chosen.seeds} seeds; in percent")
    for words in ["", *chosen.defenses]:
        began = time.process_time()
        found = [test_accuracy(words, seed, chosen.rounds, chosen.model) for seed in range(chosen.seeds)]
        plain = plain or found
        entry = {
            "accuracy": mean_over_seeds(found),
            "change": mean_over_seeds([a - b for a, b in zip(found, plain, strict=True)]),
            "seeds": found,
            "cpu_seconds": time.process_time() - began,
        }
        figures[words or "none"] = entry
        if chosen.json:  # after each, as all of them take long
            chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
        line = "{} {value:.1f} ({low:.1f} to {high:.1f})".format
        parts = [line("accuracy", **entry["accuracy"]), line("change", **entry["change"])]
        print(f"{words or 'none'}: {', '.join(parts)}; seeds {found}; {entry['cpu_seconds']:.0f} s")


if __name__ == "__main__":
    main()
