"""What trainings, and the audit of a frontier, would cost: `keyhole train X --dry-run`. Nothing is written."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from keyhole.core.defense import Counter
from keyhole.core.registry import ATTACKS
from keyhole.core.trial import Spec
from keyhole.core.types import Weights
from keyhole.experiment.dryrun import dry_run
from keyhole.experiment.frontier import Namer, study_at
from keyhole.experiment.plan import build_defense
from keyhole.experiment.prospect import Prospect, in_hours
from keyhole.experiment.recorded_attack import attempt
from keyhole.experiment.recorded_training import Known
from keyhole.experiment.recorded_work import attacks_of
from keyhole.experiment.sections import StateSection, Study
from keyhole.experiment.sent_updates import training_of
from keyhole.experiment.setup import find_device
from keyhole.experiment.train import Problem, training_key
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.experiment.transcript import Recorded, Secret
from keyhole.experiment.work import available_cores
from keyhole.federation.local import Round, train_round
from keyhole.federation.states import accuracy
from keyhole.solve.threads import one_thread


@dataclass(frozen=True)
class Rehearsal:
    """A plan before it runs."""

    plan: TrainingPlan
    client_seconds: dict[tuple[Spec, ...], float]
    """Of one client in the first round, by defense."""
    test_seconds: float
    """Of the test images after a round."""
    jobs: int
    """Trainings at a time."""
    audit: Prospect | None
    sent_seconds: float = 0.0
    """Core time of the attacks on what clients themselves send."""
    sent_bytes: int = 0
    """Of all transcripts."""

    def one_training(self, specs: tuple[Spec, ...]) -> float:
        """Seconds of one training under a defense, whose first round is done without it too."""
        federation = self.plan.federation
        guard = federation.clients * self.client_seconds[()] if specs else 0.0
        return federation.rounds * (federation.clients * self.client_seconds[specs] + self.test_seconds) + guard

    def core_seconds(self, specs: tuple[Spec, ...]) -> float:
        """All trainings under a defense."""
        return len(self.plan.run.seeds) * self.one_training(specs)

    @property
    def wall_seconds(self) -> float:
        """Of all trainings, each begun in the order of the plan by the first worker that is free."""
        free = [0.0] * self.jobs
        for specs in self.plan.defenses:
            for _ in self.plan.run.seeds:
                heapq.heapreplace(free, free[0] + self.one_training(specs))
        return max(free)


def study_to_come(plan: TrainingPlan, name: Namer) -> Study:
    """A frontier's audit before its trainings: networks that are not there yet have a name in place of a file.

    Raises:
        ConfigError: the plan has no ``[audit]``.
    """
    return study_at(plan, lambda index, number: StateSection(train=f"defense {index}, round {number}"), name)


def rehearse(plan: TrainingPlan, study: Study | None = None, *, jobs: int = 0, device: str = "cpu") -> Rehearsal:
    """Time the first round of one client under each defense, and the attacks of an audit on untrained networks.

    Args:
        plan: what would be trained.
        study: the `study_to_come` that would follow, if any.
        jobs: processes that it would have; 0 for one a core.
        device: ``cpu`` or ``cuda``.
    """
    where = find_device(device)
    problem = Problem(plan, where)
    with one_thread(where):
        _one_client(problem, ())  # a process does some things once
        seconds = {specs: _one_client(problem, specs) for specs in plan.defenses}
        began = time.perf_counter()
        accuracy(problem.task(()), problem.fresh((), plan.run.seeds[0]), *problem.test)
        tested = time.perf_counter() - began
    known = None if study is None else dry_run(study, jobs=jobs, device=device, later=lambda s: s.train != "none")
    at_a_time = min((jobs or available_cores()) if where.type == "cpu" else 1, len(plan.defenses) * len(plan.run.seeds))
    with one_thread(where):
        # On a CPU, as the attacks are.
        sent = 0.0 if study is None or plan.sent is None else _sent_seconds(Problem(plan, torch.device("cpu")))
    return Rehearsal(plan, seconds, tested, at_a_time, known, sent, _sent_bytes(problem))


def _one_client(problem: Problem, specs: tuple[Spec, ...]) -> float:
    """Seconds of the first client's first round."""
    began = time.perf_counter()
    _first_round(problem, specs)
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _first_round(problem: Problem, specs: tuple[Spec, ...]) -> tuple[Weights, Round]:
    """What the first client is sent, and what it sends."""
    seed = problem.plan.run.seeds[0]
    start, task = problem.fresh(specs, seed), problem.task(specs)
    targets = one_hot(problem.labels, task.num_classes).to(problem.inputs.dtype)
    back = train_round(
        task, start, problem.inputs, targets, problem.parts(seed)[:1],
        problem.federation.local(problem.plan.federation.server()), training_key(seed),
        defense=build_defense(specs) if specs else None, public=problem.public,
    )  # fmt: skip
    return start, back


def _sent_bytes(problem: Problem) -> int:
    """Of the global weights and all clients' updates in the recorded rounds of every training."""
    plan = problem.plan
    sizes = [sum(t.nbytes for part in problem.fresh(specs, plan.run.seeds[0]) for t in part.values())
             for specs in plan.defenses]  # fmt: skip
    return sum(sizes) * (plan.federation.clients + 1) * len(plan.recorded) * len(plan.run.seeds)


def _sent_seconds(problem: Problem) -> float:
    """From ten evaluations of each attack on the first client's first update, as if all were like that one."""
    plan, task, seed = problem.plan, problem.task(()), problem.plan.run.seeds[0]
    assert plan.sent is not None
    start, back = _first_round(problem, ())
    rows = problem.parts(seed)[0].to(problem.device)
    update = {name: value - back.weights.params[name][0] for name, value in start.params.items()}
    one = Recorded(1, "0", start, update, len(rows), {})
    training = training_of(plan.federation, task, one)
    secret = Secret(problem.inputs[rows], problem.labels[rows])
    each = 0.0
    for spec in attacks_of(Known(attacks=plan.sent.attacks), training):
        options = spec.asdict()
        whole = {"steps": 1, "restarts": 1} | {k: v for k, v in options.items() if k in ("steps", "restarts")}
        brief = {name: min(value, {"steps": 10, "restarts": 1}.get(name, value)) for name, value in whole.items()}
        attack = ATTACKS.build(spec.name, **options | {k: v for k, v in brief.items() if k in options})
        began = time.perf_counter()
        attempt(task, one, training, spec.name, attack, Counter(), seed, secret)
        ratio = whole["steps"] * whole["restarts"] / (brief["steps"] * brief["restarts"])
        each += (time.perf_counter() - began) * ratio
    attackers = sum(1 + len(build_defense(specs).counters()) if specs else 1 for specs in plan.defenses)
    return each * attackers * len(plan.run.seeds) * len(plan.recorded) * plan.sent.clients


def rehearsal_in_words(found: Rehearsal, name: Namer) -> Iterator[str]:
    """Lines of text."""
    plan, federation = found.plan, found.plan.federation
    yield f"{plan.title}: nothing has been run or written."
    yield ""
    seeds = len(plan.run.seeds)
    yield (
        f"Training: {len(plan.defenses) * seeds} networks ({len(plan.defenses)} defenses, {seeds} "
        f"seed{'s' * (seeds != 1)}), {federation.rounds} rounds of {federation.clients} clients each."
    )
    names = {specs: name(specs) for specs in plan.defenses}
    width = max(map(len, names.values()))
    for specs, label in names.items():
        each, together = found.client_seconds[specs], in_hours(found.core_seconds(specs))
        yield f"  {label:{width}}  {each:.2g} s a client and round, {together}"
    whole = sum(map(found.core_seconds, plan.defenses))
    yield f"  In all about {in_hours(found.wall_seconds)}, {found.jobs} at a time ({in_hours(whole)} of core time)."
    if found.audit is not None:
        cost, settings = found.audit.cost, found.audit.settings
        yield f"Audit: {sum(s.trials for s in settings)} trials in {len(settings)} settings."
        yield (
            f"  At most {in_hours(cost.wall_seconds)} with {cost.jobs} jobs ({in_hours(cost.core_seconds)} of core "
            f"time), about {found.audit.memory / 1e9:.1f} GB of memory."
        )
        if plan.sent is not None:
            count = len(plan.defenses) * seeds * len(plan.recorded) * plan.sent.clients
            yield (
                f"  {count} updates that clients themselves send: {in_hours(found.sent_seconds)} of core time, and "
                f"{found.sent_bytes / 1e6:.3g} MB of transcripts."
            )
        yield f"  Prediction without a defense, {settings[0].setting}: {settings[0].feasibility.verdict}."
    attacks = "" if found.audit is None else " and a few steps of each attack"
    yield f"Estimates, from the first round of one client{attacks} on this machine as it is now."
