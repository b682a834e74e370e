"""What is trained: an architecture without weights, its loss, and the space its inputs live in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from keyhole.core.types import Batch, GradFn, Key, LossFn, Tensors, Trace, Weights
from keyhole.errors import ConfigError, ModelError

Edit = Callable[[str, Tensor], Tensor]
"""Rewrites the output of a named module during a trace."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """The map between a model's input space and pixels in [0, 1]: ``inputs = (pixels - mean) / std`` per channel.

    Mean 0 and standard deviation 1 mean that the model reads pixels as they are.
    """

    mean: Tensor
    """Shape (c, 1, 1)."""
    std: Tensor
    """Shape (c, 1, 1), positive."""

    @classmethod
    def of(cls, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Bounds:
        """Bounds from one number a channel."""
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ConfigError("mean and std need one number for each channel, and every std must be above 0.")
        as_column = (len(mean), 1, 1)
        return cls(
            torch.tensor(mean, dtype=dtype).reshape(as_column), torch.tensor(std, dtype=dtype).reshape(as_column)
        )

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Model inputs (..., c, h, w) as pixels, clamped to [0, 1]."""
        return (inputs * self.std + self.mean).clamp(0.0, 1.0)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (..., c, h, w) as model inputs."""
        return (pixels - self.mean) / self.std

    def clamp(self, inputs: Tensor) -> Tensor:
        """Model inputs projected on the box that pixels in [0, 1] fill."""
        return torch.minimum(torch.maximum(inputs, (0.0 - self.mean) / self.std), (1.0 - self.mean) / self.std)

    def to(self, device: torch.device | str) -> Bounds:
        """The same bounds on a device."""
        return Bounds(self.mean.to(device), self.std.to(device))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets: logits (b, k) and probabilities (b, k) to a loss per example (b,)."""
    return -(targets * torch.log_softmax(logits, dim=-1)).sum(dim=-1)


@dataclass(frozen=True, eq=False)
class Task:
    """An architecture, its loss and its input space; build one with `Task.of`.

    ``model`` is a private copy that is only ever called functionally: its own parameters are placeholders, and neither
    its weights nor its mode change.
    """

    model: nn.Module
    loss: LossFn
    input_shape: tuple[int, ...]
    num_classes: int
    bounds: Bounds
    head: str
    """Name of the last linear layer, whose gradient reveals labels. Found by running the model, not by position."""
    norm_params: frozenset[str]
    """Names of the scale and shift parameters that belong to BatchNorm layers."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_shape: tuple[int, ...],
        num_classes: int,
        bounds: Bounds,
        *,
        loss: LossFn = cross_entropy,
        batchnorm: str | None = None,
        dropout: str | None = None,
    ) -> Task:
        """Check a model and make a task of it.

        Args:
            model: any module from inputs (b, *input_shape) to logits (b, num_classes). Copied, never changed.
            input_shape: shape of one input, usually (c, h, w).
            num_classes: number of classes k, at least 2.
            bounds: the map between inputs and pixels.
            loss: per-example loss of logits and soft targets.
            batchnorm: ``"eval"`` (running statistics) where the model has BatchNorm layers. What a deployment
                runs decides this, not the flag the module happens to carry.
            dropout: ``"off"`` where the model has dropout layers.

        Raises:
            ModelError: the model has BatchNorm or dropout and nothing says how they behave, has no linear layer that
                gives the logits, or does not accept inputs of this shape.
        """
        private = copy.deepcopy(model)
        norms = [name for name, m in private.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        drops = [name for name, m in private.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        if norms and batchnorm is None:
            raise ModelError(
                f"the model has BatchNorm layers ('{norms[0]}' and {len(norms) - 1} more) and nothing says how they "
                'behave; set model.batchnorm = "eval" (running statistics, an upper bound on leakage).'
            )
        if drops and dropout is None:
            raise ModelError(
                f"the model has dropout ('{drops[0]}') and nothing says how it behaves; set model.dropout = \"off\"."
            )
        if batchnorm not in (None, "eval"):
            raise ModelError(f'model.batchnorm is {batchnorm!r}; accepted: "eval".')
        if dropout not in (None, "off"):
            raise ModelError(f'model.dropout is {dropout!r}; accepted: "off".')
        for name in norms:
            if getattr(private.get_submodule(name), "running_mean", None) is None:
                raise ModelError(f"BatchNorm layer '{name}' keeps no running statistics: it cannot run in eval mode.")
        private.eval()
        for parameter in private.parameters():
            parameter.requires_grad_(True)
        norm_params = frozenset(f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias"))
        head = _find_head(private, input_shape, num_classes)
        task = cls(private, loss, tuple(input_shape), num_classes, bounds, head, norm_params)
        unused = _unused_parameters(task)
        if unused:
            raise ModelError(f"parameter '{unused[0]}' does not influence the logits; remove it from the model.")
        return task

    def trace(self, weights: Weights, inputs: Tensor, edit: Edit | None = None) -> Trace:
        """Run the model on inputs (b, *shape) and keep what happens inside.

        Args:
            weights: parameters and buffers to run with.
            inputs: a batch in the model's input space.
            edit: may replace the output of any named module without children, as it happens.
        """
        activations: Tensors = {}
        features: list[Tensor] = []

        def watch(name: str) -> Callable[..., Tensor | None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                if name == self.head:
                    features.append(args[0])
                if edit is not None:
                    output = edit(name, output)
                activations[name] = output
                return output if edit is not None else None

            return hook

        leaves = [(name, m) for name, m in self.model.named_modules() if not any(True for _ in m.children())]
        handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
        try:
            logits = functional_call(self.model, (weights.params, weights.buffers), (inputs,))
        finally:
            for handle in handles:
                handle.remove()
        return Trace(logits, features[-1], activations)

    def logits(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Logits (b, k) of inputs (b, *shape), without keeping the inside."""
        return functional_call(self.model, (weights.params, weights.buffers), (inputs,))

    def to(self, device: torch.device | str) -> Task:
        """The same task on a device."""
        return Task(
            copy.deepcopy(self.model).to(device),
            self.loss,
            self.input_shape,
            self.num_classes,
            self.bounds.to(device),
            self.head,
            self.norm_params,
        )


def weights_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Weights:
    """A copy of a module's parameters and buffers, floating point in ``dtype``."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return Weights(
        {name: own(p) for name, p in model.named_parameters()},
        {name: own(b) for name, b in model.named_buffers()},
    )


def plain_gradient(task: Task) -> GradFn:
    """How an undefended client turns a batch into a gradient: that of the share-weighted mean loss."""

    def gradient(weights: Weights, batch: Batch, key: Key) -> Tensors:
        def objective(params: Tensors) -> Tensor:
            logits = task.logits(Weights(params, weights.buffers), batch.inputs)
            return (batch.share * task.loss(logits, batch.targets)).sum()

        return grad(objective)(weights.params)

    return gradient


def _find_head(model: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> str:
    """Name of the linear layer that runs last, by running the model once on zeros."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    first = next(model.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, *input_shape, dtype=dtype))
    except Exception as error:
        raise ModelError(f"the model does not accept inputs of shape {tuple(input_shape)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (1, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model gives {got} for one input; logits of shape (1, {num_classes}) are needed.")
    if not ran:
        raise ModelError("the model has no linear layer; Keyhole reads labels off the last one.")
    head = model.get_submodule(ran[-1])
    if isinstance(head, nn.Linear) and head.out_features != num_classes:
        raise ModelError(
            f"the last linear layer '{ran[-1]}' has {head.out_features} outputs; {num_classes} classes are needed."
        )
    return ran[-1]


def _unused_parameters(task: Task) -> list[str]:
    weights = weights_of(task.model, next(task.model.parameters()).dtype)
    params = {name: p.requires_grad_(True) for name, p in weights.params.items()}
    inputs = torch.zeros(1, *task.input_shape, dtype=next(iter(params.values())).dtype)
    total = task.logits(Weights(params, weights.buffers), inputs).sum()
    if not total.requires_grad:
        raise ModelError("the model's output has no gradient; its forward pass must not run under torch.no_grad().")
    grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    return [name for name, g in zip(params, grads, strict=True) if g is None]
