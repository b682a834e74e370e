"""How the clients of a transcript trained: what was recorded or given, what is estimated, and what is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keyhole.core.keys import new_key, normal
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Task
from keyhole.errors import ConfigError, Refused, UnknownName
from keyhole.experiment.options import sentence
from keyhole.experiment.overrides import override
from keyhole.experiment.transcript import Recorded, whole
from keyhole.parts.labels.head import head_of

_LR = ("lr", "learning-rate", "learning_rate")
_EPOCHS = ("local-epochs", "local_epochs", "epochs")
_BATCH = ("batch-size", "batch_size")
"""Names under which servers tell clients how to train."""

MOST = 10_000
"""Images or steps behind one update, above which attacks are not tried: their memory and time grow with them."""


class Known(BaseModel):
    """What is known beside transcript and model; every key can be set with ``--set KEY=VALUE``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    shape: list[int] | None = None
    """Of one image, [channels, height, width]; by default the model's attribute ``input_shape``."""
    classes: int | None = Field(default=None, ge=2)
    """By default what the model gives."""
    mean: list[float] | None = None
    std: list[float] | None = None
    """How pixels in [0, 1] were normalised, a number for each channel; by default not at all."""
    batchnorm: Literal["eval", "train_shared", "train_hidden"] | None = None
    dropout: Literal["off", "active"] | None = None
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    images: int | None = Field(default=None, ge=1)
    """Behind one update, where clients do not say it."""
    sum: bool = False
    """Only the sum over a round's clients is seen, as under secure aggregation."""
    rounds: list[int] | None = None
    clients: list[str] | None = None
    most: int = Field(default=4, ge=1)
    """Updates that are attacked, from the first on."""
    attacks: list[dict[str, Any]] | None = None
    defense: list[dict[str, Any]] = []
    """The chain of defenses that the attacker knows the clients to use."""
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """How a client is thought to have trained."""

    rule: LocalSGD
    images: int
    steps: int
    scale_known: bool
    """Whether the learning rate is known, so that lengths of updates can be compared."""
    words: tuple[str, ...]
    """What is known, what was estimated, and what was assumed."""


def known_from(changes: tuple[str, ...]) -> Known:
    """What changes of the form ``KEY=VALUE`` say is known."""
    raw: dict[str, Any] = {}
    for change in changes:
        override(raw, change)
    for key in raw:
        if key not in Known.model_fields:
            raise UnknownName("key", key, Known.model_fields, "--set of a transcript")
    try:
        return Known(**raw)
    except ValidationError as error:
        raise ConfigError(sentence(error, "--set")) from error


def training_of(task: Task, one: Recorded, known: Known) -> Training:
    """What of it is known, and from where.

    Raises:
        Refused: what was recorded cannot be, or is too much to attack.
    """
    words: list[str] = []

    def find(name: str, given: Any, keys: tuple[str, ...], counted: bool = True) -> float | None:
        if given is not None:
            words.append(f"{name} {given:g}, as given")
            return float(given)
        told = next((one.config[key] for key in keys if isinstance(one.config.get(key), int | float)), None)
        if told is None:
            return None
        if not (whole(told) if counted else 0 < told < 1e9):
            raise Refused(f"the recorded config has {name} {told!r}, which cannot be; say it with --set.")
        words.append(f"{name} {told:g}, from the recorded config")
        return float(told)

    images = known.images or one.examples
    words.append(
        "one image, which is an assumption: the client does not say"
        if images is None
        else f"{images} image{'s' * (images != 1)}, {'as given' if known.images else 'as the client says'}"
    )
    images = images or 1
    lr, epochs = find("learning rate", known.lr, _LR, counted=False), find("epochs", known.epochs, _EPOCHS)
    size = find("batch size", known.batch_size, _BATCH)
    batch = images if size is None else min(int(size), images)
    if size is None and images > 1:
        words.append("all images in one step, which is an assumption")
    if epochs is None:
        words.append("one epoch, which is an assumption")
    rounds = int(epochs or 1)
    steps = rounds * -(-images // batch)
    if max(images, steps) > MOST:
        raise Refused(f"{images} images and {steps} steps are behind the update; up to {MOST} of each are attacked.")
    estimate = None
    if lr is None:
        estimate = _estimate(task, one, steps)
        words.append(
            "learning rate unknown: only the update's direction is matched"
            if estimate is None
            else f"learning rate unknown, estimated at {estimate:.2g} from the last layer; only the update's direction "
            "is matched"
        )
    rule = LocalSGD(rounds, lr or estimate or 1.0, batch, "shuffled" if steps > 1 else "fixed")
    return Training(rule, images, steps, lr is not None, tuple(words))


def _estimate(task: Task, one: Recorded, steps: int) -> float | None:
    """The learning rate from the last layer's bias: a class without images gets ``lr steps p`` there.

    The probabilities p are those of noise at the weights sent. Too small where all classes have images.
    """
    head = head_of(task, one.update, "the learning rate's estimate")
    if head.bias is None:
        return None
    noise = normal(new_key(0), (16, *task.input_shape))
    p = torch.softmax(task.logits(one.weights, noise), -1).mean(0)
    rising = head.bias > 0
    found = float((head.bias * rising).sum() / (p * rising).sum().clamp(min=1e-12)) / steps
    return found if math.isfinite(found) and found > 0 else None
