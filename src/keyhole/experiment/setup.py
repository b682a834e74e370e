"""What all trials of an experiment share: data, task and networks, loaded once in each process."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from keyhole.core.defense import chain
from keyhole.core.keys import new_key, uniform
from keyhole.core.registry import DEFENSES, LABELS, MODELS
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.told import Told, silent
from keyhole.core.trial import Trial
from keyhole.core.types import Tensors, Weights
from keyhole.errors import ConfigError, DataError, ModelError, cause
from keyhole.experiment.prior import best_guess
from keyhole.experiment.spec import Experiment
from keyhole.experiment.training import train_states
from keyhole.zoo.datasets import Data, Pool, load_data
from keyhole.zoo.models import build_model, load_state

ENGINE_VERSION = 2
"""Raise it when the same trial would give another outcome because of the engine, the controls or the metrics."""

TRAIN_IMAGES = 2000
"""Images beside the targets that early and late states are trained on, where the data set has so many."""

_APART = 1_000_003
"""Between the seeds of a series' networks, so that they do not meet those of other seeds."""

SMALLEST = 7
"""Pixels of a side that SSIM's window needs."""


@dataclass(frozen=True, eq=False)
class Setup:
    """Loaded data, the undefended task, and the weights of each network."""

    data: Data
    task: Task
    weights: dict[int, tuple[Weights, ...]]
    """By seed: one network, or one for each update of a series."""
    source: str
    """Names the data with its digest, for trials."""
    states: dict[int, str]
    """By seed: where the weights come from, with their digest, for trials."""
    facts: dict[int, dict[str, float]]
    """By seed: what is known of the training, such as its accuracy; empty for networks that were not trained here."""
    normalisation: str
    """Digest of what the model does to pixels and of its modes, for trials."""
    dtype: torch.dtype
    device: torch.device
    seen: int = 0
    """Gradients of each target that went into the weights, where they come from a file."""
    last_client: dict[str, Any] = field(default_factory=dict, repr=False)
    """What the group before this one observed, for attackers who look at the same updates."""

    def networks(self, trial: Trial) -> tuple[Weights, ...]:
        """The weights that each update of a trial started from."""
        own = self.weights[trial.seed]
        return own if trial.fresh else own * max(trial.rounds, len(trial.episode) // trial.batch_size)

    def pool(self, name: str) -> Pool:
        """The pool a trial draws its secrets from."""
        return {"target": self.data.target, "tune": self.data.tune}[name]

    def images(self, pool: Pool) -> Tensor:
        """A pool's pixels on the device, (n, c, h, w) in [0, 1]."""
        return pool.images.to(self.device, self.dtype)

    @cached_property
    def prior(self) -> float:
        """The success of the best guess without an update, from the candidates, or else the public images."""
        pool = self.data.candidates if len(self.data.candidates) else self.data.public
        return best_guess(pool.images, pool.labels)

    @property
    def fingerprint(self) -> str:
        """Equal in two processes if and only if they attack the same problem."""
        return repr((self.source, self.normalisation, sorted(self.states.items())))


def find_device(name: str) -> torch.device:
    """The device to run on, or a `ConfigError` where it is missing."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device '{name}'; accepted: cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available here; use --device cpu, or install a CUDA build of torch.")
    if name == "cuda":
        # Matching goes to relative errors of 1e-7, which TF32 cannot reach; and equal trials must come out equal.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return torch.device(name)


def prepare(experiment: Experiment, device: torch.device, told: Told = silent) -> Setup:
    """Load everything an experiment names, and train what it wants trained. Deterministic: every process gets the same.

    ``told`` follows the training.
    """
    seeds = experiment.run.seeds
    dtype = {"float32": torch.float32, "float64": torch.float64}[experiment.run.dtype]
    section = experiment.data
    options = section.model_dump(exclude={"name", "mean", "std", "train"})
    train = section.train if section.train is not None else TRAIN_IMAGES
    data = load_data(
        section.name,
        **options,
        train=train if experiment.state.trained else 0,
        mean=None if section.mean is None else tuple(section.mean),
        std=None if section.std is None else tuple(section.std),
    )
    if min(data.image_shape[1:]) < SMALLEST:
        raise DataError(
            f"images of '{section.name}' are {data.image_shape[1]}x{data.image_shape[2]} pixels; similarity needs "
            f"windows of {SMALLEST}x{SMALLEST}, so set data.size to {SMALLEST} or more."
        )
    mean, std = _mean_and_std(experiment, data)
    modes, shape, bounds = experiment.model, data.image_shape, Bounds.of(mean, std, dtype)
    models = {seed: [_model(experiment, data, number) for number in _networks(experiment, seed)] for seed in seeds}

    def task_of(model: nn.Module) -> Task:
        return Task.of(model, shape, data.num_classes, bounds, batchnorm=modes.batchnorm, dropout=modes.dropout)

    if experiment.state.train == "none" or experiment.state.trained:
        task = task_of(models[seeds[0]][0])
    else:
        task = _load(experiment, models, task_of)
    check_model(task, dtype)
    weights = {seed: tuple(weights_of(model, dtype) for model in own) for seed, own in models.items()}
    facts: dict[int, dict[str, float]] = {}
    if experiment.state.trained:
        weights, facts = train_states(experiment, data, task, models, told)
    states = {seed: f"{_state_name(experiment)}#{_digest(own)}" for seed, own in weights.items()}
    _check_apart(experiment, states)
    how = _normalisation(experiment, task, mean, std, dtype)
    source = f"{section.name}#{data.digest}"
    there = {
        seed: tuple(Weights(*({n: t.to(device) for n, t in part.items()} for part in one)) for one in own)
        for seed, own in weights.items()
    }
    return Setup(data, task.to(device), there, source, states, facts, how, dtype, device, experiment.state.seen or 0)


def _mean_and_std(experiment: Experiment, data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the model's inputs are normalised by, as the experiment says or else the model's card."""
    normalize, name = experiment.model.normalize, experiment.model.name
    if normalize is None:
        normalize = bool(MODELS.card(name).facts.get("normalize", False)) if name is not None else False
    channels = data.image_shape[0]
    return (data.mean, data.std) if normalize else ((0.0,) * channels, (1.0,) * channels)


def _check_apart(experiment: Experiment, states: dict[int, str]) -> None:
    """Raises `ConfigError` where two seeds give one network."""
    for (one, a), (two, b) in itertools.combinations(states.items(), 2):
        if a == b:
            raise ConfigError(
                f"run.seeds {one} and {two} give the same network, so they are not two; give one seed"
                + (
                    ", as state.train names one file of weights."
                    if experiment.state.train != "none"
                    else ", or a model whose weights depend on torch's random state."
                )
            )


def check_model(task: Task, dtype: torch.dtype) -> None:
    """Raises `ModelError` where the model does not run as attacks run it: differentiated, many trials beside another.

    Without it every trial would fail by itself, and the report would be about nothing.
    """
    pixels = uniform(new_key(0), (2, 2, *task.input_shape), dtype)
    targets = torch.eye(task.num_classes, dtype=dtype)[:2]
    weights = weights_of(task.model, dtype)

    def gradient(inputs: Tensor) -> tuple[Tensors, Tensor]:
        def loss(params: Tensors) -> tuple[Tensor, Tensor]:
            logits = task.logits(Weights(params, weights.buffers), inputs)
            return task.loss(logits, targets).sum(), logits

        return grad(loss, has_aux=True)(weights.params)

    try:
        _, logits = vmap(gradient)(task.bounds.from_pixels(pixels))
    except Exception as error:
        raise ModelError(
            f"the model does not run under torch.func.grad and vmap, as attacks run it ({cause(error)}); it may change "
            "nothing in place that it is given, and have no .item() and no branch on values."
        ) from error
    if not logits.isfinite().all():
        raise ModelError("the model gives NaN or infinity for random images; look at its weights and its forward pass.")


def _normalisation(
    experiment: Experiment, task: Task, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> str:
    """A digest for the trial's name.

    The same pixels under another normalisation, mode or forward pass are another problem, and so they are under other
    versions of what is not named in the trial.
    """
    probe = uniform(new_key(0), (2, *task.input_shape), dtype)
    logits = task.logits(weights_of(task.model, dtype), task.bounds.from_pixels(probe))
    rules = sorted({str(entry.spec.asdict().get("labels")) for entry in experiment.attacks} & {c.name for c in LABELS})
    how = repr(
        (
            mean,
            std,
            experiment.model.batchnorm,
            experiment.model.dropout,
            [f"{value:.3g}" for value in logits.flatten().tolist()],
            [(name, LABELS.card(name).version) for name in rules],
            ENGINE_VERSION,
        )
    )
    return hashlib.sha256(how.encode()).hexdigest()[:8]


def _networks(experiment: Experiment, seed: int) -> list[int]:
    """Seeds of the networks that belong to one seed: one, or one for each update of a series."""
    fresh = experiment.client.series if experiment.client.fresh_weights else 1
    return [seed + _APART * number for number in range(fresh)]


def _model(experiment: Experiment, data: Data, seed: int) -> nn.Module:
    model = build_model(
        experiment.model.name or str(experiment.model.factory),
        input_shape=data.image_shape,
        num_classes=data.num_classes,
        options=experiment.model.options,
        seed=seed,
    )
    refuse_frozen(model)
    return model


def refuse_frozen(model: nn.Module) -> None:
    """Raises `ModelError` where parameters are frozen: their gradients would be attacked, which no client sends."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        layers = ",".join(dict.fromkeys(name.rpartition(".")[0] or name for name in frozen))
        more = f" and {len(frozen) - 1} more are" if len(frozen) > 1 else " is"
        raise ModelError(
            f"'{frozen[0]}'{more} frozen (requires_grad=False), and here clients train and send all parameters; do not "
            f'freeze them in the factory, but add the defense {{ name = "withhold", layers = "{layers}" }}: its '
            "adaptive attacker matches the rest."
        )


def _load(experiment: Experiment, models: dict[int, list[nn.Module]], task_of: Callable[[nn.Module], Task]) -> Task:
    """Put the files' weights into ``models`` and return their task.

    Where the files are of a network that one of the experiment's defenses had changed, the models become such
    networks, for every client and attacker: also one without a defense gets the network that was trained.
    """
    first = experiment.run.seeds[0]
    try:
        for seed, own in models.items():
            _load_each(experiment, seed, own)
        return task_of(models[first][0])
    except ModelError as error:
        plain = task_of(models[first][0])
        for specs in experiment.defenses:
            task = chain(*(DEFENSES.build(spec.name, **spec.asdict()) for spec in specs)).on_task(plain)
            changed = {seed: [copy.deepcopy(task.model) for _ in own] for seed, own in models.items()}
            with suppress(ModelError):
                for seed, own in changed.items():
                    _load_each(experiment, seed, own)
                models |= changed
                return replace(task, model=changed[first][0])
        raise error


def _load_each(experiment: Experiment, seed: int, models: list[nn.Module]) -> None:
    for number, model in zip(_networks(experiment, seed), models, strict=True):
        load_state(model, Path(experiment.state.train.replace("{seed}", str(number))))


def _state_name(experiment: Experiment) -> str:
    train = experiment.state.train
    return "untrained" if train == "none" else train if experiment.state.trained else Path(train).name


def _digest(networks: tuple[Weights, ...]) -> str:
    digest = hashlib.sha256()
    for part in (part for weights in networks for part in weights):
        for name, tensor in part.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
