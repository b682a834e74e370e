"""What all trials of an experiment share: data, task and networks, loaded once in each process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keyhole.core.registry import MODELS
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Weights
from keyhole.errors import ConfigError
from keyhole.experiment.spec import Experiment
from keyhole.zoo.datasets import Data, Pool, load_data
from keyhole.zoo.models import build_model, load_state


@dataclass(frozen=True, eq=False)
class Setup:
    """Loaded data, the undefended task, and the weights of each network."""

    data: Data
    task: Task
    weights: dict[int, Weights]
    """By seed."""
    source: str
    """Names the data with its digest, for trials."""
    states: dict[int, str]
    """By seed: where the weights come from, with their digest, for trials."""
    normalisation: str
    """Digest of what the model does to pixels and of its modes, for trials."""
    dtype: torch.dtype
    device: torch.device

    def pool(self, name: str) -> Pool:
        """The pool a trial draws its secrets from."""
        return {"target": self.data.target, "tune": self.data.tune}[name]

    def images(self, pool: Pool) -> Tensor:
        """A pool's pixels on the device, (n, c, h, w) in [0, 1]."""
        return pool.images.to(self.device, self.dtype)

    def public_inputs(self) -> Tensor:
        """The public images in the model's input space, (n, c, h, w)."""
        return self.task.bounds.from_pixels(self.images(self.data.public))


def find_device(name: str) -> torch.device:
    """The device to run on, or a `ConfigError` where it is missing."""
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device '{name}'; accepted: cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available here; use --device cpu, or install a CUDA build of torch.")
    return torch.device(name)


def prepare(experiment: Experiment, device: torch.device) -> Setup:
    """Load everything an experiment names. Deterministic: every process gets the same."""
    dtype = {"float32": torch.float32, "float64": torch.float64}[experiment.run.dtype]
    section = experiment.data
    options = section.model_dump(exclude={"name", "mean", "std"})
    data = load_data(
        section.name,
        **options,
        mean=None if section.mean is None else tuple(section.mean),
        std=None if section.std is None else tuple(section.std),
    )
    channels = data.target.images.shape[1]
    normalize = experiment.model.normalize
    if normalize is None:
        name = experiment.model.name
        normalize = bool(MODELS.card(name).facts.get("normalize", False)) if name is not None else False
    mean, std = (data.mean, data.std) if normalize else ((0.0,) * channels, (1.0,) * channels)
    shape = data.image_shape
    tasks: list[Task] = []
    weights: dict[int, Weights] = {}
    states: dict[int, str] = {}
    for seed in experiment.run.seeds:
        model = build_model(
            experiment.model.name or str(experiment.model.factory),
            input_shape=shape,
            num_classes=data.num_classes,
            options=experiment.model.options,
            seed=seed,
        )
        if experiment.state.train != "none":
            load_state(model, Path(experiment.state.train))
        if not tasks:
            bounds = Bounds.of(mean, std, dtype)
            modes = experiment.model
            tasks.append(
                Task.of(model, shape, data.num_classes, bounds, batchnorm=modes.batchnorm, dropout=modes.dropout)
            )
        own = weights_of(model, dtype)
        weights[seed] = Weights(*({n: t.to(device) for n, t in part.items()} for part in own))
        states[seed] = f"{_state_name(experiment)}#{_digest(own)}"
    # The same pixels under another normalisation or mode are another problem, so these enter the trial's name.
    how = repr((mean, std, experiment.model.batchnorm, experiment.model.dropout))
    normalisation = hashlib.sha256(how.encode()).hexdigest()[:8]
    source = f"{section.name}#{data.digest}"
    return Setup(data, tasks[0].to(device), weights, source, states, normalisation, dtype, device)


def _state_name(experiment: Experiment) -> str:
    train = experiment.state.train
    return "untrained" if train == "none" else Path(train).name


def _digest(weights: Weights) -> str:
    digest = hashlib.sha256()
    for part in weights:
        for name, tensor in part.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
