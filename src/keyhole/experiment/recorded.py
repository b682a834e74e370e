"""Attack what a real federation sent: a transcript, the model, and what is known of the clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import keyhole.experiment.spec  # noqa: F401  (fills the registries)
from keyhole.core.attack import Attack
from keyhole.core.defense import Counter, chain
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.task import Bounds, Task
from keyhole.errors import ConfigError, DataError, Refused
from keyhole.experiment.feasibility import Reason, Verdict
from keyhole.experiment.options import method
from keyhole.experiment.recorded_attack import Attempt, attempt
from keyhole.experiment.recorded_prediction import predict
from keyhole.experiment.recorded_training import Known, Training, known_from, training_of
from keyhole.experiment.setup import SMALLEST
from keyhole.experiment.transcript import Recorded, Secret, read_secret, read_transcript
from keyhole.zoo.models import build_model

ONE_STEP = (
    {"name": "idlg", "steps": 400, "restarts": 2},
    {"name": "inverting_gradients", "steps": 800, "restarts": 2, "tv": 0.0},
)
"""Attacks on one step where nothing else is said: the second finds its way where there are kinks."""

STEPS = ({"name": "inverting_gradients", "steps": 800, "restarts": 2},)
"""Attacks on several steps."""


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
    """Clients whose update is missing or cannot be attacked, and why."""
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
    known = known_from(changes)
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
    found: list[Finding] = []
    missing = list(transcript.missing)
    for parts in members:
        if len(found) == known.most:
            break
        one = summed(parts) if known.sum else parts[0]
        try:
            training = training_of(task, one, known)
        except Refused as error:
            missing.append(f"round {one.round}, client {one.client}: {error}")
            continue
        found.append(_finding(task, one, training, parts, known, secrets))
    if not found:
        raise DataError(f"no recorded update can be attacked: {missing[-1]}")
    return Findings(folder, model, transcript.about, len(transcript.updates), tuple(missing), tuple(found), known)


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


def _finding(
    task: Task, one: Recorded, training: Training, parts: list[Recorded], known: Known, secrets: Path | None
) -> Finding:
    attacks = [method(ATTACKS, raw, "attack") for raw in known.attacks or (ONE_STEP if training.steps == 1 else STEPS)]
    built: list[tuple[str, Attack]] = [(spec.name, ATTACKS.build(spec.name, **spec.asdict())) for spec in attacks]
    if not training.scale_known:
        # A distance of lengths would compare with a guess at the learning rate.
        free = [(name, attack) for name, attack in built if name == "inverting_gradients"]
        built = free if known.attacks is None else built
    links = [method(DEFENSES, raw, "defense") for raw in known.defense]
    defense = chain(*(DEFENSES.build(spec.name, **spec.asdict()) for spec in links))
    counters = [Counter(), *defense.counters()] if links else [Counter()]
    verdict, reasons = predict(task, one, training, [attack for _, attack in built])
    secret = _secrets(secrets, parts) if secrets is not None else None
    attempts = tuple(
        attempt(task, one, training, name, attack, counter, known.seed, secret)
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
