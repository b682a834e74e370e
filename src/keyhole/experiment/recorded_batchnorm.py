"""BatchNorm's batch statistics, worked out from the running statistics before and after one local step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keyhole.core.modes import norm_layers
from keyhole.core.task import Task
from keyhole.core.types import Tensors
from keyhole.experiment.recorded_training import Training
from keyhole.experiment.transcript import Recorded

ROUNDING = 1e-4
"""How far below 0 a variance may come out, in units of the running variance: what single precision leaves."""


def statistics_of(network: nn.Module, task: Task, one: Recorded, training: Training) -> tuple[Tensors | None, str]:
    """Mean and variance of what entered each BatchNorm layer, as far as an update tells, and a remark on it.

    In train mode a step with momentum m makes ``r' = (1 - m) r + m s`` of a running statistic r and the batch's own s,
    so that ``s = r - (r - r') / m``. A running variance follows the unbiased variance of n values, which is
    ``n / (n - 1)`` times the biased one. Without a momentum PyTorch takes the mean over all steps: m is 1 over their
    number.

    Args:
        network: what was trained, for its momenta.
        task: says which mode is assumed.
        one: the update.
        training: how many images and steps are behind it.

    Returns:
        As `keyhole.core.types.Trace.statistics`, for the layers whose running statistics moved, or `None`; and words,
        empty where there is nothing to say.
    """
    names = norm_layers(network)
    moved = [name for name in names if _moved(one, name)]
    if task.batchnorm == "eval":
        words = "BatchNorm's running statistics moved, as in train mode; batchnorm=train_shared fits better"
        return None, words if moved else ""
    if task.batchnorm == "train_hidden":
        words = "BatchNorm's running statistics moved, but are not used, as batchnorm=train_hidden says"
        return None, words if moved else ""
    if task.batchnorm is None:
        return None, ""
    without = "the batch statistics of BatchNorm are not used: "
    if not moved:
        return None, f"{without}running statistics came back as they were sent, or not at all"
    if one.parts:
        return None, f"{without}a mean over clients mixes those of all"
    if training.steps > 1:
        return None, f"{without}running statistics mix those of {training.steps} steps"
    counts = _values(network, task, training.images)
    found: Tensors = {}
    for name in moved:
        mean, variance = _solved(network, one, name, counts.get(name, 0))
        if mean is not None and variance is not None:
            found |= {f"{name}.mean": mean, f"{name}.var": variance}
    known = len(found) // 2
    if not known:
        return None, f"{without}running statistics moved otherwise than one step with the model's momentum moves them"
    count = f"{known} of {len(names)} layers" if known < len(names) else f"{known} layer{'s' * (known != 1)}"
    return found, f"batch statistics of {count} of BatchNorm worked out from the running ones"


def _moved(one: Recorded, name: str) -> bool:
    buffers = (f"{name}.running_mean", f"{name}.running_var")
    return all(buffer in one.moved for buffer in buffers) and any(bool(one.moved[b].any()) for b in buffers)


def _solved(network: nn.Module, one: Recorded, name: str, count: int) -> tuple[Tensor | None, Tensor | None]:
    layer = network.get_submodule(name)
    if not isinstance(layer, _BatchNorm) or count < 2:
        return None, None
    momentum = layer.momentum
    sent = one.weights.buffers
    if momentum is None:
        steps = sent.get(f"{name}.num_batches_tracked")
        momentum = 0.0 if steps is None else 1.0 / (int(steps) + 1)
    if momentum <= 0:
        return None, None

    def batch(leaf: str) -> Tensor:
        before = sent[f"{name}.{leaf}"].double()
        return before - one.moved[f"{name}.{leaf}"].double() / momentum

    running = sent[f"{name}.running_var"].double()
    variance = batch("running_var") * (count - 1) / count
    if bool((variance < -ROUNDING / momentum * running.abs().clamp(min=ROUNDING)).any()):
        return None, None
    dtype = next(iter(one.update.values())).dtype
    return batch("running_mean").to(dtype), variance.clamp(min=0.0).to(dtype)


def _values(network: nn.Module, task: Task, images: int) -> dict[str, int]:
    """How many values of a channel each BatchNorm layer sees of so many images; layers that run once only."""
    seen: dict[str, list[int]] = {name: [] for name in task.norms}

    def hook(name: str) -> object:
        return lambda module, args, output: seen[name].append(images * args[0][0, 0].numel())

    network.eval()
    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in seen]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            network(torch.zeros(2, *task.input_shape))
    finally:
        for handle in handles:
            handle.remove()
    return {name: counts[0] for name, counts in seen.items() if len(counts) == 1}
