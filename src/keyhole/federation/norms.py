"""BatchNorm's running statistics: kept up to date in training, used in evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from keyhole.core.modes import BatchNormByBatch
from keyhole.core.task import Task

MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics: PyTorch's default, also where a layer asks for another."""


class RunningNorm(nn.Module):
    """BatchNorm with running statistics; keeps the parameters and buffers of the layer it replaces.

    Args:
        layer: the layer by batch statistics that a training task has.
        train: normalise by the batch and write the running statistics, else normalise by the running ones. Writing is
            in place: whoever calls the model passes buffers that may be written.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: BatchNormByBatch, train: bool) -> None:
        super().__init__()
        self.eps, self.train_mode = layer.eps, train
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name, None))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised inputs, (b, c, ...)."""
        if self.train_mode and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # A layer without running statistics goes by the batch in either mode, as in PyTorch.
        by_batch = self.train_mode or self.running_mean is None
        return nn.functional.batch_norm(
            inputs, self.running_mean, self.running_var, self.weight, self.bias, by_batch, MOMENTUM, self.eps
        )


def recording(task: Task) -> Task:
    """The same training task, whose model writes BatchNorm's running statistics into the buffers it is called with.

    A task in eval mode is left as it is: its running statistics are constants.
    """
    return _with_running(task, train=True)


def evaluating(task: Task) -> Task:
    """The task as it is used after training: BatchNorm by running statistics, dropout off, noise where it stays."""
    staying = tuple(noise for noise in task.noises if noise[2])
    task = replace(_with_running(task, train=False), drops=(), noises=staying)
    return replace(task, batchnorm="eval") if task.norms else task


def _with_running(task: Task, train: bool) -> Task:
    model = copy.deepcopy(task.model)
    for name in task.norms:
        layer = model.get_submodule(name)
        if isinstance(layer, BatchNormByBatch):
            model.set_submodule(name, RunningNorm(layer, train))
    return replace(task, model=model)
