"""Run a group of trials: secrets in, outcomes out. The secret reaches `observe` and the scorer, nothing between."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from keyhole.core.attack import Attack, IterativeAttack, SequentialAttack
from keyhole.core.defense import Defense
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.metric import Metric
from keyhole.core.registry import ATTACKS, BELIEFS, METRICS, RULES
from keyhole.core.rule import ClientRule
from keyhole.core.task import Task, fit_weights
from keyhole.core.tensors import flatten
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.trial import Outcome, Spec, Status, Trial
from keyhole.core.types import Batch, Observation, Weights
from keyhole.errors import KeyholeError, Refused, cause
from keyhole.experiment.controls import class_mean, neighbours, noise_update
from keyhole.experiment.plan import Group, base_attacker, build_defense, find_counter
from keyhole.experiment.setup import Setup
from keyhole.federation.norms import evaluating
from keyhole.metrics.identify import ENOUGH_CANDIDATES, identified
from keyhole.metrics.matching import assign
from keyhole.parts.labels import multiset_overlap
from keyhole.solve.drive import Paused, Watch, solve, without_then
from keyhole.solve.lift import Shared, lift

_SLICE = 250
"""Images in one forward pass of the scorer."""

WORTH_KEEPING = 1.0
"""Seconds from which on a group's simulated clients are kept for the next attacker."""

_ANY = Spec.of("any")

START_JITTER = 0.01
"""Standard deviation, in pixels, of the noise on public start images: an exactly flat image has no direction."""


@dataclass
class GroupResult:
    """Outcomes of a group, and the matched reconstructions behind them by trial hash, (b, c, h, w) in [0, 1]."""

    outcomes: list[Outcome]
    reconstructions: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one trial produced, before it is scored."""

    guesses: Tensor
    """Pixels, (r, c, h, w) in [0, 1]."""
    targets: Tensor | None
    status: Status
    evaluations: int
    history: tuple[tuple[int, float], ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    rounds: tuple[tuple[Status, int, bool], ...] = ()
    """Of each update of a series the status, the evaluations, and whether it was started from earlier ones."""
    judges: bool = False
    """Whether the attack itself says when an update is solved."""
    notes: dict[str, list[float]] = field(default_factory=dict)
    """What the defense put on record."""
    client_seconds: float = 0.0


def run_group(group: Group, setup: Setup, watch: Watch | None = None) -> GroupResult:
    """Run all trials of a group; whatever goes wrong becomes their status.

    Raises:
        Paused: the watch asked to stop. Nothing else, short of an interrupt.
    """
    began = time.perf_counter()
    try:
        answers = _answers(group, setup, watch or Watch())
    except (Paused, KeyboardInterrupt):
        raise
    except (MemoryError, OSError, torch.OutOfMemoryError) as error:
        # The machine's fault, not the attack's: nothing is stored, so that the same command can try again.
        raise KeyholeError(f"{cause(error)}; free some room, or use a smaller run.group, and run again.") from error
    except Refused as error:
        return _without_result(group, "refused", str(error), began)
    except Exception as error:
        if "allocate memory" in str(error):  # torch's CPU allocator raises a plain RuntimeError
            raise KeyholeError(f"{cause(error)}; use a smaller run.group, and run again.") from error
        return _without_result(group, "failed", traceback.format_exc(limit=8), began)
    seconds = (time.perf_counter() - began) / len(group.trials)
    result = GroupResult([])
    features = _Features(setup, group.trials[0])
    for trial, answer in zip(group.trials, answers, strict=True):
        _score(result, trial, answer, setup, seconds, features)
    if group.others:
        guesses = neighbours(torch.stack([answer.guesses for answer in answers]))
        for trial, answer, guess in zip(group.others, answers, guesses, strict=True):
            other = replace(answer, guesses=guess, targets=None, evaluations=0, history=())
            _score(result, trial, other, setup, 0.0, features)
    return result


def _without_result(group: Group, status: Status, detail: str, began: float) -> GroupResult:
    seconds = (time.perf_counter() - began) / len(group.trials)
    return GroupResult([Outcome(t, status, {}, seconds, 0, detail) for t in (*group.trials, *group.others)])


def _answers(group: Group, setup: Setup, watch: Watch) -> list[Answer]:
    first = group.trials[0]
    if first.attacker == "control:class_mean":
        return [_class_mean(trial, setup) for trial in group.trials]
    defense = build_defense(first.defense)
    task = defense.on_task(setup.task)
    attack, threat = _attack(first, task, defense)
    is_check = first.attacker == "check:truth"
    weights = tuple(fit_weights(task, own) for own in setup.networks(first))
    shared = Shared(weights)
    own_keys = [fold_in(new_key(t.seed), f"{t.pool} {t.episode}") for t in group.trials]
    keys = torch.stack(own_keys).to(setup.device)
    client = lift(lambda key: fold_in(key, "client"), shared)(keys)
    attacker = lift(lambda key: fold_in(key, "attacker"), shared)(keys)

    secret = _secret(group.trials, setup)
    images = _start_images(attack, group.trials, setup, attacker)
    if is_check:
        images = torch.cat([batch.inputs for batch in secret[: len(secret) // first.rounds]], 1)[:, None]
    observations, notes, seconds = _client(
        group.trials,
        setup,
        threat,
        lambda: _see(task, threat, defense, weights, secret, client, shared, public_images(setup)),
    )
    bound = _bound(defense, first, threat.rule, setup)
    facts = [{**fact, **bound} for fact in _facts(observations, len(group.trials))]
    if first.attacker == "control:prior_only":
        observations = tuple(_without_signal(o, attacker, shared) for o in observations)
    watch = replace(watch, limit=first.limit)
    if not attack.pictures:
        threat = replace(threat, counter=without_then(threat.counter))
    then = None if threat.counter.then is None else _start_images(threat.counter.then, group.trials, setup, attacker)
    solved = solve(attack, task, threat, observations, images, attacker, shared, watch, then)
    return [
        Answer(
            guesses=task.bounds.to_pixels(one.reconstruction.inputs).detach(),
            targets=one.reconstruction.targets,
            status=one.status,
            evaluations=one.evaluations,
            history=one.history,
            rounds=one.rounds,
            judges=isinstance(attack, SequentialAttack) or getattr(attack, "tolerance", 0.0) > 0,
            facts={**fact, "truth_loss": float(one.reconstruction.score)} if is_check else fact,
            detail=defense.remark(note)
            if math.isfinite(fact.get("update_norm", 0.0))
            else "the update holds values that are not finite",
            notes=note,
            client_seconds=seconds,
        )
        for one, fact, note in zip(solved, facts, _as_planned(notes, group.trials, setup), strict=True)
    ]


def _attack(trial: Trial, task: Task, defense: Defense) -> tuple[Attack, ThreatModel]:
    """The attack, for the self-test begun at the truth, and what its attacker sees and knows.

    Raises:
        Refused: it needs more than that.
    """
    attack: Attack = ATTACKS.build(trial.attack.name, **trial.attack.asdict())
    is_check = trial.attacker == "check:truth"
    sees = frozenset(trial.sees)
    rule: ClientRule = RULES.build(trial.rule.name, **trial.rule.asdict())
    steps = rule.steps(trial.batch_size)
    knows = trial.attacker
    if is_check or trial.attacker.startswith("control:"):
        knows = base_attacker(defense, sees | {"targets"} if is_check else sees, steps)
    counter = find_counter(defense, knows).told(trial.batch_size)
    if is_check:
        attack = attack.at_truth() if isinstance(attack, IterativeAttack) else attack
        sees |= (attack.needs & {"targets"}) | ({"masks"} if task.draws else set())
    missing = (attack.needs | counter.needs) - sees
    if missing:
        names = ", ".join(sorted(missing))
        raise Refused(f"'{trial.attack.name}' ({trial.attacker}) needs {names}, which this attacker does not see.")
    if counter.one_step and steps > 1:
        raise Refused(f"'{knows}' can only explain an update of one gradient; here it is made of {steps}.")
    threat = ThreatModel(
        rule=rule,
        belief=BELIEFS.build(trial.belief.name, rule=rule, **trial.belief.asdict()),
        batch_size=trial.batch_size,
        sees=sees,  # type: ignore[arg-type]
        counter=counter,
        repeated=trial.rounds > 1,
    )
    return attack, threat


def _client(trials: tuple[Trial, ...], setup: Setup, threat: ThreatModel, see: Callable[[], Any]) -> Any:
    """What the clients sent and noted, and the seconds of one update.

    All attackers of a cell look at the same updates. A client that took long, as those that optimise do, is
    simulated once and kept until another one is.
    """
    about = tuple(
        replace(trial, attack=_ANY, belief=_ANY, attacker="", limit=0, sees=tuple(sorted(threat.sees)))
        for trial in trials
    )
    kept = setup.last_client
    if kept.get("about") == about and kept.get("pool") is setup.data.target:
        return kept["sent"]
    began = time.perf_counter()
    observations, notes = see()
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    seconds = time.perf_counter() - began
    sent = observations, notes, seconds / (len(trials) * len(observations))
    kept.clear()
    if seconds > WORTH_KEEPING:
        kept |= {"about": about, "pool": setup.data.target, "sent": sent}
    return sent


def _bound(defense: Defense, trial: Trial, rule: ClientRule, setup: Setup) -> dict[str, float]:
    """What no attacker can exceed, as a fact, where the defense sets a bound that holds under this threat model."""
    rounds = setup.seen + trial.rounds * rule.steps(trial.batch_size)
    attacks = trial.attacker.partition(":")[0] in ("naive", "adaptive")
    # Networks that were trained here were trained on the secrets, so that more than the update tells of them.
    if not attacks or setup.facts.get(trial.seed) or defense.success_bound(0.5, rounds) is None:
        return {}
    # One guess for each image of the batch, and, where labels are given, another one for each class, at most.
    tries = trial.batch_size * (setup.task.num_classes if "targets" in trial.sees else 1)
    prior = min(1.0, tries * setup.prior)
    bound = defense.success_bound(prior, rounds)
    return {} if bound is None else {"success_bound": bound, "success_prior": prior}


def _see(
    task: Task,
    threat: ThreatModel,
    defense: Defense,
    weights: tuple[Weights, ...],
    secret: tuple[Batch, ...],
    keys: Tensor,
    shared: Shared,
    public: Batch,
) -> tuple[tuple[Observation, ...], list[dict[str, list[float]]]]:
    """`observe`, lifted over a group, and what the defense noted in each trial, averaged over local steps.

    Numbers of each image stay so only where every step saw the whole batch.
    """
    size = secret[0].inputs.shape[1]

    def see(batches: tuple[Batch, ...], key: Tensor) -> tuple[tuple[Observation, ...], dict[str, Tensor]]:
        # Updates of the same images share their notes, as what is counted adds up for these images.
        notes: list[dict[str, list[Tensor]]] = [{} for _ in (batches[:1] if threat.repeated else batches)]
        each = notes * len(batches) if threat.repeated else notes
        seen = observe(task, threat, defense, weights, batches, key, public, each)
        names = dict.fromkeys(name for one in notes for name in one)
        return seen, {name: joined([one[name] for one in notes if name in one]) for name in names}

    def joined(rounds: list[list[Tensor]]) -> Tensor:
        whole = all(value.shape == (size,) for values in rounds for value in values)
        each = [torch.stack([v if whole else v.mean() for v in values]).double().mean(0) for values in rounds]
        return torch.cat(each) if whole else torch.stack(each).mean(0)

    observations, notes = lift(see, shared)(secret, keys)
    return observations, [
        {name: value[i].flatten().tolist() for name, value in notes.items()} for i in range(keys.shape[0])
    ]


def public_images(setup: Setup) -> Batch:
    """The public images, as a batch in the model's input space."""
    pool = setup.data.public
    targets = torch.nn.functional.one_hot(pool.labels.to(setup.device), setup.task.num_classes).to(setup.dtype)
    inputs = setup.task.bounds.from_pixels(setup.images(pool))
    return Batch(inputs, targets, torch.full_like(targets[:, 0], 1.0 / len(pool)))


def _secret(trials: tuple[Trial, ...], setup: Setup) -> tuple[Batch, ...]:
    """The private batches of a group, one a round, with a leading trial axis."""
    size = trials[0].batch_size
    pool = setup.pool(trials[0].pool)
    rows = torch.tensor([t.episode for t in trials]).reshape(len(trials), -1, size)
    pixels, labels = setup.images(pool), pool.labels.to(setup.device)
    share = torch.full((len(trials), size), 1.0 / size, dtype=setup.dtype, device=setup.device)
    batches = []
    for turn in range(rows.shape[1]):
        own = rows[:, turn].to(setup.device)
        # Sorted by class, as the threat model's given labels are, so that the self-test starts at a truth in order.
        own = own.gather(1, labels[own].argsort(dim=1, stable=True))
        targets = torch.nn.functional.one_hot(labels[own], setup.task.num_classes).to(setup.dtype)
        batches.append(Batch(setup.task.bounds.from_pixels(pixels[own]), targets, share.clone()))
    return tuple(batches) * trials[0].rounds


def _as_planned(
    notes: list[dict[str, list[float]]], trials: tuple[Trial, ...], setup: Setup
) -> Iterator[dict[str, list[float]]]:
    """Numbers of each image in the order of the episode; the client had its batch in the order of classes."""
    for trial, noted in zip(trials, notes, strict=True):
        rows = list(trial.episode)
        back = setup.pool(trial.pool).labels[rows].argsort(stable=True).argsort().tolist()
        yield {name: [own[i] for i in back] if len(own) == len(rows) else own for name, own in noted.items()}


def _start_images(attack: Attack, trials: tuple[Trial, ...], setup: Setup, keys: Tensor) -> Tensor | None:
    """Public start images (trials, starts, r, *shape), or `None` where the attack starts from noise."""
    one = attack.inner if isinstance(attack, SequentialAttack) else attack
    if not isinstance(one, IterativeAttack):
        return None
    if one.initial == "random":
        # A series carries images on, so that its random starts are made here as well.
        return _noise(one, trials, setup, keys) if one is not attack else None
    public = setup.images(setup.data.public)
    if one.initial == "class_mean":
        flat = torch.stack([_mean_of_classes(trial, setup) for trial in trials])[:, None]
    else:
        flat = public.mean(0) if one.initial == "mean" else torch.full_like(public[0], 0.5)
    return setup.task.bounds.from_pixels(flat + START_JITTER * _noise(one, trials, setup, keys))


def _mean_of_classes(trial: Trial, setup: Setup) -> Tensor:
    """The mean public image of each label's class, in the order in which labels are given."""
    if "targets" not in trial.sees:
        raise Refused('start = "class_mean" needs targets, which this attacker does not see.')
    labels = setup.pool(trial.pool).labels[list(trial.episode)]
    # Sorted within each update: that is the order of given labels, and no other may reach the attacker.
    labels = labels.reshape(-1, trial.batch_size).sort(dim=1).values.flatten()
    public = setup.data.public
    return class_mean(setup.images(public), public.labels, labels)


def _noise(attack: IterativeAttack, trials: tuple[Trial, ...], setup: Setup, keys: Tensor) -> Tensor:
    """Standard normal noise, (trials, starts, r, *shape)."""
    shape = (attack.restarts, len(trials[0].episode), *setup.task.input_shape)
    return lift(lambda key: normal(fold_in(key, "start images"), shape, setup.dtype), Shared())(keys)  # type: ignore[no-any-return]


def _without_signal(observation: Observation, keys: Tensor, shared: Shared) -> Observation:
    """Noise for the update, and no batch statistics, as clients send both; see `noise_update`."""
    observation = observation._replace(statistics=None)
    if observation.update is None:
        return observation
    noise = lift(lambda update, key: noise_update(update, fold_in(key, "prior only")), shared)
    return observation._replace(update=noise(observation.update, keys))


def _facts(observations: tuple[Observation, ...], trials: int) -> list[dict[str, float]]:
    """Norm, share of zeros and share of entries in tensors that are all zero, of each trial's first update."""
    update = observations[0].update
    if update is None:
        return [{} for _ in range(trials)]
    flat = lift(flatten, Shared())(update)
    empty = [(u == 0).flatten(1).all(1).double() * (u.numel() / u.shape[0]) for u in update.values()]
    facts = {
        "update_norm": flat.norm(dim=1),
        "zeros": (flat == 0).double().mean(1),
        "withheld": torch.stack(empty).sum(0) / flat.shape[1],
    }
    return [{name: float(value[i]) for name, value in facts.items()} for i in range(trials)]


def _class_mean(trial: Trial, setup: Setup) -> Answer:
    labels = setup.pool(trial.pool).labels[list(trial.episode)]
    public = setup.data.public
    return Answer(class_mean(setup.images(public), public.labels, labels), None, "converged", 0)


class _Features:
    """What the undefended network of a group sees of images: the input of its head, with dropout off."""

    def __init__(self, setup: Setup, trial: Trial) -> None:
        self.setup, self.task = setup, evaluating(setup.task)
        self.weights = setup.networks(trial)[0]

    @torch.no_grad()
    def of(self, pixels: Tensor) -> Tensor:
        """Features (n, m) of pixels (n, c, h, w)."""
        inputs = self.task.bounds.from_pixels(pixels)
        parts = (inputs[i : i + _SLICE] for i in range(0, len(inputs), _SLICE))
        return torch.cat([self.task.trace(self.weights, part).features.flatten(1) for part in parts])

    @cached_property
    def candidates(self) -> Tensor:
        """Those of the retrieval candidates."""
        return self.of(self.setup.images(self.setup.data.candidates))


def _score(
    result: GroupResult, trial: Trial, answer: Answer, setup: Setup, seconds: float, features: _Features
) -> None:
    """Match guesses to secrets once, then compute every metric under that assignment."""
    pool = setup.pool(trial.pool)
    rows = list(trial.episode)
    truth = setup.images(pool)[rows]
    # Within each update of a series: a guess stands for an image of the update that it was made from.
    updates = len(rows) // trial.batch_size
    paired = [(g, t) for g, t in zip(answer.guesses.chunk(updates), truth.chunk(updates), strict=True)]
    guess = torch.cat([guesses[assign(guesses, truths)] for guesses, truths in paired])
    metrics: dict[str, list[float]] = {}
    for card in METRICS:
        metric: Metric = card.factory()
        metrics[card.name] = metric(guess, truth).tolist()
    if answer.targets is not None and trial.attacker.partition(":")[0] in ("naive", "adaptive"):
        true = torch.nn.functional.one_hot(pool.labels[rows], setup.task.num_classes).to(answer.targets)
        size = trial.batch_size
        overlaps = [
            multiset_overlap(answer.targets[i : i + size], true[i : i + size]) for i in range(0, len(rows), size)
        ]
        metrics["label_accuracy"] = [float(overlap) for overlap in overlaps for _ in range(size)]
    if answer.evaluations > 1 and trial.attacker.partition(":")[0] in ("naive", "adaptive"):
        ends = answer.rounds or ((answer.status, answer.evaluations, False),)
        each = len(rows) // len(ends)
        metrics["evaluations"] = [float(count) for _, count, _ in ends for _ in range(each)]
        if answer.judges:
            metrics["matched"] = [float(status == "converged") for status, _, _ in ends for _ in range(each)]
        if answer.rounds:
            metrics["carried"] = [float(carried) for _, _, carried in ends for _ in range(each)]
    candidates = setup.data.candidates
    if len(candidates) >= ENOUGH_CANDIDATES:
        metrics["identified"] = identified(guess, truth, setup.images(candidates)).tolist()
        found = identified(features.of(guess), features.of(truth), features.candidates)
        metrics["identified_by_features"] = found.tolist()
    result.outcomes.append(
        Outcome(
            trial,
            answer.status,
            metrics,
            seconds,
            answer.evaluations,
            answer.detail,
            answer.facts,
            answer.history,
            answer.notes,
            answer.client_seconds,
        )  # fmt: skip
    )
    result.reconstructions[trial.hash] = guess.detach().cpu().float().contiguous()
