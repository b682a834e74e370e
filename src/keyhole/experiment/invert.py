"""Model inversion through the rounds of a federation: train, attack the global network, judge what came out.

The attacker gets a network and public images. The evaluator and the private images are only known to the functions that
score, after all images of a cell are on disk. Cells are files,
``inversions/DEFENSE/seed-S/round-R-ATTACK.safetensors``; what is there is not made again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import keyhole.inversion  # noqa: F401  (the import fills the registry)
from keyhole.core.inversion import Inversion, Place, Target
from keyhole.core.keys import fold_in, new_key, normal
from keyhole.core.registry import INVERSIONS
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.told import Told, silent
from keyhole.core.trial import Spec
from keyhole.core.types import Key, Weights
from keyhole.errors import ConfigError, DataError, KeyholeError, ModelError, StoreError, cause
from keyhole.experiment.inversion_plan import Inverting, PublicSection
from keyhole.experiment.setup import find_device
from keyhole.experiment.store import Store
from keyhole.experiment.train import Problem, Trained, folder_of, train
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.federation.cache import trained_state
from keyhole.federation.norms import evaluating
from keyhole.federation.states import Federation, accuracy
from keyhole.inversion.evaluate import Evaluator, Scores, components, score, score_as_others
from keyhole.solve.files import digest, write_whole
from keyhole.solve.invert import Inverted, invert
from keyhole.solve.threads import one_thread
from keyhole.zoo.datasets import Pool, load_pool
from keyhole.zoo.models import build_model, load_state

ATTACK = "attack"
"""The attacker that is no control."""
CEILING = "control:private_images"
CONTROLS = ("control:untrained", "control:random_labels", "control:prior_samples", "control:other_round",
            CEILING)  # fmt: skip
"""What an attack is held against: the same attack on a network that learned nothing; the images taken for another
private class; what the generator makes of noise; what the same attack makes of another round's network, shown to this
round's; and, as a ceiling rather than a floor, private images that were held out."""

INVERSION_VERSION = 1
"""Raise it when the same settings, network and public images would give other images."""

FOLDER = "inversions"
UNTRAINED = "untrained"

_ACCOUNT = "account"


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
    pictures: dict[tuple[int, int, int, Spec, str], Tensor]
    """Images (k, n, c, h, w) by defense, seed, round, attack and attacker."""
    private: Tensor | None
    """Some private training images of each class, where the plan shows images."""


def invert_rounds(
    plan: TrainingPlan, folder: Path, *, jobs: int = 1, device: str = "cpu", told: Told = silent
) -> Inversions:
    """Train what is missing, invert what is missing, and score everything.

    Args:
        plan: with ``[invert]``.
        folder: the output folder; made if needed.
        jobs: trainings at a time on a CPU; 0 for one a core. The searches take one core.
        device: ``cpu`` or ``cuda``.
        told: told what is how far.

    Raises:
        ConfigError: the plan has no ``[invert]``, or something in it does not fit.
    """
    if plan.invert is None:
        raise ConfigError("this file has no [invert] section; add one with [[invert.public]] and [[invert.attacks]].")
    where = find_device(device)
    # Before the folder is claimed: bad input must leave nothing behind, and cost no training.
    problem = Problem(plan, where)
    study = _Study(plan, plan.invert, problem, public_images(plan, problem.data.image_shape), folder, where, told)
    study.check()
    if plan.invert.settings.weights is None:
        study.trained = train(plan, folder, jobs=jobs, device=device, told=told)
    with Store(folder) as store, one_thread(where):
        store.claim_config(plan.to_toml())
        study.attack()
        return study.judged()


def public_images(plan: TrainingPlan, shape: tuple[int, ...]) -> list[Pool]:
    """The attacker's images, a pool for each section, in the private images' shape."""
    assert plan.invert is not None
    pools = []
    for section in plan.invert.public:
        name = section.name or plan.data.name
        pool = load_pool(
            name, classes=section.classes, split=section.split, size=shape[1], limit=section.limit, seed=section.seed
        )
        if pool.images.shape[1] != shape[0]:
            raise DataError(
                f"public images of '{name}' have {pool.images.shape[1]} channels and the private ones {shape[0]}; "
                "choose public images of the same kind."
            )
        if tuple(pool.images.shape[1:]) != tuple(shape):
            raise DataError(
                f"public images of '{name}' are {tuple(pool.images.shape[1:])} and the private ones {tuple(shape)}; "
                "set data.size."
            )
        pools.append(pool)
    return pools


class _Cell(NamedTuple):
    """One network under one attack."""

    target: Target
    seed: int
    file: Path
    what: str
    """For the progress bar."""
    identity: str
    """Names what its images were made from, beyond the settings."""


class _Study:
    """The cells of a plan. `attack` reads networks and public images; only `judged` reads private ones."""

    def __init__(
        self, plan: TrainingPlan, inverting: Inverting, problem: Problem, public: list[Pool], folder: Path,
        device: torch.device, told: Told,
    ) -> None:  # fmt: skip
        self.plan, self.inverting, self.problem = plan, inverting, problem
        self.folder, self.device, self.told = folder, device, told
        self.trained: list[Trained] = []
        self.pools = public
        self.public = torch.cat([pool.images for pool in public]).to(device)
        self.tasks = [self._task(index) for index in range(len(plan.defenses))]

    def check(self) -> None:
        """Find what would fail later: attacks, the evaluator, weights from files, too few private images."""
        for spec in self.inverting.attacks:
            try:
                INVERSIONS.build(spec.name, **spec.asdict()).check(self.public)
            except KeyholeError as error:
                raise type(error)(f"[[invert.attacks]] '{spec.name}': {error}") from error
        self._judge(self.problem.data.num_classes + len(self._known_classes()))
        data = self.problem.data
        private = {own for pool in (data.target, data.tune, data.public, data.candidates, data.train)
                   for own in map(_pixels, pool.images)}  # fmt: skip
        both = sum(_pixels(image) in private for image in self.public)
        if both:
            raise DataError(
                f"{both} of the {len(self.public)} public images are private ones too; choose other public images."
            )
        missing = set(range(self.problem.data.num_classes)) - set(self.problem.labels.tolist())
        if missing:
            raise DataError(
                f"the clients' {len(self.problem.labels)} images show none of class {min(missing)}, counted from 0, to "
                "compare with; raise data.train or data.target."
            )
        if self.inverting.settings.weights is not None:
            for seed in self.plan.run.seeds:
                for number in self.inverting.rounds:
                    self.target(0, seed, number)

    def _task(self, index: int) -> Task:
        """The architecture as clients under a defense train it, evaluating."""
        return evaluating(self.problem.task(self.plan.defenses[index]))

    def target(self, index: int, seed: int, number: int) -> Target:
        """The global network of a round; nothing else of the federation comes with it."""
        task = self.tasks[index]
        if self.inverting.settings.weights is None:
            path = folder_of(self.plan, self.folder, index, seed) / f"round-{number:03d}.safetensors"
        else:
            path = self.inverting.settings.file(seed, number)
        model = copy.deepcopy(task.model)
        load_state(model, path)
        return Target(task, _to(weights_of(model), self.device))

    def untrained(self, index: int, seed: int) -> Target:
        """The same network before its first round, or a fresh one where it came from a file."""
        if self.inverting.settings.weights is None:
            return self.target(index, seed, 0)
        return Target(self.tasks[index], _to(self.problem.fresh(self.plan.defenses[index], seed), self.device))

    def cells(self) -> Iterator[tuple[int, int, Spec]]:
        """Defense, seed and attack: what goes through the rounds in order."""
        for spec in self.inverting.attacks:
            for index in range(len(self.plan.defenses)):
                for seed in self.plan.run.seeds:
                    yield index, seed, spec

    def file(self, index: int, seed: int, number: int | str, spec: Spec) -> Path:
        """Where a cell lies."""
        number = f"{number:03d}" if isinstance(number, int) else number
        place = self.inverting.attacks.index(spec)
        below = folder_of(self.plan, self.folder / FOLDER, index, seed)
        return below / f"round-{number}-{place}-{spec.name}.safetensors"

    # Attacks

    def attack(self) -> None:
        """Make the images of every cell that has none."""
        for spec in self.inverting.attacks:
            method: Inversion = INVERSIONS.build(spec.name, **spec.asdict())
            key = fold_in(fold_in(new_key(self.inverting.settings.seed), "inversion"), spec.name)
            for index in range(len(self.plan.defenses)):
                if method.per_target:
                    for seed in self.plan.run.seeds:
                        self._chain(method, spec, key, index, seed)
                else:
                    self._side_by_side(method, spec, key, index)

    def _rounds(self) -> list[int | str]:
        return [*self.inverting.rounds, *([UNTRAINED] if self.inverting.settings.controls else [])]

    def _target_of(self, index: int, seed: int, number: int | str) -> Target:
        return self.target(index, seed, number) if isinstance(number, int) else self.untrained(index, seed)

    def _cell(self, spec: Spec, index: int, seed: int, number: int | str) -> _Cell:
        target = self._target_of(index, seed, number)
        # Whatever could change the images and is not in the folder's config.toml.
        known = digest(target.weights.params, target.weights.buffers, {"public": self.public})
        at = number if isinstance(number, str) else f"round {number}"
        what = f"{spec.name} on {_name(self.plan, index)}, seed {seed}, {at}"
        identity = f"{INVERSION_VERSION}.{spec.version}.{known}"
        return _Cell(target, seed, self.file(index, seed, number, spec), what, identity)

    def _side_by_side(self, method: Inversion, spec: Spec, key: Key, index: int) -> None:
        """Networks of all seeds, which one prior serves; several at once where that is no slower."""
        size = 1 if self.device.type == "cpu" else len(self.plan.run.seeds)
        for number in self._rounds():
            cells = [self._cell(spec, index, seed, number) for seed in self.plan.run.seeds]
            missing = [cell for cell in cells if not _made(cell)]
            for begin in range(0, len(missing), size):
                part = missing[begin : begin + size]
                place = Place(told=self.told)
                prior = method.prepare(part[0].target, self.public, fold_in(key, "prior"), place, None)
                self._make(method, key, prior, part)

    def _chain(self, method: Inversion, spec: Spec, key: Key, index: int, seed: int) -> None:
        """The rounds of one federation, each with a prior of its own, which may go on from that of the round before."""
        cells = {number: self._cell(spec, index, seed, number) for number in self._rounds()}
        missing = [number for number, cell in cells.items() if not _made(cell)]
        attacked = [number for number in missing if isinstance(number, int)]
        before = None
        for number, cell in cells.items():
            untrained = number == UNTRAINED
            # What goes on from a prior that is made again is made again.
            make = number in missing or (not untrained and bool(attacked) and int(number) > attacked[0])
            if not make and not (attacked and not untrained):
                continue

            def preparing(stage: str, fraction: float, what: str = cell.what) -> None:
                self.told(f"{stage} ({what})", fraction)

            own = fold_in(fold_in(fold_in(key, "prior"), seed), number)
            try:
                # An untrained network has no round before it.
                prior = method.prepare(
                    cell.target, self.public, own, Place(told=preparing), None if untrained else before
                )
            except ModelError as error:
                _failed(cell, error)
                continue
            before = before if untrained else prior
            if make:
                self._make(method, key, prior, [cell])

    def _make(self, method: Inversion, key: Key, prior: Any, cells: list[_Cell]) -> None:
        """Invert networks and write what came out."""
        samples = self.inverting.settings.samples
        what = cells[0].what if len(cells) == 1 else f"{cells[0].what} and {len(cells) - 1} more"
        searches = [fold_in(fold_in(key, "searches"), cell.seed) for cell in cells]
        try:
            found = invert(
                method, cells[0].target.task, [cell.target.weights for cell in cells], prior, self.public, samples,
                searches, told=lambda fraction: self.told(what, fraction), at_once=len(cells),
            )  # fmt: skip
        except KeyholeError as error:
            if len(cells) == 1:
                _failed(cells[0], error)
                return
            for cell in cells:  # one of them does not fail the others
                self._make(method, key, prior, [cell])
            return
        for cell, one in zip(cells, found, strict=True):
            own = fold_in(key, cell.seed).to(self.device)
            by_itself = _prior_samples(prior, cell.target.classes, samples, own)
            _write(cell.file, {"images": one.images, "prior_samples": by_itself}, _account(one, cell, prior))

    # Scores

    def judged(self) -> Inversions:
        """Every cell and its controls, scored by the evaluator."""
        evaluator, right, classes = self._evaluator()
        accuracies = {
            (index, seed, number): self._accuracy(self.target(index, seed, number))
            for index in range(len(self.plan.defenses))
            for seed in self.plan.run.seeds
            for number in self.inverting.rounds
        }
        rows: list[Row] = []
        pictures: dict[tuple[int, int, int, Spec, str], Tensor] = {}
        # As many as of an attack, since a Frechet distance depends on how many there are.
        held = _by_class(*self._held_out(), self.problem.data.num_classes, self.inverting.settings.samples)
        ceiling, short = None, ""
        if held is None:
            short = "a class has no held-out image; raise data.test"
        else:
            ceiling = score(evaluator, held)
            if held.shape[1] < self.inverting.settings.samples:  # on fewer components than the other rows
                ceiling = replace(ceiling, fid=math.nan)
        for index, seed, spec in self.cells():
            own: list[Row] = []
            for number in self.inverting.rounds:
                tensors, account = _read(self.file(index, seed, number, spec))
                right_here = accuracies[index, seed, number]
                base = Row(index, seed, number, spec, ATTACK, right_here, None, detail=account.get("detail", ""))
                if "images" not in tensors:
                    own.append(base)
                    continue
                images = tensors["images"].to(self.device)
                facts = {name: account[name] for name in ("target_accuracy", "seconds", "prior_seconds", "searches")}
                base = replace(base, images=images.shape[0] * images.shape[1])
                own.append(replace(base, scores=score(evaluator, images), **facts))
                pictures[index, seed, number, spec, ATTACK] = images.cpu()
                if self.inverting.settings.controls:
                    named = {
                        "control:random_labels": score_as_others(evaluator, images),
                        "control:prior_samples": score(evaluator, tensors["prior_samples"].to(self.device)),
                    }
                    pictures[index, seed, number, spec, "control:prior_samples"] = tensors["prior_samples"]
                    own += [replace(base, attacker=n, scores=s) for n, s in named.items()]
                    shown = 0 if held is None else held.shape[0] * held.shape[1]
                    own.append(replace(base, attacker=CEILING, scores=ceiling, images=shown, detail=short))
            rows += own
            if self.inverting.settings.controls:
                attacked = {row.round: row for row in own if row.attacker == ATTACK}
                rows += self._untrained_control(index, seed, spec, evaluator, attacked, pictures)
                rows += self._other_rounds(index, seed, spec, attacked, pictures)
        made = self.problem.data.num_classes * self.inverting.settings.samples
        private = None
        if self.inverting.settings.images:
            private = _by_class(*self._private(), self.problem.data.num_classes, self.inverting.settings.samples)
        return Inversions(
            self.plan, rows, self.trained, right, classes, len(self.public), self.problem.data.num_classes,
            components(min(made, sum(map(len, evaluator.private))), evaluator.private[0].shape[1]), pictures,
            None if private is None else private.cpu(),
        )  # fmt: skip

    def _untrained_control(
        self, index: int, seed: int, spec: Spec, evaluator: Evaluator, attacked: dict[int, Row],
        pictures: dict[tuple[int, int, int, Spec, str], Tensor],
    ) -> list[Row]:  # fmt: skip
        """What the same attack makes of a network that learned nothing, once more for each round."""
        tensors, account = _read(self.file(index, seed, UNTRAINED, spec))
        right = self._accuracy(self.untrained(index, seed))
        one = Row(index, seed, 0, spec, "control:untrained", right, None, detail=account.get("detail", ""))
        if "images" in tensors:
            images = tensors["images"]
            facts = {name: account[name] for name in ("target_accuracy", "seconds", "prior_seconds", "searches")}
            count = images.shape[0] * images.shape[1]
            one = replace(one, scores=score(evaluator, images.to(self.device)), images=count, **facts)
            pictures |= {(index, seed, number, spec, one.attacker): images for number in attacked}
        return [replace(one, round=number) for number in attacked]

    def _other_rounds(
        self, index: int, seed: int, spec: Spec, attacked: dict[int, Row],
        pictures: dict[tuple[int, int, int, Spec, str], Tensor],
    ) -> list[Row]:  # fmt: skip
        """For each round the images of the nearest other one: does this round's network like its own images better?"""
        made = [number for number, row in attacked.items() if row.scores is not None]
        rows = []
        for number, row in attacked.items():
            others = [other for other in made if other != number]
            if not others:
                continue
            nearest = min(others, key=lambda other: (abs(other - number), other))
            images = pictures[index, seed, nearest, spec, ATTACK].to(self.device)
            rows.append(replace(
                row, attacker="control:other_round", scores=attacked[nearest].scores, images=attacked[nearest].images,
                target_accuracy=_taken(self.target(index, seed, number), images), seconds=math.nan,
                prior_seconds=math.nan, searches=0, detail=f"of round {nearest}",
            ))  # fmt: skip
        return rows

    def _known_classes(self) -> list[int]:
        """Public classes of the private data set, which the evaluator tells from the private ones."""
        sections = zip(self.pools, self.inverting.public, strict=True)
        return sorted({c for pool, one in sections if self._same_set(one) for c in pool.labels.tolist()})

    def _same_set(self, section: PublicSection) -> bool:
        return section.name in (None, self.plan.data.name)

    def _judge(self, count: int) -> tuple[Task, Weights]:
        """The evaluator before its training, for so many classes."""
        section, shape = self.inverting.evaluator, self.problem.data.image_shape
        model = build_model(
            section.name, input_shape=shape, num_classes=count, options=section.model.options, seed=section.seed
        )
        flat = Bounds.of((0.0,) * shape[0], (1.0,) * shape[0]).to(self.device)
        task = Task.of(model, shape, count, flat, batchnorm="train_shared", dropout="active").to(self.device)
        return task, _to(weights_of(model), self.device)

    def _evaluator(self) -> tuple[Evaluator, float, int]:
        """The evaluator, its accuracy on held-out private images, and how many classes it tells apart.

        It learns the private training images, and public ones of the same data set, whose classes are not private.
        """
        section, classes = self.inverting.evaluator, self.problem.data.num_classes
        private, own_labels = self._private()
        known = torch.tensor(self._known_classes(), dtype=torch.int64)
        same = [p for p, one in zip(self.pools, self.inverting.public, strict=True) if self._same_set(one)]
        images = torch.cat([private, *(pool.images.to(self.device) for pool in same)])
        numbers = (torch.searchsorted(known, pool.labels) + classes for pool in same)
        labels = torch.cat([own_labels, *(number.to(self.device) for number in numbers)])
        count = classes + len(known)
        task, start = self._judge(count)
        central = Federation(
            rounds=section.epochs, clients=1, lr=section.lr, batch_size=min(section.batch_size, len(images))
        )
        weights, _ = trained_state(
            task, start, images, labels, central, fold_in(new_key(section.seed), "evaluator"),
            lambda done, todo, loss: self.told(f"evaluator {section.name}", done / todo),
        )  # fmt: skip
        right = accuracy(task, weights, *self._held_out())
        return Evaluator.of(Target(evaluating(task), weights), range(classes), private, own_labels), right, count

    def _private(self) -> tuple[Tensor, Tensor]:
        """What clients trained on, as pixels."""
        pixels = self.problem.bounds.to(self.device).to_pixels(self.problem.inputs)
        return pixels, self.problem.labels

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Private images that nobody trained on, as pixels."""
        images, labels = self.problem.test
        return self.problem.bounds.to(self.device).to_pixels(images), labels

    def _accuracy(self, target: Target) -> float:
        return accuracy(target.task, target.weights, *self.problem.test)


def _pixels(image: Tensor) -> bytes:
    return hashlib.sha256(image.cpu().numpy().tobytes()).digest()


def _prior_samples(prior: Any, classes: int, count: int, key: Key) -> Tensor:
    """What the generator makes of noise, given to classes as they come: (k, n, c, h, w)."""
    generator = prior.generator
    with torch.no_grad():
        made: Tensor = generator(normal(fold_in(key, "prior samples"), (classes * count, generator.latent)))
    return made.reshape(classes, count, *made.shape[1:])


def _taken(target: Target, images: Tensor) -> float:
    """Share of images (k, n, c, h, w) that a network takes for the class they were made to show."""
    classes, each = images.shape[:2]
    with torch.no_grad():
        guesses = torch.cat([target.logits(part) for part in torch.split(images.flatten(0, 1), 256)]).argmax(-1)
    labels = torch.arange(classes, device=guesses.device).repeat_interleave(each)
    return float((guesses == labels).double().mean())


def _account(found: Inverted, cell: _Cell, prior: Any) -> dict[str, Any]:
    return {
        "identity": cell.identity,
        "target_accuracy": _taken(cell.target, found.images),
        "seconds": found.seconds,
        "prior_seconds": float(prior.facts.seconds),
        "searches": found.searches,
        "losses": list(found.losses),
    }


def _by_class(images: Tensor, labels: Tensor, classes: int, most: int | None = None) -> Tensor | None:
    """As many images of each class as the rarest one has, (k, n, c, h, w); `None` where one has none."""
    counts = [int((labels == place).sum()) for place in range(classes)]
    each = min([*counts, *([] if most is None else [most])])
    if each == 0:
        return None
    return torch.stack([images[labels == place][:each] for place in range(classes)])


def _name(plan: TrainingPlan, index: int) -> str:
    return " -> ".join(spec.name for spec in plan.defenses[index]) or "no defense"


def _to(weights: Weights, device: torch.device) -> Weights:
    return Weights(*({name: t.to(device) for name, t in part.items()} for part in weights))


# Files


def _write(path: Path, tensors: dict[str, Tensor], account: dict[str, Any]) -> None:
    from safetensors.torch import save

    data = save(
        {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()},
        metadata={_ACCOUNT: json.dumps(account)},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, data)
    except OSError as error:
        raise StoreError(f"cannot write to the output folder '{path.parent}': {error.strerror}.") from error


def _failed(cell: _Cell, error: KeyholeError) -> None:
    _write(cell.file, {"failed": torch.zeros(1)}, {"detail": str(error), "identity": cell.identity})


def _made(cell: _Cell) -> bool:
    """Whether a cell is done; a damaged file, or one made of another network or public images, is made again."""
    if not cell.file.exists():
        return False
    try:
        _, account = _read(cell.file)
    except StoreError:
        return False
    return bool(account.get("identity") == cell.identity)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            account = json.loads((file.metadata() or {})[_ACCOUNT])
            return {name: file.get_tensor(name) for name in file.keys()}, account  # noqa: SIM118  (no dictionary)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"'{path}' is damaged ({cause(error)}); remove it, and run the same command again.") from error
