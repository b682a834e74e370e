"""Attack what a real federation sent: a transcript, the model, and what is known of the clients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

import keyhole.experiment.spec  # noqa: F401  (fills the registries)
from keyhole.core.attack import Attack, IterativeAttack
from keyhole.core.belief import Belief, Simulated
from keyhole.core.defense import Counter, chain
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.registry import ATTACKS, BELIEFS, DEFENSES, METRICS
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task
from keyhole.core.tensors import flatten
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Observation, Tensors
from keyhole.errors import ConfigError, DataError, Refused, UnknownName
from keyhole.experiment.controls import noise_update
from keyhole.experiment.feasibility import MANY, Reason, Verdict, about_update, conclude
from keyhole.experiment.options import method, sentence
from keyhole.experiment.overrides import override
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
from keyhole.experiment.run import START_JITTER
from keyhole.experiment.setup import SMALLEST
from keyhole.experiment.transcript import Recorded, Secret, read_secret, read_transcript
from keyhole.metrics.matching import assign
from keyhole.parts.labels import multiset_overlap
from keyhole.parts.labels.head import head_of
from keyhole.solve.drive import Solved, solve
from keyhole.solve.lift import Shared, stack
from keyhole.zoo.models import build_model

_LR = ("lr", "learning-rate", "learning_rate")
_EPOCHS = ("local-epochs", "local_epochs", "epochs")
_BATCH = ("batch-size", "batch_size")
"""Names under which servers tell clients how to train."""

ONE_STEP = (
    {"name": "idlg", "steps": 400, "restarts": 2},
    {"name": "inverting_gradients", "steps": 800, "restarts": 2, "tv": 0.0},
)
"""Attacks on one step where nothing else is said: the second finds its way where there are kinks."""

STEPS = ({"name": "inverting_gradients", "steps": 800, "restarts": 2},)
"""Attacks on several steps."""

SECOND = (
    "A second attack went on from what this one found. It began at gray, as a transcript has no public images; how far "
    "its images are from explaining the update was not measured."
)
"""What is said of a counter with a second attack."""


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


@dataclass(frozen=True, eq=False)
class Attempt:
    """One attack on one update."""

    attack: str
    attacker: str
    status: str
    score: float
    """The attack's own distance between simulated and recorded update; 0 explains all of it. NaN where it has none."""
    guesses: Tensor
    """Pixels (r, c, h, w) in [0, 1]; with secrets in their order."""
    labels: tuple[int, ...]
    evaluations: int
    detail: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """For each secret image; empty without secrets."""
    control: dict[str, list[float]] = field(default_factory=dict)
    """The same for the same attack on noise of the same size."""


@dataclass(frozen=True, eq=False)
class Finding:
    """One update, and what came of the attacks on it."""

    update: Recorded
    training: Training
    verdict: Verdict
    reasons: tuple[Reason, ...]
    attempts: tuple[Attempt, ...]
    truth: Tensor | None
    """Secret pixels, where they were given."""


@dataclass(frozen=True, eq=False)
class Findings:
    """A transcript's audit."""

    folder: Path
    model: str
    about: dict[str, Any]
    recorded: int
    missing: tuple[str, ...]
    found: tuple[Finding, ...]
    known: Known


def audit_transcript(folder: Path, model: str, secrets: Path | None = None, changes: tuple[str, ...] = ()) -> Findings:
    """Attack the updates of a transcript.

    Args:
        folder: what `keyhole.fl.Recorder` wrote.
        model: ``package.module:factory`` of what was trained.
        secrets: what `keyhole.fl.record_batches` wrote in a test run; used for scores alone, after the attacks.
        changes: ``KEY=VALUE`` for the fields of `Known`.
    """
    known = _known(changes)
    if secrets is not None and not secrets.is_dir():
        raise DataError(f"there is no folder of secrets '{secrets}'.")
    shape = tuple(known.shape or ())
    network = build_model(model, input_shape=shape, num_classes=known.classes or 0, options={}, seed=known.seed)
    transcript = read_transcript(folder, network)
    task = _task(network, known)
    chosen = [
        one
        for one in transcript.updates
        if (known.rounds is None or one.round in known.rounds)
        and (known.clients is None or one.client in known.clients)
    ]
    if not chosen:
        raise ConfigError("no recorded update has a round and client that rounds and clients accept.")
    members = [[one] for one in chosen]
    if known.sum:
        members = [[one for one in chosen if one.round == number] for number in dict.fromkeys(o.round for o in chosen)]
    found = [_finding(task, parts, known, secrets) for parts in members[: known.most]]
    return Findings(folder, model, transcript.about, len(transcript.updates), transcript.missing, tuple(found), known)


def _known(changes: tuple[str, ...]) -> Known:
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


def _task(network: nn.Module, known: Known) -> Task:
    own: Any = getattr(network, "input_shape", ())
    shape = tuple(known.shape or own)
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError("the shape of an image is not known; say it with --set shape=[1,28,28], for example.")
    if min(shape[1:]) < SMALLEST:
        raise DataError(f"images of {shape[1]}x{shape[2]} pixels are too small; {SMALLEST}x{SMALLEST} are needed.")
    classes = known.classes
    if classes is None:
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        classes = linear[-1].out_features if linear else 0
    bounds = Bounds.of(tuple(known.mean or [0.0] * shape[0]), tuple(known.std or [1.0] * shape[0]))
    if bounds.mean.shape[0] != shape[0]:
        raise ConfigError(f"mean and std need {shape[0]} numbers, one for each channel.")
    return Task.of(network.float(), shape, classes, bounds, batchnorm=known.batchnorm, dropout=known.dropout)


def summed(parts: list[Recorded]) -> Recorded:
    """What secure aggregation leaves of a round: the mean over clients, weighted by their images, and their number."""
    counts = [one.examples or 1 for one in parts]
    total = sum(counts)
    first = parts[0]
    update = {
        name: torch.stack([one.update[name] * (n / total) for one, n in zip(parts, counts, strict=True)]).sum(0)
        for name in first.update
    }
    examples = total if all(one.examples for one in parts) else None
    return Recorded(first.round, f"sum of {len(parts)}", first.weights, update, examples, first.config)


def _finding(task: Task, parts: list[Recorded], known: Known, secrets: Path | None) -> Finding:
    one = summed(parts) if known.sum else parts[0]
    training = _training(task, one, known)
    attacks = [method(ATTACKS, raw, "attack") for raw in known.attacks or (ONE_STEP if training.steps == 1 else STEPS)]
    built: list[tuple[str, Attack]] = [(spec.name, ATTACKS.build(spec.name, **spec.asdict())) for spec in attacks]
    if not training.scale_known:
        # A distance of lengths would compare with a guess at the learning rate.
        free = [(name, attack) for name, attack in built if name == "inverting_gradients"]
        built = free if known.attacks is None else built
    links = [method(DEFENSES, raw, "defense") for raw in known.defense]
    defense = chain(*(DEFENSES.build(spec.name, **spec.asdict()) for spec in links))
    counters = [Counter(), *defense.counters()] if links else [Counter()]
    verdict, reasons = _predict(task, one, training, [attack for _, attack in built])
    secret = _secrets(secrets, parts) if secrets is not None else None
    attempts = tuple(
        _attempt(task, one, training, name, attack, counter, known.seed, secret)
        for name, attack in built
        for counter in counters
    )
    truth = None if secret is None else task.bounds.to_pixels(secret.inputs.float())
    return Finding(one, training, verdict, reasons, attempts, truth)


def _secrets(folder: Path, parts: list[Recorded]) -> Secret | None:
    found = [read_secret(folder, one.round, one.client) for one in parts]
    kept = [one for one in found if one is not None]
    if len(kept) != len(found):
        return None
    return Secret(torch.cat([one.inputs for one in kept]), torch.cat([one.labels for one in kept]))


# How the client trained


def _training(task: Task, one: Recorded, known: Known) -> Training:
    words: list[str] = []

    def find(name: str, given: Any, keys: tuple[str, ...]) -> float | None:
        if given is not None:
            words.append(f"{name} {given:g}, as given")
            return float(given)
        told = next((one.config[key] for key in keys if isinstance(one.config.get(key), int | float)), None)
        if told is None or not told > 0:
            return None
        words.append(f"{name} {told:g}, from the recorded config")
        return float(told)

    images = known.images or one.examples
    words.append(
        "one image, which is an assumption: the client does not say"
        if images is None
        else f"{images} image{'s' * (images != 1)}, {'as given' if known.images else 'as the client says'}"
    )
    images = images or 1
    lr, epochs = find("learning rate", known.lr, _LR), find("epochs", known.epochs, _EPOCHS)
    size = find("batch size", known.batch_size, _BATCH)
    batch = images if size is None else min(int(size), images)
    if size is None and images > 1:
        words.append("all images in one step, which is an assumption")
    if epochs is None:
        words.append("one epoch, which is an assumption")
    rounds = int(epochs or 1)
    steps = rounds * -(-images // batch)
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


def _predict(
    task: Task, one: Recorded, training: Training, attacks: list[Attack]
) -> tuple[Verdict, tuple[Reason, ...]]:
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


# Attacking


def _attempt(
    task: Task,
    one: Recorded,
    training: Training,
    name: str,
    attack: Attack,
    counter: Counter,
    seed: int,
    secret: Secret | None,
) -> Attempt:
    attacker = "naive" if counter.name == "naive" else f"adaptive:{counter.name}"
    key = fold_in(new_key(seed), f"transcript {one.round} {one.client}")
    seen = [one.observation]
    if secret is not None:
        # The same search for an update that says nothing: what resembles a secret by chance is no leak.
        seen.append(seen[0]._replace(update=noise_update(one.update, fold_in(key, "prior only"))))
    try:
        solved, *blind = _solved(task, seen, training, attack, counter, key)
    except Refused as error:
        nothing = torch.zeros(0, *task.input_shape)
        return Attempt(name, attacker, "refused", math.nan, nothing, (), 0, str(error))
    guesses = task.bounds.to_pixels(solved.reconstruction.inputs).detach()
    targets = solved.reconstruction.targets
    labels = () if targets is None else tuple(targets.argmax(-1).tolist())
    metrics: dict[str, list[float]] = {}
    control: dict[str, list[float]] = {}
    if secret is not None:
        guesses, metrics = _scored(task, guesses, secret)
        if targets is not None and len(targets) == len(secret.labels):
            true = nn.functional.one_hot(secret.labels, task.num_classes).to(targets)
            metrics["label_accuracy"] = [float(multiset_overlap(targets, true))] * len(true)
        control = _scored(task, task.bounds.to_pixels(blind[0].reconstruction.inputs).detach(), secret)[1]
    # A second attack's own score is of something else than updates.
    score = float(solved.reconstruction.score) if counter.then is None else math.nan
    detail = "" if counter.then is None else SECOND
    return Attempt(name, attacker, solved.status, score, guesses, labels, solved.evaluations, detail, metrics, control)


def _scored(task: Task, guesses: Tensor, secret: Secret) -> tuple[Tensor, dict[str, list[float]]]:
    truth = task.bounds.to_pixels(secret.inputs.float())
    if truth.shape[1:] != guesses.shape[1:] or len(truth) > len(guesses):
        raise DataError(
            f"the secrets are {len(truth)} images of shape {tuple(truth.shape[1:])}, but {len(guesses)} of shape "
            f"{tuple(guesses.shape[1:])} were guessed; say how many there are with --set images={len(truth)}."
        )
    matched = guesses[assign(guesses, truth)]
    return matched, {card.name: card.factory()(matched, truth).tolist() for card in METRICS}


def _solved(
    task: Task, seen: list[Observation], training: Training, attack: Attack, counter: Counter, key: Tensor
) -> list[Solved]:
    """The attack on several observations from the same weights, with the same start."""
    belief: Belief = Simulated(training.rule)
    if training.steps > 1:
        belief = BELIEFS.build("straight_line", rule=training.rule)
    threat = ThreatModel(training.rule, belief, training.images, counter=counter.told(training.images))
    missing = (attack.needs | counter.needs) - threat.sees
    if missing:
        raise Refused(f"it needs {', '.join(sorted(missing))}, which a transcript does not hold.")
    if counter.one_step and training.steps > 1:
        raise Refused(f"it can only explain an update of one gradient; here it is made of {training.steps}.")
    keys = key.expand(len(seen), -1).clone()
    shared = Shared(seen[0].weights)
    images = None
    if isinstance(attack, IterativeAttack) and attack.initial != "random":
        if attack.initial != "gray":
            raise Refused(f"start = '{attack.initial}' needs public images, which a transcript does not hold.")
        images = _gray(task, attack, training.images, keys)
    then = None
    if counter.then is not None:
        if not attack.pictures:
            raise Refused("its second attack works on images, and this attack finds none.")
        # Elsewhere it starts from the mean of public images.
        then = _gray(task, counter.then, training.images, keys)
    return solve(attack, task, threat, (stack(seen, shared),), images, keys, shared, then_images=then)


def _gray(task: Task, attack: IterativeAttack, images: int, keys: Tensor) -> Tensor:
    """Start images (trials, starts, r, *shape), the same for all trials, which have one key."""
    noise = normal(fold_in(keys[0], "start images"), (attack.restarts, images, *task.input_shape))
    return task.bounds.from_pixels(0.5 + START_JITTER * noise).expand(len(keys), *noise.shape).clone()
