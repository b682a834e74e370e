"""How well label rules read what clients of some 140 digits send in some 18 steps: overlaps with the true labels.

Trains the undefended network of the preset ``frontier`` (20 rounds), with even and with uneven shares of classes, and
reads what all ten clients sent in rounds 1, 6 and 20, as one gradient at the weights sent and at the middle of the way.
Beside it what naming all classes equally often is worth. Run ``python benchmarks/sent_labels.py``; it takes a minute.
For the docstring of `keyhole.attacks.recovery.read_labels`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from keyhole.core.keys import new_key
from keyhole.core.registry import LABELS
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Observation
from keyhole.experiment.sent_updates import Trainings, training_of
from keyhole.experiment.train import SECRETS, TRANSCRIPT, train
from keyhole.experiment.training_plan import load_training
from keyhole.experiment.transcript import read_secret, read_transcript
from keyhole.parts.labels import multiset_overlap

RULES = ("ilrg", "geng", "analytic", "yin", "llg", "bias_corrected")
SHARES = {"even": (), "uneven": ('federation.partition="dirichlet"', "federation.alpha=0.3")}
PLACES = {"the weights sent": 0.0, "the middle": 0.5}


def main() -> None:
    torch.set_num_threads(1)
    for shares, changes in SHARES.items():
        measure(shares, changes)


def measure(shares: str, changes: tuple[str, ...]) -> None:
    """Train, read, print."""
    plan = load_training("frontier", ["defenses=[]", "audit.sent.clients=10", *changes])
    _, task = Trainings(plan)(0)
    found: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        (run,) = train(plan, Path(place) / "training")
        for one in read_transcript(run.folder / TRANSCRIPT, task.model).updates:
            secret = read_secret(run.folder / SECRETS, one.round, one.client)
            assert secret is not None and one.examples is not None
            true = torch.nn.functional.one_hot(secret.labels, task.num_classes).float()
            scale = training_of(plan.federation, task, one).rule.scale(one.examples)
            even = torch.eye(task.num_classes)[torch.arange(one.examples) % task.num_classes]
            found.setdefault(("equally often", "", one.round), []).append(float(multiset_overlap(even, true)))
            gradient = map_tensors(lambda u, s=scale: u / s, one.update)
            for name, share in PLACES.items():
                params = map_tensors(lambda w, u, a=share: w - a * u, one.weights.params, one.update)
                seen = Observation(weights=one.weights._replace(params=params), update=gradient)
                for rule in RULES:
                    labels = LABELS.card(rule).factory(task, one.examples, seen, new_key(0)).float()
                    found.setdefault((rule, name, one.round), []).append(float(multiset_overlap(labels, true)))
    print(
        f"Overlap with the true labels, {shares} shares of classes, mean over ten clients, in rounds {plan.recorded}:"
    )
    for rule, name in dict.fromkeys((rule, name) for rule, name, _ in found):
        means = [sum(found[rule, name, number]) / len(found[rule, name, number]) for number in plan.recorded]
        print(f"  {rule:15} {name:17} {'  '.join(f'{mean:.2f}' for mean in means)}")


if __name__ == "__main__":
    main()
