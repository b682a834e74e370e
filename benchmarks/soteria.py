"""Why Soteria begins to work at one rate and not before: dead units, and the energy that each rate removes.

Takes the ConvNet of the published figure, untrained and at half its width, and CIFAR-10 test images. A rate up to the
share of dead units prunes nothing that is sent.

    python benchmarks/soteria.py [--json PATH] [--images N] [--networks N] [--width W]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from keyhole.core.defense import Context
from keyhole.core.keys import new_key
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Batch, Weights
from keyhole.defenses.soteria import row_norms, smallest
from keyhole.zoo.convnet import convnet
from keyhole.zoo.datasets import Data, load_data

RATES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def removed(task: Task, weights: Weights, image: torch.Tensor, constant: float) -> dict[str, float]:
    """Dead share, and the share of |r|^2 that each rate removes, of one image."""

    def body(inputs: torch.Tensor) -> torch.Tensor:
        return task.trace(weights, inputs).features

    features = body(image)
    scores = torch.where(features > 0, row_norms(body, image) / (features + constant), 0.0)[0]
    alive = features[0] > 0
    found = {"dead": float((~alive).double().mean())}
    for rate in RATES:
        gone = smallest(scores, alive, rate, False)
        found[f"removed_{round(100 * rate)}"] = float(features[0, gone].square().sum() / features[0].square().sum())
    return found


def same_as_the_defense(task: Task, weights: Weights, image: torch.Tensor, found: dict[str, float]) -> None:
    """One rate by way of the defense itself, so that this script cannot drift from it."""
    ctx = Context(task, weights, new_key(0))
    batch = Batch(image, torch.eye(task.num_classes)[:1], torch.ones(1))
    zero = {name: torch.zeros_like(value) for name, value in weights.params.items()}
    DEFENSES.build("soteria", rate=0.7, constant=0.1).on_gradient(lambda *_: zero, ctx)(weights, batch, new_key(1))
    noted = float(ctx.notes["representation_energy_removed"][0])
    if abs(noted - found["removed_70"]) > 1e-4:
        raise SystemExit(f"the defense removed {noted}, this script {found['removed_70']}")


def measure(data: Data, images: int, networks: int, width: int) -> dict[str, float]:
    """Means over images and networks."""
    rows = []
    for seed in range(networks):
        torch.manual_seed(seed)
        model = convnet(input_shape=data.image_shape, num_classes=data.num_classes, width=width)
        bounds = Bounds.of(data.mean, data.std)
        task = Task.of(model, data.image_shape, data.num_classes, bounds, batchnorm="eval")
        weights = weights_of(model)
        for i in range(images):
            image = bounds.from_pixels(data.target.images[i : i + 1].float())
            rows.append(removed(task, weights, image, 0.1))
            if not rows[1:]:
                same_as_the_defense(task, weights, image, rows[0])
            print(f"network {seed}, image {i}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items()), flush=True)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def main() -> None:
    """Measure, print and maybe write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(load_data("cifar10"), chosen.images, chosen.networks, chosen.width)
    print("mean: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
