"""What clients themselves sent in a frontier's trainings, attacked: many steps on many images, as the server got it.

The frontier's audit attacks updates of single images, which tell most of them; these here are what a server of that
training would have had. They are read from the transcript that the training wrote.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keyhole.core.rule import LocalSGD
from keyhole.core.task import Task
from keyhole.core.told import Told, silent
from keyhole.core.trial import Spec
from keyhole.core.types import Tensors
from keyhole.experiment.controls import class_mean
from keyhole.experiment.recorded_attack import scored
from keyhole.experiment.recorded_training import Known, Training, scale_of
from keyhole.experiment.recorded_work import Case, Finding, attack_all
from keyhole.experiment.store import Store
from keyhole.experiment.train import SECRETS, TRANSCRIPT, Problem, Trained
from keyhole.experiment.training_plan import FederationSection, TrainingPlan
from keyhole.experiment.transcript import Recorded, Secret, read_secret, read_transcript
from keyhole.solve.files import write_tensors

FOLDER, FILE, PICTURES = "sent", "sent.json", "pictures.safetensors"
"""In a frontier's folder: what the attacks found, what is said of it, and in the first one, pictures for the report."""


@dataclass(frozen=True, eq=False)
class SentUpdate:
    """One client's update in one round of one training, and what came of the attacks on it."""

    name: str
    """Of the file that keeps it."""
    defense: tuple[Spec, ...]
    seed: int
    finding: Finding
    class_mean: tuple[float, ...] = ()
    """SSIM of each secret to the mean public image of its class, which is a guess without the update."""

    def asdict(self, name: Callable[[tuple[Spec, ...]], str]) -> dict[str, Any]:
        """All but pictures, for JSON; ``name`` names defenses."""
        found = self.finding
        return {
            "file": self.name,
            "defense": name(self.defense),
            "seed": self.seed,
            "round": found.update.round,
            "client": found.update.client,
            "images": found.training.images,
            "steps": found.training.steps,
            "training": list(found.training.words),
            "prediction": found.verdict,
            "class_mean": list(self.class_mean),
            "attacks": [
                {
                    "attack": one.attack,
                    "attacker": one.attacker,
                    "status": one.status,
                    "detail": one.detail,
                    "score": None if math.isnan(one.score) else one.score,
                    "evaluations": one.evaluations,
                    "metrics": one.metrics,
                    "control": one.control,
                }
                for one in found.attempts
            ],
        }


def attack_sent(
    plan: TrainingPlan, done: Sequence[Trained], folder: Path, *, jobs: int = 1, told: Told = silent
) -> list[SentUpdate]:
    """Attack what the first clients sent in the recorded rounds, or read what is kept of it.

    Args:
        plan: with ``[audit.sent]``; without it nothing is attacked.
        done: its trainings.
        folder: of the frontier.
        jobs: updates at a time; 0 for one a core.
        told: told which update is how far.
    """
    if plan.sent is None:
        return []
    networks = Trainings(plan)
    cases: dict[str, Case] = {}
    whose: list[tuple[str, tuple[Spec, ...], int]] = []
    for run in done:
        index = plan.defenses.index(run.defense)
        network, task = networks(index)
        clients = [str(client) for client in range(plan.sent.clients)]
        transcript = read_transcript(run.folder / TRANSCRIPT, task.model, plan.recorded, clients)
        chain = [{"name": spec.name, **spec.asdict()} for spec in run.defense]
        known = Known(attacks=plan.sent.attacks, defense=chain, seed=run.seed)
        for one in transcript.updates:
            secret = read_secret(run.folder / SECRETS, one.round, one.client)
            assert secret is not None and one.examples is not None
            training = training_of(plan.federation, task, one)
            name = f"{run.folder.parent.name}-seed-{run.seed}-round-{one.round:04d}-client-{one.client}"
            cases[name] = Case(one, training, secret, known, network=index)
            whose.append((name, run.defense, run.seed))
    found = attack_all(cases, networks, folder / FOLDER, jobs, told)
    return [
        SentUpdate(*own, finding, networks.class_mean(case.secret))
        for own, finding, case in zip(whose, found, cases.values(), strict=True)
    ]


def keep_sent(sent: Sequence[SentUpdate], folder: Path, name: Callable[[tuple[Spec, ...]], str], images: str) -> None:
    """Write what a report shows, so that it needs no data again.

    Args:
        sent: what was attacked.
        folder: of the frontier.
        name: names of defenses.
        images: ``run.images`` of the audit: whether ``reconstructions`` or ``all``, secrets too, may be shown.
    """
    Store(folder).write_text(FILE, json.dumps([one.asdict(name) for one in sent], indent=1) + "\n")
    if images == "none":
        return
    pictures: Tensors = {}
    for one in sent:
        if not one.defense:
            pictures |= {f"{one.name}/{place}": attempt.guesses for place, attempt in enumerate(one.finding.attempts)}
            if images == "all" and one.finding.truth is not None:
                pictures[f"{one.name}/secret"] = one.finding.truth
    write_tensors(folder / FOLDER / PICTURES, pictures, {})


def training_of(federation: FederationSection, task: Task, one: Recorded) -> Training:
    """How such a client trained, as its attacker knows it: all but the order of its images.

    With momentum steps get longer: those of one direction by ``(1 - m^k) / (1 - m)`` at the k-th. Where gradients are
    clipped the lengths of steps are not known, and only directions are compared; label rules, which need a length, get
    what `scale_of` says.
    """
    assert one.examples is not None
    images = one.examples
    batch = min(federation.batch_size, images)
    steps = federation.epochs * -(-images // batch)
    m = federation.momentum
    longer = sum((1 - m**k) / (1 - m) for k in range(1, steps + 1)) / steps
    rate = federation.lr * longer
    if federation.clip:
        rate = scale_of(task, one, images, steps, rate * steps) / steps
    rule = LocalSGD(federation.epochs, rate, batch, "fixed" if steps == 1 else "shuffled")
    words = [
        f"{images} image{'s' * (images != 1)}",
        f"{steps} step{'s' * (steps != 1)} of up to {batch} at learning rate {federation.lr:g}, momentum {m:g}",
    ]
    if federation.clip:
        words.append(f"gradients clipped to a norm of {federation.clip:g}, so that lengths of steps are not known")
    if federation.weight_decay:
        words.append("weight decay, which the attacks leave out")
    if federation.strategy == "fedprox":
        words.append("the proximal term, which the attacks leave out")
    # A batch that is filled up has some images twice, which attacks do not model either.
    apart = images % federation.batch_size > 0 or federation.weight_decay > 0
    return Training(rule, images, steps, not federation.clip, tuple(words), assumed=apart)


@dataclass(frozen=True)
class Trainings:
    """Networks of a plan, numbered by their defenses."""

    plan: TrainingPlan

    @cached_property
    def _problem(self) -> Problem:
        # The training has told whatever there is to be warned of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Problem(self.plan, torch.device("cpu"))

    def __call__(self, number: int) -> tuple[nn.Module, Task]:
        """Any seed's, as weights come from the transcript."""
        return self._problem.network(0), self._problem.task(self.plan.defenses[number])

    def class_mean(self, secret: Secret | None) -> tuple[float, ...]:
        """SSIM of the mean public images of a client's classes to its secrets, paired as guesses of an attack are."""
        assert secret is not None
        public = self._problem.data.public
        guesses = class_mean(public.images, public.labels, secret.labels)
        return tuple(scored(self._problem.bounds, guesses, secret)[1]["ssim"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Trainings, (self.plan,)
