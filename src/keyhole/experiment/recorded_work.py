"""Attacks on recorded updates, one after another or side by side; what is done is kept, and not done twice.

An update's attacks are kept in one file in the folder ``updates`` of an output folder, under its name: images found,
and what is said of them. The file grows by one attack at a time; an attack that was cut off goes on from its
checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import keyhole.experiment.spec  # noqa: F401  (fills the registries)
from keyhole.core.attack import Attack
from keyhole.core.defense import Counter, Defense, chain
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.task import Task
from keyhole.core.told import Told, silent
from keyhole.core.trial import Spec
from keyhole.core.types import Tensors
from keyhole.experiment.feasibility import Reason, Verdict
from keyhole.experiment.options import method
from keyhole.experiment.recorded_attack import Attempt, attempt, explained_up_to
from keyhole.experiment.recorded_batchnorm import statistics_of
from keyhole.experiment.recorded_prediction import predict
from keyhole.experiment.recorded_training import Known, Training
from keyhole.experiment.store import Store
from keyhole.experiment.transcript import Recorded, Secret
from keyhole.experiment.work import available_cores, in_processes
from keyhole.federation.cache import probe
from keyhole.solve.drive import Watch
from keyhole.solve.files import as_metadata, digest, make_folder, read_tensors, write_tensors
from keyhole.solve.threads import one_thread

VERSION = 1
"""Raise it when attacks on the same update find something else, or when the files change."""

ONE_STEP = (
    {"name": "idlg", "steps": 400, "restarts": 2},
    {"name": "inverting_gradients", "steps": 800, "restarts": 2, "tv": 0.0},
)
"""Attacks on one step where nothing else is said: the second finds its way where there are kinks."""

STEPS = ({"name": "inverting_gradients", "steps": 800, "restarts": 2},)
"""Attacks on several steps."""


@dataclass(frozen=True, eq=False)
class Case:
    """One update, and what is known of it."""

    update: Recorded
    training: Training
    secret: Secret | None
    known: Known
    still: tuple[str, ...] = ()
    """Parameters that did not move, as frozen ones do not: there is an attacker who leaves them out, too."""
    network: int = 0
    """Which of several networks, as `Networks` numbers them."""


Networks = Callable[[int], tuple[nn.Module, Task]]
"""What was trained, by number: the user's model, and the task that it is. Picklable, and cheap to call again."""


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


def attacks_of(known: Known, training: Training) -> list[Spec]:
    """Those that were asked for, or else those that fit how the client trained."""
    specs = [method(ATTACKS, raw, "attack") for raw in known.attacks or (ONE_STEP if training.steps == 1 else STEPS)]
    if training.scale_known or known.attacks is not None:
        return specs
    # A distance of lengths would compare with a guess at the learning rate.
    return [spec for spec in specs if spec.name == "inverting_gradients"]


def attack_all(
    cases: Mapping[str, Case], networks: Networks, folder: Path | None = None, jobs: int = 1, told: Told = silent
) -> list[Finding]:
    """Attack updates, or read what is kept of earlier attacks on the very same.

    Args:
        cases: by names that files can have.
        networks: what was trained.
        folder: the output folder; `None` keeps nothing.
        jobs: updates at a time, in worker processes; 0 for one a core.
        told: told which update is how far.
    """
    with one_thread(torch.device("cpu")):
        if folder is None:
            return [_Work(case, networks(case.network), None).run(silently) for case in cases.values()]
        place = folder / "updates"
        # Before the folder is made: bad input must leave nothing behind.
        known = functools.cache(networks)
        works = {name: _Work(case, known(case.network), place / name) for name, case in cases.items()}
        with Store(folder):
            make_folder(place / _CHECKPOINTS)
            for leftover in place.glob("*.partial"):
                leftover.unlink()
            missing = {name: (name, cases[name]) for name, work in works.items() if not work.done}
            jobs = min(jobs or available_cores(), len(missing))
            if jobs > 1:
                spoken = {_spoken(name): work for name, work in missing.items()}
                for name, _ in in_processes(_Worker(networks, place), spoken, jobs, told):
                    told(name, 1.0)
            found = [work.run(partial(told, _spoken(name))) for name, work in works.items()]
            shutil.rmtree(place / _CHECKPOINTS)
    return found


def _spoken(name: str) -> str:
    return f"attacking {name}"


def silently(fraction: float) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class _Worker:
    """Called in a worker with a case and its name; what it finds is in the case's file."""

    networks: Networks
    place: Path

    def __call__(self, named: tuple[str, Case], progress: Callable[[float], None]) -> None:
        name, case = named
        _Work(case, self.networks(case.network), self.place / name).run(progress)


_CHECKPOINTS = "checkpoints"


@dataclass
class _Kept:
    """What a case's file says."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    attempts: list[Attempt] = field(default_factory=list)


class _Work:
    """A case with its attacks."""

    def __init__(self, case: Case, trained: tuple[nn.Module, Task], path: Path | None) -> None:
        self.case, (network, self.task) = case, trained
        known, training = case.known, case.training
        specs = attacks_of(known, training)
        links = [method(DEFENSES, raw, "defense") for raw in known.defense]
        self.links = [spec.name for spec in links]
        if case.still and not links:
            links = [method(DEFENSES, {"name": "withhold", "layers": ",".join(case.still)}, "defense")]
        self.known_defense = bool(links)
        self.defense: Defense = chain(*(DEFENSES.build(spec.name, **spec.asdict()) for spec in links))
        counters = [Counter(), *self.defense.counters()] if links else [Counter()]
        built: list[tuple[str, Attack]] = [(spec.name, ATTACKS.build(spec.name, **spec.asdict())) for spec in specs]
        self.attacks = [attack for _, attack in built]
        self.planned = [(name, attack, counter) for name, attack in built for counter in counters]
        self.statistics, self.words = statistics_of(network, self.task, case.update, training)
        self.identity = self._identity([*specs, *links]) if path is not None else ""
        # By what it is of: another transcript, or other knowledge, in the same folder has files of its own.
        self.path = None if path is None else path.with_name(f"{path.name}-{self.identity[:8]}.safetensors")

    def _identity(self, specs: Sequence[Spec]) -> str:
        case, one, task = self.case, self.case.update, self.task
        parts = [*one.weights, one.update, one.moved]
        secret = {} if case.secret is None else {"inputs": case.secret.inputs, "labels": case.secret.labels}
        made_from = {
            "version": VERSION,
            "update": [one.name, one.examples, digest(*parts), digest(secret)],
            "network": [
                probe(task, one.weights),
                *map(str, (task.batchnorm, task.drops, task.noises)),
                digest({"mean": task.bounds.mean, "std": task.bounds.std}),
                digest(self.statistics or {}),
            ],
            "training": repr(case.training),
            "methods": [(spec.name, spec.version, repr(spec.options)) for spec in specs],
            "seed": case.known.seed,
        }
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether all of it is kept."""
        kept = self._read()
        return kept is not None and len(kept.attempts) == len(self.planned)

    def run(self, progress: Callable[[float], None]) -> Finding:
        """What is kept, and the attacks that are missing."""
        case, task = self.case, self.task
        one, training = replace(case.update, statistics=self.statistics), case.training
        if one.parts and self.links:
            words = "counters of the defense are made for one client's update, and tried on the sum as they are"
            training = replace(training, words=(*training.words, words))
        training = replace(training, words=(*training.words, *filter(None, [self.words])))
        kept = self._read() or _Kept(*predict(task, one, training, self.attacks, self.links))
        for place, (name, attack, counter) in enumerate(self.planned[len(kept.attempts) :], len(kept.attempts)):
            watch = self._watch(place, progress)
            found = attempt(task, one, training, name, attack, counter, case.known.seed, case.secret, watch)
            limit = explained_up_to(task, one, training, counter, self.defense if self.known_defense else None)
            kept.attempts.append(replace(found, explained_up_to=limit))
            self._write(kept)
        progress(1.0)
        truth = None if case.secret is None else task.bounds.to_pixels(case.secret.inputs.float())
        return Finding(one, training, kept.verdict, kept.reasons, tuple(kept.attempts), truth)

    def _watch(self, place: int, progress: Callable[[float], None]) -> Watch:
        """Of one attack."""
        checkpoint = None
        if self.path is not None:
            checkpoint = self.path.parent / _CHECKPOINTS / f"{self.identity[:16]}-{place}.safetensors"
        return Watch(checkpoint=checkpoint, progress=lambda fraction: progress((place + fraction) / len(self.planned)))

    def _write(self, kept: _Kept) -> None:
        if self.path is None:
            return
        told = [{k: v for k, v in vars(one).items() if k != "guesses"} for one in kept.attempts]
        account = {
            "identity": self.identity,
            "verdict": kept.verdict,
            "reasons": [reason._asdict() for reason in kept.reasons],
            "attempts": told,
        }
        write_tensors(self.path, _guesses(kept.attempts), as_metadata(account))

    def _read(self) -> _Kept | None:
        """What an earlier call left of the same case."""
        from safetensors import SafetensorError

        if self.path is None or not self.path.exists():
            return None
        try:
            guesses, account = read_tensors(self.path)
            if account["identity"] != self.identity:
                return None
            attempts = [
                Attempt(**{**told, "labels": tuple(told["labels"]), "guesses": guesses[str(place)]})
                for place, told in enumerate(account["attempts"])
            ]
            reasons = tuple(Reason(**reason) for reason in account["reasons"])
            return _Kept(account["verdict"], reasons, attempts)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{self.path} is damaged ({error}); its update is attacked anew.", stacklevel=3)
            return None


def _guesses(attempts: Sequence[Attempt]) -> Tensors:
    return {str(place): one.guesses for place, one in enumerate(attempts)}
