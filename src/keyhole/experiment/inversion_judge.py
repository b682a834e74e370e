"""Who judges what attackers made of networks: an evaluator that learned the private images, and controls.

No attacker sees anything from here; `keyhole.experiment.invert` makes a judge when the last image is on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keyhole.core.inversion import Target
from keyhole.core.keys import fold_in, new_key
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.tensors import map_tensors
from keyhole.core.told import Told
from keyhole.core.trial import Spec
from keyhole.core.types import Weights
from keyhole.experiment.inversion_cells import UNTRAINED, Network, grouped, read_cell, taken
from keyhole.experiment.inversion_plan import Inverting
from keyhole.experiment.train import Problem, Trained
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.federation.cache import trained_state
from keyhole.federation.norms import evaluating
from keyhole.federation.states import Federation, accuracy
from keyhole.inversion.evaluate import Evaluator, Scores, components, score, score_as_others
from keyhole.zoo.datasets import Pool
from keyhole.zoo.models import build_model

ATTACK = "attack"
"""The attacker that is no control."""
CEILING = "control:private_images"
CONTROLS = ("control:untrained", "control:random_labels", "control:prior_samples", "control:other_round",
            CEILING)  # fmt: skip
"""What an attack is held against: the same attack on a network that learned nothing; the images taken for another
private class; what the generator makes of noise; what the same attack makes of another round's network, shown to this
round's; and, as a ceiling rather than a floor, private images that were held out."""

Pictures = dict[tuple[int, int, int, Spec, str], Tensor]
"""Images (k, n, c, h, w) by defense, seed, round, attack and attacker."""


@dataclass(frozen=True)
class Row:
    """One target network, one attack or control."""

    defense: int
    """Index in the plan."""
    seed: int
    round: int
    attack: Spec
    attacker: str
    accuracy: float
    """Test accuracy of the target."""
    scores: Scores | None
    """`None` where the attack failed."""
    target_accuracy: float = math.nan
    """Share of the images that the target itself takes for their class: far above the evaluator's, it says that the
    images please this network alone."""
    seconds: float = math.nan
    prior_seconds: float = math.nan
    """What the prior took to train, when it was trained."""
    searches: int = 0
    images: int = 0
    """How many were scored."""
    detail: str = ""

    @property
    def place(self) -> tuple[int, int, int, Spec, str]:
        """Its key among pictures."""
        return self.defense, self.seed, self.round, self.attack, self.attacker

    def control(self, attacker: str, **changes: Any) -> Row:
        """The row of a control beside this one: nothing was searched for it."""
        idle = {"target_accuracy": math.nan, "seconds": math.nan, "prior_seconds": math.nan, "searches": 0}
        return replace(self, attacker=attacker, **{**idle, **changes})


@dataclass(frozen=True, eq=False)
class Inversions:
    """Everything that a report of model inversions is made from."""

    plan: TrainingPlan
    rows: list[Row]
    trained: list[Trained]
    """Empty where the networks came from files."""
    evaluator_accuracy: float
    """On held-out private images."""
    evaluator_classes: int
    public: int
    """Number of public images."""
    classes: int
    """Number of private classes."""
    components: int
    """Principal components behind the Frechet distances of attacks; 0 where features themselves are."""
    pictures: Pictures
    private: Tensor | None
    """Some private training images of each class, where the plan shows images."""

    @property
    def inverting(self) -> Inverting:
        """The plan's ``[invert]``."""
        assert self.plan.invert is not None
        return self.plan.invert


class Judge:
    """Trains the evaluator when it is made, and scores cells and their controls.

    Args:
        plan: with ``[invert]``.
        problem: the private images.
        pools: the public ones with their labels, a pool for each section.
        networks: what was attacked.
        told: told how far the evaluator's training is.
    """

    def __init__(
        self, plan: TrainingPlan, problem: Problem, pools: Sequence[Pool], networks: Sequence[Network], told: Told
    ) -> None:
        assert plan.invert is not None
        self.plan, self.inverting, self.problem, self.networks = plan, plan.invert, problem, networks
        self.public = sum(map(len, pools))
        self.evaluator, self.right, self.classes = train_evaluator(plan.invert, problem, pools, told)
        targets = ((network, network.target(problem.device)) for network in networks)
        self.accuracies = {network: accuracy(own.task, own.weights, *problem.test) for network, own in targets}

    def judged(self, trained: list[Trained]) -> Inversions:
        """Every cell and its controls.

        Args:
            trained: the trainings that the networks come from.
        """
        rows: list[Row] = []
        pictures: Pictures = {}
        ceiling = self._ceiling()
        for place, spec in enumerate(self.inverting.attacks):
            for networks in grouped(self.networks, "defense", "seed"):
                rows += self._rows(place, spec, networks, ceiling, pictures)
        classes, samples = self.problem.data.num_classes, self.inverting.settings.samples
        of_private = self.evaluator.private
        private = None
        if self.inverting.settings.images:
            private = by_class(*trained_on(self.problem), classes, samples)
        return Inversions(
            self.plan, rows, trained, self.right, self.classes, self.public, classes,
            components(min(classes * samples, sum(map(len, of_private))), of_private[0].shape[1]), pictures,
            None if private is None else private.cpu(),
        )  # fmt: skip

    def _ceiling(self) -> dict[str, Any]:
        """What rows say of held-out images: as many as of an attack, since a Frechet distance depends on how many."""
        samples = self.inverting.settings.samples
        held = by_class(*held_out(self.problem), self.problem.data.num_classes, samples)
        if held is None:
            return {"scores": None, "images": 0, "detail": "a class has no held-out image; raise data.test"}
        scores = score(self.evaluator, held)
        if held.shape[1] < samples:  # on fewer components than the other rows
            scores = replace(scores, fid=math.nan)
        return {"scores": scores, "images": _count(held)}

    def _rows(
        self, place: int, spec: Spec, networks: Sequence[Network], ceiling: dict[str, Any], pictures: Pictures
    ) -> list[Row]:
        """One attack on the networks of one federation; adds to the pictures."""
        rows: list[Row] = []
        attacked: dict[Network, Row] = {}
        rounds = [network for network in networks if network.round != UNTRAINED]
        for network in rounds:
            row, tensors = self._scored(place, spec, network, ATTACK)
            attacked[network] = row
            rows.append(row)
            if row.scores is None:
                continue
            pictures[row.place] = tensors["images"]
            if self.inverting.settings.controls:
                images, samples = (tensors[name].to(self.problem.device) for name in ("images", "prior_samples"))
                noise = row.control("control:prior_samples", scores=score(self.evaluator, samples))
                pictures[noise.place] = tensors["prior_samples"]
                labels = row.control("control:random_labels", scores=score_as_others(self.evaluator, images))
                rows += [labels, noise, row.control(CEILING, **ceiling)]
        for network in networks:
            if network.round == UNTRAINED:
                row, tensors = self._scored(place, spec, network, "control:untrained")
                again = [replace(row, round=own.round) for own in attacked.values()]  # once more for each round
                if row.scores is not None:
                    pictures |= {own.place: tensors["images"] for own in again}
                rows += again
        return rows + (self._other_rounds(attacked, pictures) if self.inverting.settings.controls else [])

    def _scored(self, place: int, spec: Spec, network: Network, attacker: str) -> tuple[Row, dict[str, Tensor]]:
        """A cell's row, without scores where the attack failed, and what is in its file."""
        tensors, account = read_cell(network.cell(place, spec))
        number = network.round if isinstance(network.round, int) else 0
        row = Row(
            network.defense, network.seed, number, spec, attacker, self.accuracies[network], None,
            detail=account.get("detail", ""),
        )  # fmt: skip
        if "images" not in tensors:
            return row, tensors
        facts = {name: account[name] for name in ("target_accuracy", "seconds", "prior_seconds", "searches")}
        images = tensors["images"]
        scores = score(self.evaluator, images.to(self.problem.device))
        return replace(row, scores=scores, images=_count(images), **facts), tensors

    def _other_rounds(self, attacked: dict[Network, Row], pictures: Pictures) -> list[Row]:
        """For each round the images of the nearest other one: does this round's network like its own images better?"""
        rows = []
        for network, row in attacked.items():
            others = [other for other in attacked.values() if other.scores is not None and other is not row]
            if not others:
                continue
            nearest = min(others, key=lambda other: (abs(other.round - row.round), other.round))
            images, device = pictures[nearest.place], self.problem.device
            rows.append(row.control(
                "control:other_round", scores=nearest.scores, images=nearest.images, detail=f"of round {nearest.round}",
                target_accuracy=taken(network.target(device), images.to(device)),
            ))  # fmt: skip
        return rows


# The evaluator


def train_evaluator(
    inverting: Inverting, problem: Problem, pools: Sequence[Pool], told: Told
) -> tuple[Evaluator, float, int]:
    """The evaluator, its accuracy on held-out private images, and how many classes it tells apart.

    It learns the private training images, and public ones of the same data set, whose classes are not private.
    """
    section, classes = inverting.evaluator, problem.data.num_classes
    task, start = fresh_evaluator(inverting, problem, pools)
    known = torch.tensor(_known(inverting, problem, pools), dtype=torch.int64)
    same = _of_same_set(inverting, problem, pools)
    private, own_labels = trained_on(problem)
    images = torch.cat([private, *(pool.images.to(problem.device) for pool in same)])
    numbers = (torch.searchsorted(known, pool.labels) + classes for pool in same)
    labels = torch.cat([own_labels, *(number.to(problem.device) for number in numbers)])
    central = Federation(
        rounds=section.epochs, clients=1, lr=section.lr, batch_size=min(section.batch_size, len(images))
    )
    weights, _ = trained_state(
        task, start, images, labels, central, fold_in(new_key(section.seed), "evaluator"),
        lambda done, todo, loss: told(f"evaluator {section.name}", done / todo),
    )  # fmt: skip
    right = accuracy(task, weights, *held_out(problem))
    evaluator = Evaluator.of(Target(evaluating(task), weights), range(classes), private, own_labels)
    return evaluator, right, task.num_classes


def fresh_evaluator(inverting: Inverting, problem: Problem, pools: Sequence[Pool]) -> tuple[Task, Weights]:
    """The evaluator before its training."""
    section, shape, device = inverting.evaluator, problem.data.image_shape, problem.device
    count = problem.data.num_classes + len(_known(inverting, problem, pools))
    model = build_model(
        section.name, input_shape=shape, num_classes=count, options=section.model.options, seed=section.seed
    )
    flat = Bounds.of((0.0,) * shape[0], (1.0,) * shape[0]).to(device)
    task = Task.of(model, shape, count, flat, batchnorm="train_shared", dropout="active").to(device)
    return task, Weights(*(map_tensors(lambda t: t.to(device), part) for part in weights_of(model)))


def _of_same_set(inverting: Inverting, problem: Problem, pools: Sequence[Pool]) -> list[Pool]:
    """Public images that belong to the private ones' data set."""
    own = (None, problem.plan.data.name)
    return [pool for pool, section in zip(pools, inverting.public, strict=True) if section.name in own]


def _known(inverting: Inverting, problem: Problem, pools: Sequence[Pool]) -> list[int]:
    """Public classes of the private data set, which the evaluator tells from the private ones."""
    return sorted({c for pool in _of_same_set(inverting, problem, pools) for c in pool.labels.tolist()})


# Images


def trained_on(problem: Problem) -> tuple[Tensor, Tensor]:
    """What clients trained on, as pixels, and its labels."""
    return problem.bounds.to(problem.device).to_pixels(problem.inputs), problem.labels


def held_out(problem: Problem) -> tuple[Tensor, Tensor]:
    """Private images that nobody trained on, as pixels, and their labels."""
    images, labels = problem.test
    return problem.bounds.to(problem.device).to_pixels(images), labels


def by_class(images: Tensor, labels: Tensor, classes: int, most: int) -> Tensor | None:
    """As many images of each class as the rarest one has, (k, n, c, h, w); `None` where one has none."""
    each = min(most, *(int((labels == place).sum()) for place in range(classes)))
    if each == 0:
        return None
    return torch.stack([images[labels == place][:each] for place in range(classes)])


def _count(images: Tensor) -> int:
    """Of images by class."""
    return images.shape[0] * images.shape[1]
