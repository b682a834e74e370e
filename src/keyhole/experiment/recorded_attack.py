"""One attack on one recorded update, and its scores where the secret is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from keyhole.core.attack import Attack, IterativeAttack
from keyhole.core.belief import Belief, Simulated
from keyhole.core.defense import Counter, Defense
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.registry import BELIEFS, METRICS
from keyhole.core.task import Bounds, Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Field, Observation
from keyhole.errors import DataError, Refused
from keyhole.experiment.controls import noise_update
from keyhole.experiment.recorded_training import Training
from keyhole.experiment.run import START_JITTER
from keyhole.experiment.transcript import Recorded, Secret
from keyhole.metrics.matching import assign
from keyhole.parts.labels import multiset_overlap
from keyhole.solve.drive import Solved, Watch, solve
from keyhole.solve.lift import Shared, stack

SECOND = (
    "A second attack went on from what this one found. It began at gray, as a transcript has no public images; how far "
    "its images are from explaining the update was not measured."
)
"""What is said of a counter with a second attack."""


SOLVED = 1e-3
"""Score up to which an attack explains an update that nothing was added to."""

MOSTLY_NOISE = 0.1
"""Share of noise in an update's square from which on scores do not tell right images from wrong ones: the score of
both is mostly noise."""

DEVIATIONS = 3.0
"""How many standard deviations above what is expected the true images may score."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """One attack on one update."""

    attack: str
    attacker: str
    status: str
    score: float
    """The attack's own distance between simulated and recorded update; 0 explains all of it. NaN where it has none."""
    guesses: Tensor
    """Pixels (r, c, h, w) in [0, 1]; with secrets in their order."""
    labels: tuple[int, ...]
    evaluations: int
    detail: str = ""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """For each secret image; empty without secrets."""
    control: dict[str, list[float]] = field(default_factory=dict)
    """The same for the same attack on noise of the same size."""
    explained_up_to: float | None = None
    """Score up to which the update counts as explained, as the true images would score about that; `None` where their
    score is not known."""

    @property
    def explains(self) -> bool | None:
        """Whether what was found would have caused (nearly) the same update; `None` where the score cannot tell."""
        if math.isnan(self.score):
            return None
        if self.score <= SOLVED:
            return True
        return None if self.explained_up_to is None else self.score <= self.explained_up_to


def attempt(
    task: Task,
    one: Recorded,
    training: Training,
    name: str,
    attack: Attack,
    counter: Counter,
    seed: int,
    secret: Secret | None,
    watch: Watch | None = None,
) -> Attempt:
    """Attack; with the secret also noise of the same size, so that both are scored.

    Progress and checkpoint of ``watch`` are those of both.
    """
    attacker = "naive" if counter.name == "naive" else f"adaptive:{counter.name}"
    key = fold_in(new_key(seed), f"transcript {one.round} {one.client}")
    seen = [one.observation]
    if secret is not None:
        # The same search for an update that says nothing: what resembles a secret by chance is no leak. Batch
        # statistics are part of what was sent, and would say as much as the update.
        noise = noise_update(one.update, fold_in(key, "prior only"))
        seen.append(seen[0]._replace(update=noise, statistics=None))
    # What is solved together, at the cost of little more than one, sees the same fields.
    runs = [seen] if one.statistics is None else [[each] for each in seen]
    watches = [_part(watch or Watch(), place, len(runs)) for place in range(len(runs))]
    try:
        solved, *blind = [
            found
            for run, own in zip(runs, watches, strict=True)
            for found in _solved(task, run, training, attack, counter, key, own)
        ]
    except Refused as error:
        nothing = torch.zeros(0, *task.input_shape)
        return Attempt(name, attacker, "refused", math.nan, nothing, (), 0, str(error))
    guesses = task.bounds.to_pixels(solved.reconstruction.inputs).detach()
    targets = solved.reconstruction.targets
    labels = () if targets is None else tuple(targets.argmax(-1).tolist())
    metrics: dict[str, list[float]] = {}
    control: dict[str, list[float]] = {}
    if secret is not None:
        guesses, metrics = scored(task.bounds, guesses, secret)
        if targets is not None and len(targets) == len(secret.labels):
            true = nn.functional.one_hot(secret.labels, task.num_classes).to(targets)
            metrics["label_accuracy"] = [float(multiset_overlap(targets, true))] * len(true)
        control = scored(task.bounds, task.bounds.to_pixels(blind[0].reconstruction.inputs).detach(), secret)[1]
    # A second attack's own score is of something else than updates.
    score = float(solved.reconstruction.score) if counter.then is None else math.nan
    detail = "" if counter.then is None else SECOND
    return Attempt(name, attacker, solved.status, score, guesses, labels, solved.evaluations, detail, metrics, control)


def _part(watch: Watch, place: int, count: int) -> Watch:
    """What follows one of several groups."""
    if count == 1:
        return watch
    path = watch.checkpoint
    return replace(
        watch,
        checkpoint=None if path is None else path.with_name(f"{path.stem}-{place}{path.suffix}"),
        progress=lambda fraction: watch.progress((place + fraction) / count),
    )


def explained_up_to(
    task: Task, one: Recorded, training: Training, counter: Counter, defense: Defense | None
) -> float | None:
    """Score that the true images would have, about; `None` where that is not known.

    Args:
        task: what is trained.
        one: the update.
        training: how it was made.
        counter: of the attacker.
        defense: what is known to act on the update; `None` where nothing is.
    """
    mixed = bool(one.parts) and task.batchnorm not in (None, "eval")
    if training.assumed or training.steps > 1 or task.draws or mixed:
        return None  # attacks only come near to how such an update was made, or may start from a wrong assumption
    if defense is None:
        return SOLVED
    if one.parts or counter.name == "naive":
        return None
    if counter.truth_stays(1, 1):
        return SOLVED
    if counter.truth_loss != "law" or not training.scale_known:
        return None
    # A law is of what the defense acts on: the gradient, or the update, which is the gradient times the learning rate.
    scale = training.rule.lr if type(defense).on_gradient is not Defense.on_gradient else 1.0
    mean, deviation = counter.expected_truth_loss({name: value / scale for name, value in one.update.items()})
    return SOLVED + mean + DEVIATIONS * deviation if mean <= MOSTLY_NOISE else None


def scored(bounds: Bounds, guesses: Tensor, secret: Secret) -> tuple[Tensor, dict[str, list[float]]]:
    """Guesses in the order of the secrets that they are paired with, and each metric for each secret.

    Args:
        bounds: of the secrets' input space.
        guesses: pixels, at least as many as there are secrets.
        secret: what they are compared with.

    Raises:
        DataError: they are too few, or of another shape.
    """
    truth = bounds.to_pixels(secret.inputs.float())
    if truth.shape[1:] != guesses.shape[1:] or len(truth) > len(guesses):
        raise DataError(
            f"the secrets are {len(truth)} images of shape {tuple(truth.shape[1:])}, but {len(guesses)} of shape "
            f"{tuple(guesses.shape[1:])} were guessed; say how many there are with --set images={len(truth)}."
        )
    matched = guesses[assign(guesses, truth)]
    return matched, {card.name: card.factory()(matched, truth).tolist() for card in METRICS}


def _solved(
    task: Task,
    seen: list[Observation],
    training: Training,
    attack: Attack,
    counter: Counter,
    key: Tensor,
    watch: Watch,
) -> list[Solved]:
    """The attack on several observations from the same weights, with the same start."""
    belief: Belief = Simulated(training.rule)
    if training.steps > 1:
        belief = BELIEFS.build("straight_line", rule=training.rule)
    statistics: frozenset[Field] = frozenset(() if seen[0].statistics is None else ("statistics",))
    sees = frozenset[Field]({"weights", "update"}) | statistics
    threat = ThreatModel(training.rule, belief, training.images, sees, counter.told(training.images))
    missing = (attack.needs | counter.needs) - threat.sees
    if missing:
        raise Refused(f"it needs {', '.join(sorted(missing))}, which a transcript does not hold.")
    if counter.one_step and training.steps > 1:
        raise Refused(f"it can only explain an update of one gradient; here it is made of {training.steps}.")
    keys = key.expand(len(seen), -1).clone()
    shared = Shared(seen[0].weights)
    images = None
    if isinstance(attack, IterativeAttack) and attack.initial != "random":
        if attack.initial != "gray":
            raise Refused(f"start = '{attack.initial}' needs public images, which a transcript does not hold.")
        images = _gray(task, attack, training.images, keys)
    then = None
    if counter.then is not None:
        if not attack.pictures:
            raise Refused("its second attack works on images, and this attack finds none.")
        # Elsewhere it starts from the mean of public images.
        then = _gray(task, counter.then, training.images, keys)
    return solve(attack, task, threat, (stack(seen, shared),), images, keys, shared, watch, then_images=then)


def _gray(task: Task, attack: IterativeAttack, images: int, keys: Tensor) -> Tensor:
    """Start images (trials, starts, r, *shape), the same for all trials, which have one key."""
    noise = normal(fold_in(keys[0], "start images"), (attack.restarts, images, *task.input_shape))
    return task.bounds.from_pixels(0.5 + START_JITTER * noise).expand(len(keys), *noise.shape).clone()
