"""Federated training under defenses: every defense and seed of a plan, round by round, in files that survive a kill.

In the output folder, for each defense and seed: ``round-NNN.safetensors``, the global network after each round, and
``progress.safetensors``, all that the next round needs, with the account of the rounds so far. All files are readable
by their owner alone, as weights tell of the images.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from keyhole.core.defense import Defense
from keyhole.core.keys import fold_in, new_key
from keyhole.core.registry import MODELS
from keyhole.core.task import Bounds, Task, fit_weights, weights_of
from keyhole.core.tensors import map_tensors, squared_norm
from keyhole.core.told import Told, silent
from keyhole.core.trial import Spec
from keyhole.core.types import Batch, Tensors, Weights
from keyhole.defenses.dp_sgd import DPSGD
from keyhole.defenses.user_dp import UserDP
from keyhole.errors import ConfigError, DataError, ModelError, StoreError, cause
from keyhole.experiment.plan import build_defense
from keyhole.experiment.recorded_training import MOST
from keyhole.experiment.recording import record_round, record_secrets
from keyhole.experiment.setup import TRAIN_IMAGES, find_device, refuse_frozen
from keyhole.experiment.store import Store
from keyhole.experiment.training_plan import TrainingPlan
from keyhole.experiment.work import HERE, Workers, available_cores, in_processes
from keyhole.federation.cache import TRAINING_VERSION, probe
from keyhole.federation.local import Round, State
from keyhole.federation.states import AfterRound, accuracy, guessed_right, rounds
from keyhole.federation.strategies import FedAvg, Memory, Noised
from keyhole.solve.files import as_metadata, digest, read_tensors, write_tensors
from keyhole.solve.threads import one_thread
from keyhole.zoo.datasets import Data, load_data
from keyhole.zoo.models import build_model

SAME = 1e-5
"""Up to this distance, relative to how far a client moved, two float32 updates are equal but for rounding."""

_PROGRESS = "progress.safetensors"

TRANSCRIPT, SECRETS = "transcript", "secrets"
"""Folders of a training: what its server saw of chosen rounds, and what its clients trained on."""


@dataclass(frozen=True)
class AfterTraining:
    """What one round came to."""

    round: int
    """0 is before the first."""
    accuracy: float
    """Share of the test images that the global network gets right."""
    loss: float = math.nan
    """Mean training loss of the clients."""
    bytes_up: int = 0
    """What all clients sent, every parameter and buffer in full."""
    nonzero: float = math.nan
    """Share of the entries of the clients' updates that are not zero."""
    client_seconds: float = math.nan
    """Wall time of one client's round."""


@dataclass
class Trained:
    """One training: a defense on every client, one seed."""

    defense: tuple[Spec, ...]
    seed: int
    folder: Path
    rounds: list[AfterTraining] = field(default_factory=list)
    changed: float = math.nan
    """Share of clients whose first update the defense changed beyond rounding; NaN without a defense."""
    seen: int = 0
    """Most gradients in a round into which one image goes."""
    right: tuple[bool, ...] = field(default=(), repr=False)
    """Which of the held-out images the network gets right after the last round."""
    chance: float = math.nan
    """Accuracy of naming their most frequent class for all of them."""

    @property
    def accuracy(self) -> float:
        """After the last round."""
        return self.rounds[-1].accuracy

    @property
    def what(self) -> str:
        """For the progress."""
        return f"training {self.folder.parent.name}, seed {self.seed}"

    def checkpoint(self, number: int) -> Path:
        """The file of the global network after a round."""
        return self.folder / f"round-{number:03d}.safetensors"


Ask = Callable[[Trained, bool, Weights, int], tuple[Round, float]]
"""`keyhole.federation.states.Clients` of any training: which one, whether under its defense, the global weights, and
the number of rounds done."""


def folder_of(plan: TrainingPlan, folder: Path, index: int, seed: int | str) -> Path:
    """Where the training of the ``index``-th defense lies."""
    names = "+".join(spec.name for spec in plan.defenses[index]) or "none"
    return folder / f"{index:02d}-{names}" / f"seed-{seed}"


def train(
    plan: TrainingPlan,
    folder: Path,
    *,
    jobs: int = 1,
    device: str = "cpu",
    told: Told = silent,
    workers: Workers = HERE,
    ask: Ask | None = None,
) -> list[Trained]:
    """Train what is missing in ``folder``; equal plans give equal networks, interrupted or not.

    Args:
        plan: what to train.
        folder: the output folder; made if needed.
        jobs: trainings at a time on a CPU, in processes of their own; 0 for one a core. With the ``workers`` of a
            cluster or with ``ask``, which spread the clients of a round, it is always one.
        device: ``cpu`` or ``cuda``.
        told: told which training is how far.
        workers: who trains the clients.
        ask: runs the clients of a round in place of ``workers``.

    Raises:
        ConfigError: the other kind of clients began what is to be gone on with.
        ModelError: training diverged, or a defended client returned exactly the weights it got.
    """
    where = find_device(device)
    # Before the folder is claimed: bad input must leave nothing behind.
    problem = Problem(plan, where, workers)
    for specs in plan.defenses:
        problem.task(specs)
    runs = [
        Trained(specs, seed, folder_of(plan, folder, index, seed))
        for index, specs in enumerate(plan.defenses)
        for seed in plan.run.seeds
    ]
    with Store(folder) as store, one_thread(where):
        store.claim_config(plan.to_toml())
        for run in runs:
            problem.check(run)
        if where.type == "cpu" and workers is HERE and ask is None:
            _side_by_side(plan, runs, jobs or available_cores(), told)
        # What is done by now is only read.
        return [problem.train(run, told, ask) for run in runs]


def _side_by_side(plan: TrainingPlan, runs: Sequence[Trained], jobs: int, told: Told) -> None:
    """Several trainings at a time, each in a process of its own; all that is left of them is their files."""
    missing = {run.what: run for run in runs if not run.checkpoint(plan.federation.rounds).exists()}
    if min(jobs, len(missing)) > 1:
        for name, _ in in_processes(_Training(plan), missing, jobs, told):
            told(name, 1.0)


class _Training:
    """Called with a training in a worker, whose images are loaded once."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan

    @cached_property
    def problem(self) -> Problem:
        """The same as the main process has, which has told the user of whatever there is to be warned of."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Problem(self.plan, torch.device("cpu"))

    def __call__(self, run: Trained, progress: Callable[[float], None]) -> None:
        self.problem.train(run, lambda what, fraction: progress(fraction))


class Problem:
    """What all trainings of a plan share: images, and how networks are made."""

    def __init__(self, plan: TrainingPlan, device: torch.device, workers: Workers = HERE) -> None:
        section = plan.data
        options = section.audited.model_dump(exclude={"name", "mean", "std", "train"})
        wanted = TRAIN_IMAGES if section.train is None else section.train
        data: Data = load_data(
            section.name,
            **options,
            # Held-out images come first, so that more training images leave them as they are.
            train=section.test + wanted,
            mean=None if section.mean is None else tuple(section.mean),
            std=None if section.std is None else tuple(section.std),
        )
        if len(data.train) <= section.test:
            raise DataError(
                f"data set '{section.name}' has {len(data.train)} images left beside the other pools, and data.test "
                f"takes {section.test}; lower data.test, data.candidates or data.target, or raise data.train."
            )
        self.plan, self.data, self.device, self.workers = plan, data, device, workers
        self.federation = plan.federation.federation()
        self._parts: dict[int, tuple[Tensor, ...]] = {}
        name, normalize = plan.model.name, plan.model.normalize
        if normalize is None:
            normalize = bool(MODELS.card(name).facts.get("normalize", False)) if name is not None else False
        flat = ((0.0,) * len(data.mean), (1.0,) * len(data.mean))
        self.bounds = Bounds.of(*((data.mean, data.std) if normalize else flat))
        held, own = data.train.images.tensor_split([section.test])
        held_labels, own_labels = data.train.labels.tensor_split([section.test])
        self.test = (self._inputs(held), held_labels.to(device))
        # The targets too: whoever is attacked took part in the rounds before.
        self.inputs = self._inputs(torch.cat([own, data.target.images]))
        self.labels = torch.cat([own_labels, data.target.labels]).to(device)
        targets = one_hot(data.public.labels, data.num_classes).to(device, torch.float32)
        share = torch.full((len(targets),), 1.0 / len(targets), device=device)
        self.public = Batch(self._inputs(data.public.images), targets, share)
        for seed in plan.run.seeds:
            self.parts(seed)
        self._check_sent()
        for specs in plan.defenses:
            self._check_bound(build_defense(specs))

    def _inputs(self, images: Tensor) -> Tensor:
        return self.bounds.from_pixels(images).to(self.device)

    def parts(self, seed: int) -> tuple[Tensor, ...]:
        """Which images each client has."""
        if seed not in self._parts:
            parts = self.federation.deal(self.labels.cpu(), fold_in(training_key(seed), "clients"))
            left = len(self.labels) - sum(len(part) for part in parts)
            if left:
                how = f'partition = "{self.plan.federation.partition}"'
                warnings.warn(f"{left} of {len(self.labels)} training images go to no client: {how}.", stacklevel=2)
            self._parts[seed] = parts
        return self._parts[seed]

    def _check_sent(self) -> None:
        """Before the training, as the section cannot be changed after it."""
        section, sent = self.plan.federation, self.plan.sent
        for part in (part for seed in self.plan.run.seeds for part in self.parts(seed)[: sent.clients if sent else 0]):
            steps = section.epochs * -(-len(part) // section.batch_size)
            if max(len(part), steps) > MOST:
                raise ConfigError(
                    f"a client has {len(part)} images and takes {steps} steps a round; up to {MOST} of each are "
                    "attacked: remove [audit.sent], or have more clients."
                )

    def _check_bound(self, defense: Defense) -> None:
        """A guarantee for each image does not survive that one image counts several times in a step."""
        if defense.success_bound(0.5, 1) is None:
            return
        smallest = min(len(part) for seed in self.plan.run.seeds for part in self.parts(seed))
        if smallest < self.federation.batch_size:
            raise ConfigError(
                f"a client has {smallest} images, and federation.batch_size is {self.federation.batch_size}: under "
                "differential privacy one image would count several times in a step; lower it, or the clients."
            )

    def seen(self, seed: int) -> int:
        """Most gradients in a round into which one image goes: a last batch is filled up with images of the epoch."""
        size = self.federation.batch_size
        each = [1 if len(part) % size == 0 else 1 + -(-size // len(part)) for part in self.parts(seed)]
        return self.federation.epochs * max(each)

    def train(self, run: Trained, told: Told, ask: Ask | None = None) -> Trained:
        """One training, from where it stopped."""
        model = self.network(run.seed)
        plain = self._plain(model)
        bare_start = Weights(*(map_tensors(lambda t: t.to(self.device), part) for part in weights_of(model)))
        defense = build_defense(run.defense) if run.defense else None
        task = plain if defense is None else defense.on_task(plain)
        start = fit_weights(task, bare_start)
        run.seen, identity = self.seen(run.seed), self.identity(run)
        key = training_key(run.seed)
        strategy = self._server(run.defense, key)
        weights, memory, states = _resume(run, start) or (start, None, None)
        if 1 < len(run.rounds) <= self.federation.rounds and bool(states) is (ask is not None):
            begun, now = ("lifted", "flower") if states else ("flower", "lifted")
            raise ConfigError(f"'{run.folder}' was begun with --backend {begun}; --backend {now} cannot go on with it.")
        clients, bare_clients = (partial(ask, run, defended) if ask else None for defended in (True, False))
        if not run.rounds:
            run.rounds.append(AfterTraining(0, accuracy(task, start, *self.test)))
            _keep(run, task, start, strategy.begin(start), (), identity)
        before = weights
        given: dict[str, Any] = {"public": self.public, "strategy": strategy, "spread": self.workers.spread}
        steps = rounds(
            task, weights, self.inputs, self.labels, self.federation, key, done=len(run.rounds) - 1,
            defense=defense, memory=memory, states=states or None, clients=clients, **given,
        )  # fmt: skip
        for after in steps:
            assert after.clients is not None and after.memory is not None
            if defense is not None:
                _guard(run, before, after)
            if defense is not None and after.number == 1:
                given["clients"] = bare_clients
                bare = next(rounds(plain, bare_start, self.inputs, self.labels, self.federation, key, **given))
                run.changed = _changed(before, after, bare_start, bare)
            if after.number in self.plan.recorded:
                self._record(run, task, before, after)
            run.rounds.append(_account(before, after, accuracy(task, after.weights, *self.test)))
            _keep(run, task, after.weights, after.memory, after.clients.states, identity)
            before = after.weights
            told(run.what, after.number / self.federation.rounds)
        run.right = tuple(guessed_right(task, before, *self.test).tolist())
        run.chance = float(self.test[1].bincount().max()) / len(run.right)
        return run

    def _record(self, run: Trained, task: Task, before: Weights, after: AfterRound) -> None:
        """What the server sees of a round, and what its clients train on."""
        assert after.clients is not None
        known = task.model.state_dict().keys()
        sent = Weights(before.params, {name: value for name, value in before.buffers.items() if name in known})
        section = self.plan.federation
        told = {"lr": section.lr, "local-epochs": section.epochs, "batch-size": section.batch_size}
        told |= {"clip": section.clip} if section.clip else {}
        record_round(run.folder / TRANSCRIPT, after.number, sent, after.clients, told, section.strategy)
        assert self.plan.sent is not None
        attacked = self.parts(run.seed)[: self.plan.sent.clients]
        record_secrets(run.folder / SECRETS, after.number, self.inputs, self.labels, attacked)

    def check(self, run: Trained) -> None:
        """Hold what a folder has of a training against what would be trained; a damaged file is none."""
        from safetensors import SafetensorError

        path = run.folder / _PROGRESS
        if not path.exists():
            return
        try:
            _, account = read_tensors(path)
        except (SafetensorError, OSError, ValueError, KeyError):
            return
        if account.get("identity") != self.identity(run):
            raise StoreError(
                f"'{run.folder}' was trained with another model, other images or another version of Keyhole or of a "
                "defense; choose another --out or remove the folder."
            )

    def identity(self, run: Trained) -> str:
        """Names what a training is made from beyond the folder's config: networks, images and versions."""
        model = self.network(run.seed)
        start = weights_of(model)
        made_from = {
            "version": TRAINING_VERSION,
            "defense": [(spec.name, spec.version) for spec in run.defense],
            "network": [digest(*start), *probe(self._plain(model), start)],
            "images": self._images,
        }
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    @cached_property
    def _images(self) -> str:
        held, labels = self.test
        own = {"inputs": self.inputs, "labels": self.labels, "held": held, "their labels": labels}
        return digest(own, {"public": self.public.inputs, "their labels": self.public.targets})

    def task(self, specs: tuple[Spec, ...]) -> Task:
        """What clients under these defenses train."""
        plain = self._plain(self.network(0))
        return build_defense(specs).on_task(plain) if specs else plain

    def fresh(self, specs: tuple[Spec, ...], seed: int) -> Weights:
        """The weights that a training begins with."""
        return fit_weights(self.task(specs), weights_of(self.network(seed)))

    def _plain(self, model: nn.Module) -> Task:
        return Task.of(
            model, self.data.image_shape, self.data.num_classes, self.bounds, batchnorm="train_shared", dropout="active"
        ).to(self.device)

    def _server(self, specs: tuple[Spec, ...], key: Tensor) -> FedAvg:
        """The strategy, and the noise that a defense leaves to the server."""
        strategy = self.plan.federation.server()
        for number, spec in enumerate(specs):
            link = build_defense((spec,))
            if isinstance(link, UserDP):
                own = fold_in(fold_in(key, "server noise"), number)
                strategy = Noised(strategy, link.server_noise(self.federation.clients), own)
        return strategy

    def network(self, seed: int) -> nn.Module:
        """The user's model, before any defense changes it."""
        model = build_model(
            self.plan.model.name or str(self.plan.model.factory),
            input_shape=self.data.image_shape,
            num_classes=self.data.num_classes,
            options=self.plan.model.options,
            seed=seed,
        )
        refuse_frozen(model)
        return model


def training_key(seed: int) -> Tensor:
    """All of a training's randomness."""
    return fold_in(new_key(seed), "training")


def _moved(before: Weights, after: AfterRound) -> Tensors:
    """How far each client moved, with a leading axis of clients."""
    assert after.clients is not None
    return {name: before.params[name] - sent for name, sent in after.clients.weights.params.items()}


def _guard(run: Trained, before: Weights, after: AfterRound) -> None:
    """A client whose defense drops its update silently would pass for a private one."""
    moved = torch.stack([value.flatten(1).ne(0).any(1) for value in _moved(before, after).values()]).any(0)
    still = (~moved).nonzero().flatten().tolist()
    if still:
        names = " + ".join(spec.name for spec in run.defense)
        raise ModelError(
            f"client {still[0]} returned exactly the weights it got in round {after.number} under {names} (clients "
            f"that did so: {len(still)} of {len(moved)}); nothing is trained so, choose a weaker defense."
        )


def _changed(before: Weights, defended: AfterRound, start: Weights, bare: AfterRound) -> float:
    """Share of clients whose update differs from that of the same client without its defense."""
    if start.params.keys() != before.params.keys():
        return 1.0  # another model has other updates
    one, two = _moved(before, defended), _moved(start, bare)
    count = len(next(iter(one.values())))
    differs = 0
    for client in range(count):
        own, plain = ({name: value[client] for name, value in moved.items()} for moved in (one, two))
        apart = squared_norm(map_tensors(torch.sub, own, plain)).sqrt()
        differs += bool(apart > SAME * squared_norm(plain).sqrt())
    return differs / count


def _account(before: Weights, after: AfterRound, right: float) -> AfterTraining:
    assert after.clients is not None
    sent = [*after.clients.weights.params.values(), *after.clients.weights.buffers.values()]
    moved = list(_moved(before, after).values())
    entries = sum(value.numel() for value in moved)
    return AfterTraining(
        round=after.number,
        accuracy=right,
        loss=after.loss,
        bytes_up=sum(value.numel() * value.element_size() for value in sent),
        nonzero=sum(int(value.count_nonzero()) for value in moved) / entries,
        client_seconds=after.seconds,
    )


def epsilon(specs: tuple[Spec, ...], gradients: int) -> float | None:
    """What differential privacy with one image as the unit guarantees after so many noisy gradients of it.

    `None` where no link gives a guarantee, or another one acts before it.
    """
    if build_defense(specs).success_bound(0.5, 1) is None:
        return None
    for spec in specs:
        link = build_defense((spec,))
        if isinstance(link, DPSGD):
            try:
                return link.privacy(gradients).epsilon
            except ConfigError:  # beyond what the accountant can compute
                return math.inf
    return None


# Files


def _keep(run: Trained, task: Task, weights: Weights, memory: Memory, states: Sequence[State], identity: str) -> None:
    """The global network in a file of its own, then everything that the next round needs, each atomically."""
    known = task.model.state_dict().keys()
    whole = {**weights.params, **weights.buffers}
    write_tensors(run.checkpoint(run.rounds[-1].round), {name: whole[name] for name in whole if name in known}, {})
    parts = {"params": weights.params, "buffers": weights.buffers}
    parts |= {f"server:{kind}": tensors for kind, tensors in memory.items()}
    parts |= {f"client:{c}:{place}": kept for c, state in enumerate(states) for place, kept in state.items()}
    rows = [asdict(row) for row in run.rounds]
    account = {"identity": identity, "rounds": rows, "changed": run.changed, "clients": len(states)}
    named = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    write_tensors(run.folder / _PROGRESS, named, as_metadata(account))


def _resume(run: Trained, like: Weights) -> tuple[Weights, Memory, list[State]] | None:
    """Where a training stopped; `None`, with a warning if there is a file, where there is nothing to trust."""
    from safetensors import SafetensorError

    path = run.folder / _PROGRESS
    if not path.exists():
        return None
    device = next(iter(like.params.values())).device
    try:
        stored, account = read_tensors(path)
        parts: dict[str, Tensors] = {}
        for name, tensor in stored.items():
            part, _, own = name.partition("/")
            parts.setdefault(part, {})[own] = tensor.to(device)
        weights = Weights(*(_like(parts.pop(part, {}), own) for part, own in zip(Weights._fields, like, strict=True)))
        run.rounds = [AfterTraining(**row) for row in account["rounds"]]
        run.changed = float(account["changed"])
        memory: Memory = {}
        states: list[State] = [{} for _ in range(account["clients"])]
        for part, tensors in parts.items():
            kind, _, rest = part.partition(":")
            if kind == "server":
                memory[rest] = tensors
            else:
                client, _, place = rest.partition(":")
                states[int(client)][place] = tensors
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({cause(error)}); the training begins anew.", stacklevel=3)
        run.rounds, run.changed = [], math.nan
        return None
    return weights, memory, states


def _like(stored: Tensors, like: Tensors) -> Tensors:
    """In the order of ``like``, which sums over all parameters follow."""
    if stored.keys() != like.keys() or any(stored[name].shape != like[name].shape for name in like):
        raise ValueError("it is of another model")
    return {name: stored[name] for name in like}
