"""How BatchNorm and dropout behave, as modules that lift: no flag, no state, no hidden random numbers.

A module's own train mode writes running statistics in place and draws masks from torch's global generator; neither
works under `torch.func`, and neither could be repeated by an attacker who simulates a client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from keyhole.errors import ModelError

BATCHNORM = ("eval", "train_shared", "train_hidden")
DROPOUT = ("off", "active")


def norm_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the BatchNorm layers."""
    return tuple(name for name, m in model.named_modules() if isinstance(m, _BatchNorm))


def drop_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the dropout layers."""
    return tuple(name for name, m in model.named_modules() if isinstance(m, _DropoutNd))


class BatchNormByBatch(nn.Module):
    """BatchNorm with the statistics of the batch at hand; keeps the parameters and buffers of the layer it replaces."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalised over the batch and all positions, (b, c, ...)."""
        return nn.functional.batch_norm(inputs, None, None, self.weight, self.bias, training=True, eps=self.eps)


class DropoutByMask(nn.Module):
    """Dropout whose mask is a buffer, so that whoever calls the model says which units are kept."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs times the mask, which is scaled to mean 1."""
        return inputs * self.mask.to(inputs.dtype)


class NoisyLayer(nn.Module):
    """A layer whose Gaussian noise is a buffer, so that whoever calls the model says what was drawn; 0 if nothing was.

    What a layer makes of it is its own matter; a task that has such a layer names it in `Task.noises`.
    """

    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.zeros(()), persistent=False)


def replace_layers(model: nn.Module, names: tuple[str, ...], make: Callable[[nn.Module], nn.Module]) -> None:
    """Put other layers in place of the named ones, under every name that a layer has in the model."""
    made = {id(layer): make(layer) for layer in (model.get_submodule(name) for name in names)}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if id(layer) in made:
            model.set_submodule(name, made[id(layer)])


def by_batch_statistics(layer: nn.Module) -> BatchNormByBatch:
    """The layer in train mode, as a pure function of its batch."""
    if not isinstance(layer, _BatchNorm):
        raise TypeError(f"{type(layer).__name__} is not a BatchNorm layer")
    return BatchNormByBatch(layer)


def by_mask(layer: nn.Module) -> DropoutByMask:
    """The layer in train mode, with its mask as an input."""
    if isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout):
        raise ModelError(f'{type(layer).__name__} cannot be active here; set model.dropout = "off", or use nn.Dropout.')
    if isinstance(layer, _DropoutNd) and layer.p >= 1:
        raise ModelError("a dropout layer has rate 1 and leaves nothing; give it a rate below 1.")
    return DropoutByMask()


def run_on_zeros(model: nn.Module, input_shape: tuple[int, ...]) -> Any:
    """What the model gives for two inputs of zeros: BatchNorm in train mode has no statistics of a single vector.

    Raises:
        ModelError: the model does not run.
    """
    like = next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            return model(torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device))
    except Exception as error:
        raise ModelError(f"the model does not accept inputs of shape {tuple(input_shape)}: {error}") from error


def one_mask_shape(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one example's mask for a dropout layer, by running the model once on zeros.

    Raises:
        ModelError: the layer runs more or less often than once, or the model does not run.
    """
    layer = model.get_submodule(name)
    shapes: list[tuple[int, ...]] = []
    handle = layer.register_forward_hook(lambda m, args, output: shapes.append(tuple(args[0].shape)))
    try:
        run_on_zeros(model, input_shape)
    finally:
        handle.remove()
    if len(shapes) != 1:
        raise ModelError(f"dropout layer '{name}' runs {len(shapes)} times in one pass; active dropout needs once.")
    if shapes[0][0] != 2:
        raise ModelError(
            f"dropout layer '{name}' sees {shapes[0][0]} rows of 2 images; active dropout needs one row an image."
        )
    shape = shapes[0][1:]
    # Channel-wise dropout keeps or drops a whole map.
    return shape if isinstance(layer, nn.Dropout) else (shape[0], *(1 for _ in shape[1:]))
