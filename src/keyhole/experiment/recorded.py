"""Attack what a real federation sent: a transcript, the model, and what is known of the clients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keyhole.core.modes import drop_layers, norm_layers
from keyhole.core.registry import MODELS
from keyhole.core.task import Bounds, Task
from keyhole.core.told import Told, silent
from keyhole.errors import ConfigError, DataError, Refused, StoreError
from keyhole.experiment.recorded_training import Known, known_from, training_of
from keyhole.experiment.recorded_work import Case, Finding, attack_all
from keyhole.experiment.setup import SMALLEST, check_model
from keyhole.experiment.store import Store
from keyhole.experiment.transcript import (
    TRANSCRIPT,
    Recorded,
    Secret,
    read_secret,
    read_transcript,
    round_folder,
)
from keyhole.zoo.models import build_model


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
    gaps: tuple[tuple[int, int], ...] = ()
    """Rounds before the last one that are not in the transcript, each run of them as its first and last."""
    unscored: tuple[str, ...] = ()
    """Attacked updates for which the folder of secrets has nothing."""


def audit_transcript(
    folder: Path,
    model: str,
    secrets: Path | None = None,
    changes: tuple[str, ...] = (),
    *,
    out: Path | None = None,
    jobs: int = 1,
    told: Told = silent,
) -> Findings:
    """Attack the updates of a transcript.

    Args:
        folder: what `keyhole.fl.Recorder` wrote.
        model: ``package.module:factory`` of what was trained.
        secrets: what `keyhole.fl.record_batches` wrote in a test run; used for scores alone, after the attacks.
        changes: ``KEY=VALUE`` for the fields of `Known`.
        out: the output folder, where attacks are kept and found again; `None` keeps none.
        jobs: updates attacked at a time; 0 for one a core.
        told: told which update is how far.
    """
    known = known_from(changes)
    if secrets is not None and not secrets.is_dir():
        raise DataError(f"there is no folder of secrets '{secrets}'.")
    if known.sum and known.clients is not None:
        raise ConfigError("sum=true is the sum over all clients of a round; leave out clients.")
    _check_place(folder, secrets, out)
    trained = _Trained(model, known)
    transcript = read_transcript(folder, trained.network, known.rounds, known.clients)
    task = trained.task
    check_model(task, torch.float32)
    missing, unscored = list(transcript.missing), []
    cases: dict[str, Case] = {}
    for parts in _views(transcript.updates, known.sum):
        if len(cases) == known.most:
            break
        try:
            if known.sum and parts[0].round in transcript.unread:
                raise Refused("an update is in it that cannot be read, so that it is not known.")
            one = summed(parts)
            training = training_of(task, one, known)
        except Refused as error:
            name = f"sum of {len(parts)} clients" if known.sum else f"client {parts[0].client}"
            missing.append(f"round {parts[0].round}, {name}: {error}")
            continue
        # All of them before the first attack, which takes long.
        secret = None if secrets is None else _secrets(task, secrets, parts)
        if secrets is not None and secret is None:
            unscored.append(one.name)
        still = _still(one)
        if still:
            words = f"{len(still)} of {len(one.update)} parameters did not move ('{still[0]}'), as frozen ones do not"
            training = replace(training, words=(*training.words, words))
        cases[_name(one, cases)] = Case(one, training, secret, known, still)
    if not cases:
        raise DataError(f"no recorded update can be attacked: {missing[-1]}")
    found = tuple(attack_all(cases, trained, out, jobs, told))
    return Findings(
        folder, model, transcript.about, transcript.recorded, tuple(missing), found, known, transcript.gaps,
        tuple(unscored),
    )  # fmt: skip


def _check_place(folder: Path, secrets: Path | None, out: Path | None) -> None:
    """Raises `StoreError` where the output folder holds something else."""
    if out is None:
        return
    if out.resolve() in {folder.resolve(), *([] if secrets is None else [secrets.resolve()])}:
        raise StoreError(f"'{out}' is what is audited; choose another --out.")
    if Store(out).config.exists() or (out / TRANSCRIPT).exists():
        raise StoreError(f"'{out}' holds something else than the audit of a transcript; choose another --out.")


def _still(one: Recorded) -> tuple[str, ...]:
    """Parameters that did not move at all, where others did: an attack that expects them to move finds nothing."""
    still = tuple(name for name, value in one.update.items() if not value.any())
    return still if len(still) < len(one.update) else ()


@dataclass(frozen=True)
class _Trained:
    """What was trained, as the user names it."""

    model: str
    known: Known

    @cached_property
    def network(self) -> nn.Module:
        """With any weights."""
        known = self.known
        shape = tuple(known.shape or ())
        if self.model in MODELS and (known.shape is None or known.classes is None):
            raise ConfigError(
                f"'{self.model}' is one of Keyhole's models, which are made for a shape of images and a number of "
                "classes: say them with --set shape=[1,28,28] and --set classes=10, for example."
            )
        return build_model(self.model, input_shape=shape, num_classes=known.classes or 0, options={}, seed=known.seed)

    @cached_property
    def task(self) -> Task:
        """What clients did with it."""
        return _task(self.network, self.known)

    def __call__(self, number: int) -> tuple[nn.Module, Task]:
        """There is one only."""
        return self.network, self.task

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew in each worker: a user's network need not be one that can be sent."""
        return _Trained, (self.model, self.known)


def _name(one: Recorded, taken: Mapping[str, Case]) -> str:
    """Of the file that keeps an update's attacks; what a client is called comes from outside."""
    name = f"{round_folder(one.round)}-" + re.sub(r"[^0-9A-Za-z-]+", "-", f"client {one.client}"[:100])
    while name in taken:
        name += "-"
    return name


def _views(updates: tuple[Recorded, ...], together: bool) -> list[list[Recorded]]:
    """What the server sees at once: each update by itself, or all of a round."""
    if not together:
        return [[one] for one in updates]
    return [[one for one in updates if one.round == number] for number in dict.fromkeys(one.round for one in updates)]


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
    if known.batchnorm is None and norm_layers(network):
        raise ConfigError(
            "the model has BatchNorm layers; say how clients ran them with --set batchnorm=train_shared (with the "
            "batch's statistics, and running statistics come back), batchnorm=train_hidden (they do not) or "
            "batchnorm=eval (with running statistics)."
        )
    if known.dropout is None and drop_layers(network):
        raise ConfigError("the model has dropout; say how clients ran it with --set dropout=off or dropout=active.")
    if known.std is not None and known.mean is None:
        raise ConfigError("std was given without mean; pixels are normalised as (pixel - mean) / std, so give both.")
    bounds = Bounds.of(tuple(known.mean or [0.0] * shape[0]), tuple(known.std or [1.0] * shape[0]))
    if bounds.mean.shape[0] != shape[0]:
        raise ConfigError(f"mean and std need {shape[0]} numbers, one for each channel.")
    return Task.of(network.float(), shape, classes, bounds, batchnorm=known.batchnorm, dropout=known.dropout)


def summed(parts: list[Recorded]) -> Recorded:
    """What secure aggregation leaves of a round: the mean over clients, weighted by their images, and their number.

    Raises:
        Refused: the clients were sent different weights, so that nothing explains the mean as steps from one place.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(not torch.equal(one.weights.params[n], v) for one in parts for n, v in first.weights.params.items()):
        raise Refused("its clients were sent different weights, and a sum over them has no one start.")
    counts = [one.examples or 1 for one in parts]
    total = sum(counts)
    update = {
        name: torch.stack([one.update[name] * (n / total) for one, n in zip(parts, counts, strict=True)]).sum(0)
        for name in first.update
    }
    moved = {name: value for one in parts for name, value in one.moved.items() if bool(value.any())}
    examples = total if all(one.examples for one in parts) else None
    return Recorded(
        first.round, f"sum of {len(parts)}", first.weights, update, examples, first.config, moved, tuple(parts)
    )


OUTSIDE = 1e-3
"""How far pixels of secrets may lie outside [0, 1], as normalising and taking it back rounds."""


def _secrets(task: Task, folder: Path, parts: list[Recorded]) -> Secret | None:
    found = [read_secret(folder, one.round, one.client) for one in parts]
    kept = [one for one in found if one is not None]
    if len(kept) != len(found):
        return None
    secret = Secret(torch.cat([one.inputs for one in kept]), torch.cat([one.labels for one in kept]))
    if secret.inputs.shape[1:] == task.input_shape:  # others are refused when they are compared
        pixels = secret.inputs.float() * task.bounds.std + task.bounds.mean
        low, high = float(pixels.min()), float(pixels.max())
        if low < -OUTSIDE or high > 1.0 + OUTSIDE:
            raise DataError(
                f"the secrets of round {parts[0].round}, client {parts[0].client} are no pixels in [0, 1], but from "
                f"{low:.3g} to {high:.3g}: say how they were normalised with --set mean=[0.5] and --set std=[0.5], for "
                "example."
            )
    return secret
