"""Whether a recorded update can be inverted, said before it is tried."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keyhole.core.attack import Attack
from keyhole.core.keys import new_key, normal, uniform
from keyhole.core.task import Task, plain_gradient
from keyhole.core.tensors import flatten
from keyhole.core.types import Batch, Tensors
from keyhole.experiment.feasibility import MANY, SILENT, Reason, Verdict, about_update, conclude
from keyhole.experiment.probe import (
    MOST_WORK,
    Facts,
    dead_units,
    estimate_pinned,
    linear_ranks,
    operations,
    precision_of,
)
from keyhole.experiment.probe import reads_image as reads_it
from keyhole.experiment.recorded_training import Training
from keyhole.experiment.transcript import Recorded

FILLED = 0.1
"""Something was added to an update if it has less than this share of the zeros that the network leaves."""


def predict(
    task: Task, one: Recorded, training: Training, attacks: list[Attack], defenses: list[str]
) -> tuple[Verdict, tuple[Reason, ...]]:
    """As a dry run does, from the recorded update in place of a simulated one.

    Noise fills what is silent, which must not make an update look richer than it is: where a defense is known, or
    zeros are missing, silent entries and ranks are those of images of noise at the weights sent, if these have more.
    """
    reasons = tuple(_reasons(task, one, training, attacks, defenses))
    return conclude(reasons), reasons


def _reasons(
    task: Task, one: Recorded, training: Training, attacks: list[Attack], defenses: list[str]
) -> Iterator[Reason]:
    flat = flatten(one.update)
    batch = task.bounds.from_pixels(
        (0.5 + 0.1 * normal(new_key(1), (training.images, *task.input_shape))).clamp(0.0, 1.0)
    )
    kinks, depth, work = operations(task, one.weights, batch)
    precision = min((precision_of(attack, kinks) for attack in attacks), default=1.0)
    pinned = None
    if work <= MOST_WORK and training.steps == 1:
        targets = nn.functional.one_hot(torch.arange(training.images) % task.num_classes, task.num_classes).float()

        def send(pixels: Tensor) -> Tensor:
            params = one.weights.params

            def loss(given: Tensors) -> Tensor:
                logits = task.logits(one.weights._replace(params=given), task.bounds.from_pixels(pixels))
                return task.loss(logits, targets).mean()

            return flatten(torch.func.grad(loss)(params))

        pinned = estimate_pinned(send, task.bounds.to_pixels(batch), precision)
    nonzero, ranks = int((flat != 0).sum()), linear_ranks(task, one.update)
    clean = _clean(task, one, training)
    left = int((flatten(clean) != 0).sum())
    silent = flat.numel() - left
    filled = bool(kinks) and training.steps == 1 and silent >= SILENT * flat.numel()
    filled = filled and flat.numel() - nonzero < FILLED * silent
    if defenses or filled:
        nonzero = min(nonzero, left)
        ranks = {name: min(rank, ranks[name]) for name, rank in linear_ranks(task, clean).items()}
    facts = Facts(
        images=training.images,
        unknowns=batch.numel(),
        equations=flat.numel(),
        nonzero=nonzero,
        dead=dead_units(one.update),
        ranks=ranks,
        norm=float(flat.norm()),
        steps=training.steps,
        drift=0.0,
        mismatch=0.0,
        collisions=0.0,
        kinks=kinks,
        depth=depth,
        precision=precision,
        pinned=pinned,
        reads_image=reads_it(task, one.weights, batch),
        norms=bool(task.norms),
        drops=bool(task.drops),
    )
    yield from about_update(facts)
    if defenses:
        yield Reason(
            "hinders",
            f"The clients use {' and '.join(defenses)}: the rest of this prediction is of the update without it, as "
            "far as that can be told.",
        )
    elif filled:
        yield Reason(
            "hinders",
            f"The network leaves {100 * silent / flat.numel():.0f} % of an update at 0 for images of noise, but hardly "
            "anything is 0 here: something was added, such as noise or weight decay.",
        )
    if training.images >= MANY:
        yield Reason("hinders", f"One update mixes {training.images} images.")
    if training.steps > 1:
        yield Reason("hinders", f"{training.steps} local steps, in an order that the attacker does not know.")
    if task.norms and task.batchnorm != "eval":
        yield Reason("hinders", "BatchNorm uses the batch's own statistics: every image acts on all others.")
    if task.drops:
        yield Reason("hinders", "Dropout is active, and the attacker must find its masks too.")


def _clean(task: Task, one: Recorded, training: Training) -> Tensors:
    """One gradient of images of noise at the weights sent, which nothing was added to."""
    images = training.images
    inputs = task.bounds.from_pixels(uniform(new_key(2), (images, *task.input_shape)))
    targets = nn.functional.one_hot(torch.arange(images) % task.num_classes, task.num_classes).float()
    return plain_gradient(task)(one.weights, Batch(inputs, targets, torch.full((images,), 1.0 / images)), new_key(3))
