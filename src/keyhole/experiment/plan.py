"""From an experiment to groups of trials: a function of the experiment alone, never of what was already done.

A cell is a defense under an attack. In each cell run the naive attacker, one adaptive attacker for each of the
defense's counters, the controls and the self-test.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from keyhole.core.attack import IterativeAttack
from keyhole.core.defense import Counter, Defense, chain
from keyhole.core.registry import ATTACKS, BELIEFS, DEFENSES, RULES
from keyhole.core.rule import ClientRule
from keyhole.core.trial import Outcome, Spec, Trial
from keyhole.errors import ConfigError
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
    setting: int = 0
    """Which experiment of the study it belongs to."""

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


def base_counter(defense: Defense, sees: Collection[str], steps: int) -> Counter | None:
    """The first counter that has what it needs: controls and self-test stand beside it. `None`: beside the naive one.

    Args:
        defense: what the client does.
        sees: what the attacker sees.
        steps: gradients behind one update.
    """
    able = (c for c in defense.counters() if c.needs <= set(sees) and (steps == 1 or not c.one_step))
    return next(able, None)


def base_attacker(defense: Defense, sees: Collection[str], steps: int) -> str:
    """The attacker that controls and self-test stand beside; see `base_counter`."""
    counter = base_counter(defense, sees, steps)
    return "naive" if counter is None else f"adaptive:{counter.name}"


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


def choose(experiment: Experiment, setup: Setup, outcomes: Iterable[Outcome]) -> Chosen:
    """Read the tuned options off the tune pool: the best mean SSIM wins, the first among equals.

    The naive attacker does not know of the defense and takes what suits undefended updates.
    """
    scores: dict[tuple[tuple[Spec, ...], Spec, str], list[float]] = {}
    # Other settings of the audit tune the same options on other images or networks.
    own = {trial.hash for group in plan_tuning(experiment, setup) for trial in group.trials}
    for outcome in outcomes:
        trial = outcome.trial
        if trial.hash in own:
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
    base = base_attacker(defense, experiment.sees, _steps(experiment))
    for attacker in ("naive", *(f"adaptive:{counter.name}" for counter in defense.counters())):
        spec = chosen(specs, index, attacker)
        yield from _groups(experiment, setup, spec, specs, attacker, seed, others=attacker == base)
    spec = chosen(specs, index, base)
    yield from _groups(experiment, setup, spec, specs, "control:prior_only", seed)
    if _truth_stays(experiment, spec, defense):
        yield from _groups(experiment, setup, _for_check(spec), specs, "check:truth", seed)


def _truth_stays(experiment: Experiment, spec: Spec, defense: Defense) -> bool:
    """Whether starting at the truth must lead nowhere else: nothing random is left that the attacker does not know."""
    client, steps = experiment.client, _steps(experiment)
    counter = base_counter(defense, {*experiment.sees, "targets"}, steps)
    iterative = isinstance(ATTACKS.build(spec.name, **spec.asdict()), IterativeAttack)
    known = not RULES.build(client.rule, **client.spec.asdict()).order_matters(client.size)
    stays = not defense.counters() if counter is None else counter.truth_stays(client.rounds, client.series, steps)
    return iterative and known and stays


def _steps(experiment: Experiment) -> int:
    """Gradients behind one update."""
    client = experiment.client
    rule: ClientRule = RULES.build(client.rule, **client.spec.asdict())
    return rule.steps(client.size)


def _for_check(spec: Spec) -> Spec:
    """The self-test is short, without a prior that would rightly pull it off the truth; for labels see `at_truth`."""
    known = ATTACKS.card(spec.name).signature().parameters
    fixed = {"restarts": 1, "steps": CHECK_STEPS, "tv": 0.0}
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
    rule = RULES.build(experiment.client.rule, **experiment.client.spec.asdict())
    belief = BELIEFS.build(experiment.attacker.spec.name, rule=rule, **experiment.attacker.spec.asdict())
    unknowns = belief.copies * experiment.client.size * math.prod(setup.data.image_shape)
    # Large images get smaller groups: L-BFGS keeps 200 vectors of each trial.
    fitting = max(1, 2**30 // (200 * 4 * unknowns))
    return experiment.run.group or min(fitting, 256 if setup.device.type == "cuda" else 128)


def _episodes(experiment: Experiment, setup: Setup, pool: str) -> Iterator[tuple[int, ...]]:
    """Rows of each trial: a batch, or a series of them. Tuning takes one update at a time."""
    client = experiment.client
    if pool == "tune":
        rows, length = list(range(len(setup.data.tune) // client.size * client.size)), client.size
    else:
        rows, length = compose(setup.data.target.labels.tolist(), experiment), client.size * client.series
    for start in range(0, len(rows), length):
        yield tuple(rows[start : start + length])


def compose(labels: list[int], experiment: Experiment) -> list[int]:
    """Rows of the target pool in the order in which updates take them.

    ``equal`` takes batches of one class; ``distinct`` deals the same images out again, each batch with every class at
    most once, so that the two can be compared image by image.

    Raises:
        ConfigError: the pool has too few images of one class, or too few classes.
    """
    client, samples = experiment.client, experiment.run.samples
    if client.labels == "any":
        return list(range(samples))
    size, batches = client.size, samples // client.size
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    # One batch a class first: dealing out distinct batches needs as many classes as a batch has images.
    full = [own[i : i + size] for i in range(0, samples, size) for _, own in sorted(by_class.items())]
    equal = [batch for batch in full if len(batch) == size][:batches]
    if len(equal) < batches:
        raise ConfigError(
            f'client.labels = "{client.labels}" with {batches} batches of {size} needs more images of one class than '
            "the target pool has; raise data.target or lower run.samples."
        )
    if client.labels == "equal":
        return [row for batch in equal for row in batch]
    dealt = [batch[i] for i in range(size) for batch in equal]
    for start in range(0, samples, size):
        own = [labels[row] for row in dealt[start : start + size]]
        if len(set(own)) < len(own):
            raise ConfigError(
                f'client.labels = "distinct" cannot deal {samples} images into batches of {size} distinct classes '
                "here; take run.samples of at least the square of the batch size, or a larger data.target."
            )
    return dealt


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
    client = experiment.client
    is_check = attacker == "check:truth"
    # The attack on noise does without all that a client sends.
    unseen = {"statistics"} if attacker == "control:prior_only" else set()
    episodes = list(_episodes(experiment, setup, pool))

    def trial(name: str, episode: tuple[int, ...]) -> Trial:
        return Trial(
            source=setup.source,
            model=f"{experiment.model.label}#{setup.normalisation}",
            state=setup.states[seed],
            rule=client.spec,
            # The self-test is about this code, not about what an attacker believes.
            belief=Spec.of("exact") if is_check else experiment.attacker.spec,
            sees=tuple(field for field in experiment.sees if field not in unseen),
            defense=defense,
            attack=attack,
            attacker=name,
            episode=episode,
            batch_size=client.size,
            seed=seed,
            rounds=client.rounds,
            fresh=client.fresh_weights,
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
