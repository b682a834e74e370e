"""Model inversion through the rounds of a federation: train, attack the global network, judge what came out.

The attacker gets a network and public images. The evaluator and the private images are only known to the functions that
score, after all images of a cell are on disk. Cells are files,
``inversions/DEFENSE/seed-S/round-R-ATTACK.safetensors``; what is there is not made again.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from keyhole.errors import ConfigError, DataError, KeyholeError, StoreError, cause
from keyhole.experiment.inversion_plan import Inverting
from keyhole.experiment.setup import find_device
from keyhole.experiment.store import Store
from keyhole.experiment.train import Problem, Trained, folder_of, train
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.federation.cache import trained_state
from keyhole.federation.norms import evaluating
from keyhole.federation.states import Federation, accuracy
from keyhole.inversion.evaluate import Evaluator, Scores, score, score_as_others
from keyhole.solve.files import write_whole
from keyhole.solve.invert import Inverted, invert
from keyhole.solve.threads import one_thread
from keyhole.zoo.datasets import Pool, load_pool
from keyhole.zoo.models import build_model, load_state

ATTACK = "attack"
"""The attacker that is no control."""
CONTROLS = ("control:untrained", "control:random_labels", "control:prior_samples", "control:other_round",
            "control:private_images")  # fmt: skip
"""What an attack is held against: the same attack on a network that learned nothing; the images taken for another
private class; what the generator makes of noise; what the same attack makes of another round's network; and, as a
ceiling rather than a floor, private images that were held out."""

_ACCOUNT = "account"
FOLDER = "inversions"


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
    pictures: dict[tuple[int, int, int, Spec, str], Tensor]
    """Images (k, n, c, h, w) by defense, seed, round, attack and attacker."""
    private: Tensor | None
    """Some private training images of each class, where the plan shows images."""


def invert_rounds(plan: TrainingPlan, folder: Path, *, device: str = "cpu", told: Told = silent) -> Inversions:
    """Train what is missing, invert what is missing, and score everything.

    Args:
        plan: with ``[invert]``.
        folder: the output folder; made if needed.
        device: ``cpu`` or ``cuda``.
        told: told what is how far.

    Raises:
        ConfigError: the plan has no ``[invert]``, or something in it does not fit.
    """
    if plan.invert is None:
        raise ConfigError("this file has no [invert] section; add one with [[invert.public]] and [[invert.attacks]].")
    where = find_device(device)
    # Before the folder is claimed: bad input must leave nothing behind.
    problem = Problem(plan, where)
    public = public_images(plan, problem.data.image_shape)
    trained: list[Trained] = []
    if plan.invert.settings.weights is None:
        trained = train(plan, folder, device=device, told=told)
    with Store(folder) as store, one_thread(where):
        store.claim_config(plan.to_toml())
        study = _Study(plan, plan.invert, problem, public, trained, folder, where, told)
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


class _Study:
    """The cells of a plan. `attack` reads networks and public images; only `judged` reads private ones."""

    def __init__(
        self, plan: TrainingPlan, inverting: Inverting, problem: Problem, public: list[Pool], trained: list[Trained],
        folder: Path, device: torch.device, told: Told,
    ) -> None:  # fmt: skip
        self.plan, self.inverting, self.problem, self.trained = plan, inverting, problem, trained
        self.folder, self.device, self.told = folder, device, told
        self.pools = public
        self.public = torch.cat([pool.images for pool in public]).to(device)
        self.tasks = [self._task(index) for index in range(len(plan.defenses))]

    def _task(self, index: int) -> Task:
        """The architecture as clients under a defense train it, evaluating."""
        return evaluating(self.problem.task(self.plan.defenses[index]))

    def target(self, index: int, seed: int, number: int) -> Target:
        """The global network of a round; nothing else of the federation comes with it."""
        task = self.tasks[index]
        given = self.inverting.settings.weights
        if given is None:
            path = folder_of(self.plan, self.folder, index, seed) / f"round-{number:03d}.safetensors"
        else:
            path = Path(given.replace("{seed}", str(seed)).replace("{round}", str(number)))
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
        for index, seed, spec in self.cells():
            method: Inversion = INVERSIONS.build(spec.name, **spec.asdict())
            key = fold_in(fold_in(new_key(self.inverting.settings.seed), "inversion"), spec.name)
            rounds: list[int | str] = list(self.inverting.rounds)
            if self.inverting.settings.controls:
                rounds.append("untrained")
            missing = [number for number in rounds if not _readable(self.file(index, seed, number, spec))]
            before = None
            for number in rounds:
                if number not in missing and not (method.per_target and missing):
                    continue
                untrained = number == "untrained"
                target = self.untrained(index, seed) if untrained else self.target(index, seed, int(number))
                at = "untrained" if untrained else f"round {number}"
                what = f"{spec.name} on {_name(self.plan, index)}, seed {seed}, {at}"
                # What it trains for this target may go on from the round before; an untrained network has none.
                before = self._cell(
                    method, spec, target, key, self.file(index, seed, number, spec), what, seed,
                    None if untrained else before, make=number in missing,
                )  # fmt: skip

    def _cell(
        self, method: Inversion, spec: Spec, target: Target, key: Key, path: Path, what: str, seed: int, before: Any,
        *, make: bool,
    ) -> Any:  # fmt: skip
        """One cell; returns what the attack prepared."""

        def preparing(stage: str, fraction: float) -> None:
            self.told(f"{stage} ({what})" if method.per_target else stage, fraction)

        place = Place(told=preparing)
        prior = method.prepare(target, self.public, fold_in(key, "prior"), place, before)
        if not make:
            return prior
        try:
            found = invert(
                method, target.task, [target.weights], prior, self.public, self.inverting.settings.samples,
                [fold_in(fold_in(key, "searches"), seed)], told=lambda fraction: self.told(what, fraction),
            )[0]  # fmt: skip
        except KeyholeError as error:
            _write(path, {"failed": torch.zeros(1)}, {"detail": str(error)})
            return prior
        samples = _prior_samples(prior, target.classes, self.inverting.settings.samples, fold_in(key, seed))
        _write(path, {"images": found.images, "prior_samples": samples}, _account(found, target, prior))
        return prior

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
        held = _by_class(*self._held_out(), self.problem.data.num_classes)
        ceiling = None if held is None else score(evaluator, held)
        for index, seed, spec in self.cells():
            by_round: dict[int, Tensor] = {}
            own: list[Row] = []
            for number in self.inverting.rounds:
                tensors, account = _read(self.file(index, seed, number, spec))
                right_here = accuracies[index, seed, number]
                base = Row(index, seed, number, spec, ATTACK, right_here, None, detail=account.get("detail", ""))
                if "images" not in tensors:
                    own.append(base)
                    continue
                images = by_round[number] = tensors["images"].to(self.device)
                facts = {name: account[name] for name in ("target_accuracy", "seconds", "prior_seconds", "searches")}
                own.append(replace(base, scores=score(evaluator, images), **facts))
                pictures[index, seed, number, spec, ATTACK] = images.cpu()
                if self.inverting.settings.controls:
                    named = {
                        "control:random_labels": score_as_others(evaluator, images),
                        "control:prior_samples": score(evaluator, tensors["prior_samples"].to(self.device)),
                        "control:private_images": ceiling,
                    }
                    pictures[index, seed, number, spec, "control:prior_samples"] = tensors["prior_samples"]
                    own += [replace(base, attacker=n, scores=s) for n, s in named.items() if s is not None]
            rows += own
            if self.inverting.settings.controls:
                rows += self._more_controls(index, seed, spec, evaluator, own, pictures)
        private = None
        if self.inverting.settings.images:
            private = _by_class(*self._private(), self.problem.data.num_classes, self.inverting.settings.samples)
        return Inversions(
            self.plan, rows, self.trained, right, classes, len(self.public), pictures,
            None if private is None else private.cpu(),
        )  # fmt: skip

    def _more_controls(
        self, index: int, seed: int, spec: Spec, evaluator: Evaluator, own: list[Row],
        pictures: dict[tuple[int, int, int, Spec, str], Tensor],
    ) -> list[Row]:  # fmt: skip
        """The untrained network, and for each round another one."""
        more = []
        attacked = {row.round: row for row in own if row.attacker == ATTACK}
        tensors, account = _read(self.file(index, seed, "untrained", spec))
        for number, row in attacked.items():
            untrained = replace(row, attacker="control:untrained", scores=None, target_accuracy=math.nan,
                                detail=account.get("detail", ""))  # fmt: skip
            if "images" in tensors:
                untrained = replace(untrained, scores=score(evaluator, tensors["images"].to(self.device)))
                pictures[index, seed, number, spec, "control:untrained"] = tensors["images"]
            more.append(untrained)
            others = [other for other in attacked if other != number]
            if others:
                nearest = min(others, key=lambda other: (abs(other - number), other))
                more.append(replace(
                    row, attacker="control:other_round", scores=attacked[nearest].scores, target_accuracy=math.nan,
                    detail=f"round {nearest}",
                ))  # fmt: skip
        return more

    def _evaluator(self) -> tuple[Evaluator, float, int]:
        """The evaluator, its accuracy on held-out private images, and how many classes it tells apart.

        It learns the private training images, and public ones of the same data set, whose classes are not private.
        """
        section, data = self.inverting.evaluator, self.problem.data
        images, labels = self._private()
        count = data.num_classes
        for pool, source in zip(self.pools, self.inverting.public, strict=True):
            if source.name in (None, self.plan.data.name):
                own = torch.tensor(sorted(set(pool.labels.tolist())))
                images = torch.cat([images, pool.images.to(self.device)])
                labels = torch.cat([labels, (torch.searchsorted(own, pool.labels) + count).to(self.device)])
                count += len(own)
        channels = images.shape[1]
        model = build_model(
            section.name, input_shape=tuple(images.shape[1:]), num_classes=count, options=section.model.options,
            seed=section.seed,
        )  # fmt: skip
        flat = Bounds.of((0.0,) * channels, (1.0,) * channels).to(self.device)
        task = Task.of(model, tuple(images.shape[1:]), count, flat, batchnorm="train_shared", dropout="active").to(
            self.device
        )
        central = Federation(
            rounds=section.epochs, clients=1, lr=section.lr, batch_size=min(section.batch_size, len(images))
        )
        weights, _ = trained_state(
            task, _to(weights_of(model), self.device), images, labels, central,
            fold_in(new_key(section.seed), "evaluator"),
            lambda done, todo, loss: self.told(f"evaluator {section.name}", done / todo),
        )  # fmt: skip
        network = Target(evaluating(task), weights)
        right = accuracy(task, weights, *self._held_out())
        private, own_labels = self._private()
        return Evaluator.of(network, range(data.num_classes), private, own_labels), right, count

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


def _prior_samples(prior: Any, classes: int, count: int, key: Key) -> Tensor:
    """What the generator makes of noise, given to classes as they come: (k, n, c, h, w)."""
    generator = prior.generator
    with torch.no_grad():
        made: Tensor = generator(normal(fold_in(key, "prior samples"), (classes * count, generator.latent)))
    return made.reshape(classes, count, *made.shape[1:])


def _account(found: Inverted, target: Target, prior: Any) -> dict[str, Any]:
    classes, each = found.images.shape[:2]
    with torch.no_grad():
        guesses = torch.cat([target.logits(part) for part in torch.split(found.images.flatten(0, 1), 256)]).argmax(-1)
    labels = torch.arange(classes, device=guesses.device).repeat_interleave(each)
    return {
        "target_accuracy": float((guesses == labels).double().mean()),
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


def _readable(path: Path) -> bool:
    """Whether a cell is done; a damaged file is made again."""
    if not path.exists():
        return False
    try:
        _read(path)
    except StoreError:
        return False
    return True


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            account = json.loads((file.metadata() or {})[_ACCOUNT])
            return {name: file.get_tensor(name) for name in file.keys()}, account  # noqa: SIM118  (no dictionary)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StoreError(f"'{path}' is damaged ({cause(error)}); remove it, and run the same command again.") from error
