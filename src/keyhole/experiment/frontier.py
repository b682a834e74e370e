"""Accuracy against leakage: train under each defense, then attack updates at the states of chosen rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keyhole.core.trial import Spec
from keyhole.errors import ConfigError
from keyhole.experiment.audit import Progress, Silent, audit
from keyhole.experiment.sections import StateSection, Study
from keyhole.experiment.sent_updates import attack_sent, keep_sent
from keyhole.experiment.train import Trained, folder_of, train
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.experiment.work import HERE, Workers

UNTRAINED = "untrained"
"""The setting of round 0, whose network is the same whatever it will be trained under."""

Namer = Callable[[tuple[Spec, ...]], str]


@dataclass(frozen=True)
class Place:
    """Where the networks of one setting of a frontier's audit come from."""

    setting: str
    round: int
    defense: int | None
    """Index of the defense that they were trained under; `None` where they are untrained."""


def places(plan: TrainingPlan, name: Namer) -> list[Place]:
    """The settings, defense by defense and round by round."""
    untrained = [Place(UNTRAINED, 0, None)] if 0 in plan.rounds else []
    return untrained + [
        Place(f"{name(specs)}, round {number}", number, index)
        for index, specs in enumerate(plan.defenses)
        for number in plan.rounds
        if number > 0
    ]


def study_of(plan: TrainingPlan, done: Sequence[Trained], folder: Path, name: Namer) -> Study:
    """One setting for each defense and round: updates of the networks trained so far, bare and under that defense.

    Bare ones belong to every setting: they tell what the network gives away from what the defense hides.
    """
    seen = {run.defense: max(r.seen for r in done if r.defense == run.defense) for run in done}

    def state(index: int, number: int) -> StateSection:
        file = folder_of(plan, folder, index, "{seed}") / f"round-{number:03d}.safetensors"
        return StateSection(train=str(file), seen=seen[plan.defenses[index]] * number)

    return study_at(plan, state, name)


def study_at(plan: TrainingPlan, state: Callable[[int, int], StateSection], name: Namer) -> Study:
    """The same with the networks that ``state`` gives for a defense's index and a round."""
    if plan.audit is None:
        raise ConfigError("a frontier needs an [audit] section with one [[audit.attacks]].")
    experiments = []
    for place in places(plan, name):
        changes: dict[str, object] = {"setting": place.setting}
        if place.defense is not None:
            specs = plan.defenses[place.defense]
            changes["state"] = state(place.defense, place.round)
            changes["defenses"] = ((), specs) if specs else ((),)
        experiments.append(plan.audit.model_copy(update=changes))
    return Study(title=plan.title, experiments=tuple(experiments))


def frontier(
    plan: TrainingPlan,
    folder: Path,
    *,
    name: Namer,
    jobs: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    workers: Workers = HERE,
) -> list[Trained]:
    """Train, then audit in ``folder/audit``, then attack what clients themselves sent, whatever of it is missing.

    Args:
        plan: what to train, and how to attack.
        folder: the output folder.
        name: names of defenses, for the settings of the audit.
        jobs: worker processes; 0 for one a core.
        device: ``cpu`` or ``cuda``.
        progress: told how far things are.
        workers: who trains the clients and runs the attacks.
    """
    progress = progress or Silent()
    if plan.audit is None:
        raise ConfigError("a frontier needs an [audit] section with one [[audit.attacks]].")
    done = train(plan, folder, jobs=jobs, device=device, told=progress.training, workers=workers)
    # However the folder is spelled, it is gone on with.
    study = study_of(plan, done, folder.resolve(), name)
    audit(study, folder / "audit", jobs=jobs, device=device, progress=progress, workers=workers)
    if plan.sent is not None:
        sent = attack_sent(plan, done, folder, jobs=jobs, told=progress.training)
        keep_sent(sent, folder, name, plan.audit.run.images)
    return done
