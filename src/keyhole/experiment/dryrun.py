"""What an audit would do, cost and find, before it runs: `keyhole audit X --dry-run`. Nothing is written."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter

import torch

from keyhole.core.attack import Attack
from keyhole.core.registry import ATTACKS
from keyhole.core.trial import Spec
from keyhole.experiment.cost import Cost, Pacer, costliest, price
from keyhole.experiment.feasibility import predict
from keyhole.experiment.plan import Group, plan, plan_tuning
from keyhole.experiment.prospect import Outlook, Prospect
from keyhole.experiment.sections import AttackEntry, Experiment, StateSection, Study
from keyhole.experiment.setup import Setup, find_device, prepare
from keyhole.experiment.training import federation_of
from keyhole.experiment.work import available_cores
from keyhole.solve.memory import keep_freed_memory

Later = Callable[[StateSection], bool]


def dry_run(study: Study, *, jobs: int = 0, device: str = "cpu", later: Later = attrgetter("trained")) -> Prospect:
    """Plan a study, time its attacks and predict what they reach, on public images only.

    Networks that would be trained first are looked at untrained.

    Args:
        study: what would be run.
        jobs: worker processes that it would have; 0 for one a core.
        device: ``cpu`` or ``cuda``.
        later: says of a state whether its networks are not there yet.
    """
    began, where = time.perf_counter(), find_device(device)
    workers = (jobs or available_cores()) if where.type == "cpu" else 1
    threads = torch.get_num_threads()
    if where.type == "cpu":
        # As in the workers of a real run.
        torch.set_num_threads(1)
        keep_freed_memory()
    try:
        both = _prepared(study, where, later)
        program = _resident()
        pacer = Pacer()
        tuning, attacking = _groups(both, plan_tuning), _groups(both, _plan)
        costs = [price(_once(stage, both), pacer, workers) for stage in (tuning, attacking)]
        settings = tuple(_outlook(*pair, *both[i], pacer) for i, pair in enumerate(zip(tuning, attacking, strict=True)))
    finally:
        torch.set_num_threads(threads)
    whole = Cost(
        core_seconds=sum(cost.core_seconds for cost in costs),
        wall_seconds=sum(cost.wall_seconds for cost in costs),
        jobs=max(cost.jobs for cost in costs),
        memory=max(cost.memory for cost in costs),
    )
    processes = whole.jobs + (whole.jobs > 1)  # workers, and whoever waits for them
    return Prospect(study.title, settings, whole, processes * program + whole.memory, time.perf_counter() - began)


def _prepared(study: Study, device: torch.device, later: Later) -> list[tuple[Experiment, Setup]]:
    """Setups without training; settings that differ in nothing that is loaded share one."""
    known: dict[str, Setup] = {}
    both = []
    for experiment in study.experiments:
        state = experiment.state
        plain = experiment.model_copy(update={"state": StateSection()}) if later(state) else experiment
        fresh = (plain.client.series, plain.client.fresh_weights)
        name = repr((plain.data, plain.model, plain.state, plain.run.seeds, plain.run.dtype, fresh))
        if name not in known:
            known[name] = prepare(plain, device)
        setup = known[name]
        if later(state):
            # Another name, as these trials are not those of the untrained networks, or of those trained otherwise.
            setup = replace(setup, states={seed: f"{state.train}#not trained: {state!r}" for seed in setup.states})
        both.append((experiment, setup))
    return both


def _plan(experiment: Experiment, setup: Setup) -> list[Group]:
    """As if tuning had chosen the costliest options."""

    def chosen(defense: tuple[Spec, ...], index: int, attacker: str) -> Spec:
        return costliest(experiment.attacks[index])

    return plan(experiment, setup, chosen)


def _groups(
    both: list[tuple[Experiment, Setup]], make: Callable[[Experiment, Setup], list[Group]]
) -> list[list[Group]]:
    return [[replace(group, setting=i) for group in make(*pair)] for i, pair in enumerate(both)]


def _once(stage: list[list[Group]], both: list[tuple[Experiment, Setup]]) -> list[tuple[Group, Setup]]:
    """Groups of all settings, each once, with their setups."""
    unlike = {group.hash: group for groups in reversed(stage) for group in reversed(groups)}
    return [(group, both[group.setting][1]) for group in reversed(unlike.values())]


def _outlook(
    tuning: list[Group], attacking: list[Group], experiment: Experiment, setup: Setup, pacer: Pacer
) -> Outlook:
    trials = [trial for group in attacking for trial in (*group.trials, *group.others)]
    tried = {costliest(entry): _tuned(entry) for entry in experiment.attacks}
    cells = dict.fromkeys(
        (_chain(trial.defense), tried.get(trial.attack, _short(trial.attack)), trial.attacker) for trial in trials
    )
    tuned = sum(len(group.trials) for group in tuning)
    problems = dict.fromkeys(_problems(attacking, setup, pacer))
    return Outlook(
        setting=experiment.setting,
        cells=tuple(cells),
        trials=len(trials) + tuned,
        tuning=tuned,
        groups=len(tuning) + len(attacking),
        core_seconds=price([(group, setup) for group in (*tuning, *attacking)], pacer, 1).core_seconds,
        problems=tuple(problems),
        training=_training(experiment),
        feasibility=predict(experiment, setup, _runnable(attacking, setup, pacer)),
    )


def _chain(defense: tuple[Spec, ...]) -> str:
    return " -> ".join(str(spec) for spec in defense) or "none"


def _short(spec: Spec) -> str:
    """Name and those options that differ from their defaults."""
    known = ATTACKS.card(spec.name).signature().parameters
    given = [f"{k}={v}" for k, v in spec.options if v != known[k].default]
    return f"{spec.name}({', '.join(given)})" if given else spec.name


def _tuned(entry: AttackEntry) -> str:
    """Likewise; options that are tuned are named as such."""
    fixed = Spec(entry.spec.name, tuple(pair for pair in entry.spec.options if pair[0] not in entry.tune))
    return f"{_short(fixed)}, {' and '.join(entry.tune)} tuned" if entry.tune else _short(fixed)


def _problems(groups: list[Group], setup: Setup, pacer: Pacer) -> Iterator[str]:
    for group in groups:
        trial = group.trials[0]
        if trial.attacker.partition(":")[0] in ("naive", "adaptive"):
            pace = pacer.pace(trial, setup, len(group.trials))
            if pace.problem:
                yield f"{trial.attack.name}, {trial.attacker}, {_chain(trial.defense)}: {pace.problem}"


def _runnable(groups: list[Group], setup: Setup, pacer: Pacer) -> list[Attack]:
    """Attacks that ran undefended when they were timed."""
    naive = [g for g in groups if g.trials[0].attacker == "naive" and not g.trials[0].defense]
    ran = [g.trials[0].attack for g in naive if not pacer.pace(g.trials[0], setup, len(g.trials)).problem]
    return [ATTACKS.build(spec.name, **spec.asdict()) for spec in dict.fromkeys(ran)]


def _training(experiment: Experiment) -> str:
    if not experiment.state.trained:
        return ""
    federation, networks = federation_of(experiment), len(experiment.run.seeds)
    return (
        f"{networks} network{'s' * (networks > 1)} would first be trained ({experiment.state.train}: "
        f"{federation.rounds} rounds of {federation.clients} clients) or taken from the cache; the cost is without it."
    )


def _resident() -> float:
    """Bytes that this process has taken at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
