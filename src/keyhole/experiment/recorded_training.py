"""How the clients of a transcript trained: what was recorded or given, what is estimated, and what is assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
_CLIP = ("clip", "max-grad-norm", "max_grad_norm")
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
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest norm of a step's gradient, where clients clip it: steps are then shorter than the learning rate says."""
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    images: int | None = Field(default=None, ge=1)
    """Behind one update, or behind the sum, where clients do not say it."""
    sum: bool = False
    """Only the sum over all clients of a round is seen, as under secure aggregation."""
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
    """Of a client; behind a sum those of the client that takes most."""
    scale_known: bool
    """Whether the learning rate is known, so that lengths of updates can be compared."""
    words: tuple[str, ...]
    """What is known, what was estimated, and what was assumed."""
    assumed: bool = False
    """Whether the number of images, epochs or the batch size is assumed, so that the true images need not fit."""


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


@dataclass(frozen=True)
class _Client:
    """How one client trained."""

    images: int
    lr: float | None
    epochs: int | None
    batch: int | None
    """`None` where nothing says it: one epoch, and all images in one batch."""
    clip: float | None
    words: tuple[str, ...]
    """Where this is from."""

    @property
    def rule(self) -> LocalSGD:
        """With a learning rate of 1 where it is not known."""
        batch = self.images if self.batch is None else min(self.batch, self.images)
        order = "shuffled" if (self.epochs or 1) * -(-self.images // batch) > 1 else "fixed"
        return LocalSGD(self.epochs or 1, self.lr or 1.0, batch, order)  # type: ignore[arg-type]

    @property
    def steps(self) -> int:
        return self.rule.steps(self.images)

    @property
    def assumed(self) -> list[str]:
        """What of it is assumed, in words."""
        words = []
        if self.batch is None and self.images > 1:
            words.append("all images in one batch, which is an assumption (set it with --set batch_size=...)")
        if self.epochs is None:
            words.append("one epoch, which is an assumption (set it with --set epochs=...)")
        return words


def training_of(task: Task, one: Recorded, known: Known) -> Training:
    """What of it is known, and from where.

    A mean over clients of one step each, weighted by their images, is one step on all images; over clients of several
    steps it is taken for as many steps on all images.

    Raises:
        Refused: what was recorded cannot be, is too much to attack, or is of clients too different for one sum.
    """
    parts = one.parts or (one,)
    counts, words = _images(parts, known)
    clients = [_client(part, count, known) for part, count in zip(parts, counts, strict=True)]
    if not one.parts and not known.defense:
        clients = [_as_long(task, one, clients[0])]
    images, steps = sum(counts), max(client.steps for client in clients)
    words += dict.fromkeys(word for client in clients for word in (*client.words, *client.assumed))
    if max(images, steps) > MOST:
        raise Refused(f"{images} images and {steps} steps are behind the update; up to {MOST} of each are attacked.")
    if len({client.lr for client in clients}) > 1:
        raise Refused("its clients were told different learning rates; say which one to assume with --set lr=0.1.")
    # As the server weighs the clients.
    weights = [part.examples or 1 for part in parts]
    mean = sum(n * client.steps for n, client in zip(weights, clients, strict=True)) / sum(weights)
    if one.parts:
        least = min(client.steps for client in clients)
        words.append(f"{least if least == steps else f'{least} to {steps}'} local step{'s' * (steps > 1)} a client")
    if mean < steps:
        words.append("images of all clients weighed alike, which is an assumption")
    lr, estimate = clients[0].lr, None
    if lr is None:
        length, _ = _length(task, one)
        estimate = None if length is None else length / mean
        words.append(
            "learning rate unknown: only the update's direction is matched"
            if estimate is None
            else f"learning rate unknown, estimated at {estimate:.2g} from the last layer; only the update's direction "
            "is matched"
        )
    rate, clip = lr or estimate or 1.0, clients[0].clip
    if lr is not None and clip is not None:
        # That every step was clipped need not be so, and with momentum it would not say how long it is.
        rate = scale_of(task, one, images, steps, lr * steps) / steps
        words.append("gradients are clipped, so that only the update's direction is matched")
    rule = replace(clients[0].rule, lr=rate)
    if one.parts:
        # Every step of the mean is one on all images.
        rule = LocalSGD(
            steps, rate * mean / steps if mean < steps else rate, images, "fixed" if steps == 1 else "shuffled"
        )
    assumed = any(client.assumed for client in clients) or (
        known.images is None and any(part.examples is None for part in parts)
    )
    return Training(rule, images, steps, lr is not None and clip is None, tuple(words), assumed)


def _images(parts: tuple[Recorded, ...], known: Known) -> tuple[list[int], list[str]]:
    """Each client's images, and where their number is from."""
    several = len(parts) > 1
    if known.images is not None:
        if known.images < len(parts):
            raise Refused(f"{len(parts)} clients have at least as many images, not {known.images}.")
        share, more = divmod(known.images, len(parts))
        counts, source = [share + (place < more) for place in range(len(parts))], "as given"
    else:
        counts = [part.examples or 1 for part in parts]
        silent = sum(part.examples is None for part in parts)
        source = "as the clients say" if several else "as the client says"
        if silent:
            who = f"{silent} of the clients do" if several else "the client does"
            source = f"assuming one where {who} not say (set it with --set images=...)"
    total = sum(counts)
    behind = f" of {len(parts)} clients" if several else ""
    return counts, [f"{total} image{'s' * (total != 1)}{behind}, {source}"]


def _client(part: Recorded, images: int, known: Known) -> _Client:
    words: list[str] = []

    def find(name: str, given: Any, keys: tuple[str, ...], counted: bool = True) -> float | None:
        if given is not None:
            words.append(f"{name} {given:g}, as given")
            return float(given)
        told = next((part.config[key] for key in keys if part.config.get(key) is not None), None)
        if told is None:
            return None
        number = _number(told)
        if number is None or not (whole(number) if counted else 0 < number < 1e9):
            raise Refused(f"the recorded config has {name} {told!r}, which cannot be; say it with --set.")
        words.append(f"{name} {number:g}, from the recorded config")
        return float(number)

    lr, epochs = find("learning rate", known.lr, _LR, counted=False), find("epochs", known.epochs, _EPOCHS)
    size = find("batch size", known.batch_size, _BATCH)
    clip = find("clip", known.clip, _CLIP, counted=False)
    return _Client(
        images, lr, None if epochs is None else int(epochs), None if size is None else int(size), clip, tuple(words)
    )


def _as_long(task: Task, one: Recorded, client: _Client) -> _Client:
    """The client with more steps than would be assumed, where the length of its update tells of them.

    That needs the learning rate, a class without images, and a network that hardly prefers a class yet: on others the
    length says nothing. Long training is not seen in full: as classes without images get unlikely, steps get shorter.
    """
    told = client.epochs is not None and (client.batch is not None or client.images == 1)
    if told or client.lr is None or client.images >= task.num_classes:
        return client
    length, usable = _length(task, one)
    if length is None or not usable:
        return client
    steps = round(min(length / client.lr, MOST))
    if steps <= client.steps:
        return client
    if client.epochs is None:
        found = replace(client, epochs=max(1, round(steps / client.steps)))
    else:
        found = replace(client, batch=-(-client.images // max(1, round(steps / client.epochs))))
    words = f"{found.steps} steps or more, estimated from the last layer's length (set epochs and batch_size if known)"
    return replace(found, words=(*client.words, words))


def _number(told: Any) -> int | float | None:
    """A number, or one written as text; `None` for anything else."""
    if isinstance(told, str):
        try:
            return float(told)
        except ValueError:
            return None
    return told if isinstance(told, int | float) and not isinstance(told, bool) else None


EVEN = 1.5
"""How many times as likely as in a draw a class may be for images of noise, where the network hardly prefers any."""

ADDED = 0.05
"""Sum of the last layer's bias over the classes, as a share of what rose, from which on something was added to it."""


def _length(task: Task, one: Recorded) -> tuple[float | None, bool]:
    """Learning rate times steps, from the last layer's bias: a class without images gets ``lr steps p`` there.

    The probabilities p are those of noise at the weights sent. Too small where all classes have images. Also says
    whether nothing was added, and the network is so even that p is that of other images too.
    """
    head = head_of(task, one.update, "the learning rate's estimate")
    if head.bias is None:
        return None, False
    noise = normal(new_key(0), (16, *task.input_shape))
    p = torch.softmax(task.logits(one.weights, noise), -1).mean(0)
    rising = head.bias > 0
    risen = (head.bias * rising).sum()
    found = float(risen / (p * rising).sum().clamp(min=1e-12))
    # Softmax sums to what labels do, so that nothing but what was added leaves a sum over the classes.
    pure = float(head.bias.sum().abs()) <= ADDED * float(risen)
    usable = pure and float(p.max()) * task.num_classes <= EVEN
    return found if math.isfinite(found) and found > 0 else None, usable


FEW = 32
"""Images up to which counts of labels say how long an update is."""


def scale_of(task: Task, one: Recorded, images: int, steps: int, most: float) -> float:
    """What an update is a multiple of, where its steps are shorter than they look: counts of labels are whole numbers.

    With the last layer's bias ``b`` and the mean prediction ``p`` the count of a class is ``images (p - b / scale)``
    (`keyhole.parts.labels.geng`). Of all scales up to ``most`` at which no count is negative the one is taken at which
    they are most nearly whole. Predictions are those of noise, at the middle of the way where there are several steps.

    Returns:
        At most ``most``; just that for more than `FEW` images, or where the last layer has no bias.
    """
    head = head_of(task, one.update, "the update's length")
    if head.bias is None or images > FEW:
        return most
    bias, back = head.bias.double(), 0.5 if steps > 1 else 0.0
    middle = {name: value - back * one.update[name] for name, value in one.weights.params.items()}
    noise = normal(new_key(0), (64, *task.input_shape))
    p = torch.softmax(task.logits(one.weights._replace(params=middle), noise), -1).mean(0).double()
    least = float((bias / p).max())
    if not 0 < least < most:
        return most
    scales = least * (most / least) ** torch.linspace(0.0, 1.0, 400, dtype=torch.float64)
    counts = images * (p - bias / scales[:, None])
    return float(scales[(counts - counts.round()).square().sum(-1).argmin()])
