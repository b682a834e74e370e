"""Whether a recorded update can be inverted, said before it is tried."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keyhole.core.attack import Attack
from keyhole.core.keys import new_key, normal
from keyhole.core.task import Task
from keyhole.core.tensors import flatten
from keyhole.core.types import Tensors
from keyhole.experiment.feasibility import MANY, Reason, Verdict, about_update, conclude
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


def predict(task: Task, one: Recorded, training: Training, attacks: list[Attack]) -> tuple[Verdict, tuple[Reason, ...]]:
    """As a dry run does, from the recorded update in place of a simulated one."""
    reasons = tuple(_reasons(task, one, training, attacks))
    return conclude(reasons), reasons


def _reasons(task: Task, one: Recorded, training: Training, attacks: list[Attack]) -> Iterator[Reason]:
    flat = flatten(one.update)
    batch = task.bounds.from_pixels(
        (0.5 + 0.1 * normal(new_key(1), (training.images, *task.input_shape))).clamp(0.0, 1.0)
    )
    kinks, depth, work = operations(task, one.weights, batch)
    precision = min(map(precision_of, attacks), default=1.0)
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
    facts = Facts(
        images=training.images,
        unknowns=batch.numel(),
        equations=flat.numel(),
        nonzero=int((flat != 0).sum()),
        dead=dead_units(one.update),
        ranks=linear_ranks(task, one.update),
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
    if training.images >= MANY:
        yield Reason("hinders", f"One update mixes {training.images} images.")
    if training.steps > 1:
        yield Reason("hinders", f"{training.steps} local steps, in an order that the attacker does not know.")
    if task.norms and task.batchnorm != "eval":
        yield Reason("hinders", "BatchNorm uses the batch's own statistics: every image acts on all others.")
    if task.drops:
        yield Reason("hinders", "Dropout is active, and the attacker must find its masks too.")
