"""Early and late states: the audit's networks after some rounds of a federation on the audit's own data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from keyhole.core.keys import fold_in, new_key
from keyhole.core.task import Task, weights_of
from keyhole.core.told import Told
from keyhole.core.types import Weights
from keyhole.experiment.spec import Experiment
from keyhole.federation.cache import trained_state
from keyhole.federation.states import STATES, Federation
from keyhole.solve.threads import one_thread
from keyhole.zoo.datasets import Data


def federation_of(experiment: Experiment) -> Federation:
    """The federation that an audit file asks for: a named one, with some settings of its own."""
    given = experiment.state.model_dump(exclude={"train"}, exclude_none=True)
    return replace(STATES[experiment.state.train], **given)


def train_states(
    experiment: Experiment, data: Data, task: Task, models: dict[int, list[nn.Module]], told: Told
) -> tuple[dict[int, tuple[Weights, ...]], dict[int, dict[str, float]]]:
    """Train the networks of each seed, or take them from the cache.

    The clients' images are the train pool and the targets: whoever is attacked took part in the earlier rounds too.
    Training runs as most clients do, with BatchNorm and dropout in train mode, whatever mode is attacked.

    Args:
        experiment: names the state and its settings.
        data: the pools.
        task: what is attacked.
        models: by seed, networks with their initial weights.
        told: told how far each training is.

    Returns:
        By seed the trained weights, and what is known of the training.
    """
    federation = federation_of(experiment)
    images = torch.cat([data.train.images, data.target.images])
    labels = torch.cat([data.train.labels, data.target.labels])
    bounds = task.bounds
    inputs = bounds.from_pixels(images.to(bounds.mean.dtype))
    weights: dict[int, tuple[Weights, ...]] = {}
    facts: dict[int, dict[str, float]] = {}
    for seed, (model,) in models.items():
        training = Task.of(
            model, task.input_shape, task.num_classes, bounds, batchnorm="train_shared", dropout="active"
        )
        what = f"training the network of seed {seed} ({experiment.state.train}, {federation.rounds} rounds)"

        def progress(done: int, total: int, loss: float, what: str = what) -> None:
            told(what, done / total)

        start = weights_of(model, bounds.mean.dtype)
        key = fold_in(new_key(seed), "training")
        # As in the worker processes, which must come to the same weights.
        with one_thread(inputs.device):
            trained, known = trained_state(training, start, inputs, labels, federation, key, progress)
        weights[seed] = (trained,)
        facts[seed] = {
            "rounds": known.rounds,
            "clients": federation.clients,
            "images": len(labels),
            "accuracy": known.accuracy,
            "loss": known.losses[-1],
        }
    return weights, facts
