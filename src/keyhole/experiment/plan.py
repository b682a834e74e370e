"""From an experiment to groups of trials: a function of the experiment alone, never of what was already done.

A cell is a defense under an attack. In each cell run the naive attacker, one adaptive attacker for each of the
defense's counters, the controls and the self-test.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from keyhole.core.defense import Counter, Defense, chain
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.rule import SingleGradient
from keyhole.core.trial import Outcome, Spec, Trial
from keyhole.experiment.setup import Setup
from keyhole.experiment.spec import AttackEntry, Experiment

CHECK_STEPS = 20
"""Evaluations of the self-test that starts at the truth: long enough to leave it, were there a reason to."""

Chosen = Callable[[tuple[Spec, ...], int, str], Spec]
"""The attack's spec for (defense, index of the attack, attacker), as tuned on the tune pool."""


@dataclass(frozen=True)
class Group:
    """Trials that run together because they differ only in images and keys.

    ``others`` are their control trials "other client": each is given its neighbour's reconstruction, so that it costs
    nothing and is exactly what the attack makes of somebody else's update.
    """

    trials: tuple[Trial, ...]
    others: tuple[Trial, ...] = ()

    @cached_property
    def hash(self) -> str:
        """A digest of the trials' hashes: the group's name on disk."""
        text = ",".join(trial.hash for trial in (*self.trials, *self.others))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_defense(specs: tuple[Spec, ...]) -> Defense:
    """The chain that a trial names."""
    return chain(*(DEFENSES.build(spec.name, **spec.asdict()) for spec in specs))


def find_counter(defense: Defense, attacker: str) -> Counter:
    """The counter that an attacker's name asks for; naive attackers have the one that does nothing."""
    kind, _, name = attacker.partition(":")
    if kind != "adaptive":
        return Counter()
    return next(counter for counter in defense.counters() if counter.name == name)


def base_attacker(defense: Defense) -> str:
    """The attacker that controls and self-test stand beside: the first adaptive one, or else the naive one."""
    counters = defense.counters()
    return f"adaptive:{counters[0].name}" if counters else "naive"


def plan_tuning(experiment: Experiment, setup: Setup) -> list[Group]:
    """Trials on the tune pool: every attacker of every cell tries the same grid, on the first network."""
    groups = []
    for entry, specs in itertools.product(experiment.attacks, experiment.defenses):
        for attacker in _tuned_attackers(specs) if entry.tune else ():
            for spec in _grid(entry):
                groups += _groups(experiment, setup, spec, specs, attacker, experiment.run.seeds[0], "tune")
    return _once(groups)


def _once(groups: list[Group]) -> list[Group]:
    """Each group once: two entries may name, or be tuned to, the same trials."""
    return list({group.hash: group for group in groups}.values())


def choose(experiment: Experiment, outcomes: Iterable[Outcome]) -> Chosen:
    """Read the tuned options off the tune pool: the best mean SSIM wins, the first among equals.

    The naive attacker does not know of the defense and takes what suits undefended updates.
    """
    scores: dict[tuple[tuple[Spec, ...], Spec, str], list[float]] = {}
    for outcome in outcomes:
        trial = outcome.trial
        if trial.pool == "tune":
            scores.setdefault((trial.defense, trial.attack, trial.attacker), []).extend(outcome.metrics.get("ssim", []))

    def chosen(defense: tuple[Spec, ...], index: int, attacker: str) -> Spec:
        entry = experiment.attacks[index]
        if not entry.tune:
            return entry.spec
        where = () if attacker == "naive" else defense
        tried = [(spec, scores.get((where, spec, attacker), [])) for spec in _grid(entry)]
        return max(tried, key=lambda pair: fmean(pair[1]) if pair[1] else float("-inf"))[0]

    return chosen


def plan(experiment: Experiment, setup: Setup, chosen: Chosen) -> list[Group]:
    """All trials on the target pool, in the order of the report."""
    groups: list[Group] = []
    for specs, (index, entry) in itertools.product(experiment.defenses, enumerate(experiment.attacks)):
        for seed in experiment.run.seeds:
            groups += _cell(experiment, setup, specs, index, seed, chosen)
            if not specs and index == 0:
                groups += _groups(experiment, setup, entry.spec, (), "control:class_mean", seed)
    return _once(groups)


def _cell(
    experiment: Experiment, setup: Setup, specs: tuple[Spec, ...], index: int, seed: int, chosen: Chosen
) -> Iterator[Group]:
    defense = build_defense(specs)
    base = base_attacker(defense)
    for attacker in ("naive", *(f"adaptive:{counter.name}" for counter in defense.counters())):
        spec = chosen(specs, index, attacker)
        yield from _groups(experiment, setup, spec, specs, attacker, seed, others=attacker == base)
    spec = chosen(specs, index, base)
    yield from _groups(experiment, setup, spec, specs, "control:prior_only", seed)
    counters = defense.counters()
    if not counters or counters[0].truth_loss == "zero":
        yield from _groups(experiment, setup, _for_check(spec), specs, "check:truth", seed)


def _for_check(spec: Spec) -> Spec:
    """The self-test is given the labels, in the secret's order: a wrong label would rightly pull it off the truth."""
    known = ATTACKS.card(spec.name).signature().parameters
    fixed = {"labels": "given", "restarts": 1, "steps": CHECK_STEPS, "tv": 0.0}
    return spec.replace(**{name: value for name, value in fixed.items() if name in known})


def _tuned_attackers(specs: tuple[Spec, ...]) -> list[str]:
    if not specs:
        return ["naive"]
    return [f"adaptive:{counter.name}" for counter in build_defense(specs).counters()]


def _grid(entry: AttackEntry) -> list[Spec]:
    names = list(entry.tune)
    return [
        entry.spec.replace(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*(entry.tune[name] for name in names))
    ]


def group_size(experiment: Experiment, setup: Setup) -> int:
    """Trials lifted together. Fixed by the experiment and the kind of device, never by free memory."""
    unknowns = experiment.client.batch_size * math.prod(setup.data.image_shape)
    # Large images get smaller groups: L-BFGS keeps 200 vectors of each trial.
    fitting = max(1, 2**30 // (200 * 4 * unknowns))
    return experiment.run.group or min(fitting, 256 if setup.device.type == "cuda" else 128)


def _groups(
    experiment: Experiment,
    setup: Setup,
    attack: Spec,
    defense: tuple[Spec, ...],
    attacker: str,
    seed: int,
    pool: str = "target",
    *,
    others: bool = False,
) -> list[Group]:
    size = experiment.client.batch_size
    count = experiment.run.samples if pool == "target" else len(setup.data.tune) // size * size
    episodes = [tuple(range(i, i + size)) for i in range(0, count, size)]

    def trial(name: str, episode: tuple[int, ...]) -> Trial:
        return Trial(
            source=setup.source,
            model=f"{experiment.model.label}#{setup.normalisation}",
            state=setup.states[seed],
            rule=experiment.client.rule,
            belief=SingleGradient().describe(),
            sees=tuple(sorted(experiment.attacker.sees)),
            defense=defense,
            attack=attack,
            attacker=name,
            episode=episode,
            batch_size=size,
            seed=seed,
            dtype=experiment.run.dtype + ("" if setup.device.type == "cpu" else f" on {setup.device.type}"),
            pool=pool,
            limit=experiment.run.budget,
        )

    width = group_size(experiment, setup)
    chunks = [episodes[i : i + width] for i in range(0, len(episodes), width)]
    if others and len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [chunks[-2] + chunks[-1]]  # a lone trial would have no neighbour to be its control
    return [
        Group(
            tuple(trial(attacker, e) for e in chunk),
            tuple(trial("control:other_client", e) for e in chunk) if others and len(chunk) > 1 else (),
        )
        for chunk in chunks
    ]
