"""What is trained: an architecture without weights, its loss, and the space its inputs live in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.parameter import is_lazy

from keyhole.core.keys import bernoulli, fold_in, normal
from keyhole.core.modes import (
    BATCHNORM,
    DROPOUT,
    by_batch_statistics,
    by_mask,
    drop_layers,
    norm_layers,
    one_mask_shape,
    replace_layers,
    run_on_zeros,
)
from keyhole.core.types import Batch, GradFn, Key, LossFn, Tensors, Trace, Weights
from keyhole.errors import ConfigError, ModelError


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
    norms: tuple[str, ...] = ()
    """Names of the BatchNorm layers."""
    batchnorm: str | None = None
    """``eval``, ``train_shared`` or ``train_hidden``; `None` where the model has no BatchNorm."""
    drops: tuple[tuple[str, float, tuple[int, ...]], ...] = ()
    """Active dropout: name, rate and shape of one example's mask; empty where dropout is off."""
    noises: tuple[tuple[str, tuple[int, ...], bool], ...] = ()
    """Layers with Gaussian noise (`keyhole.core.modes.NoisyLayer`), which a defense's `on_task` may add: name, shape of
    one example's noise, and whether it is drawn after training too."""

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
            batchnorm: where the model has BatchNorm layers, ``"eval"`` (running statistics), or what most clients
                run: the batch's own statistics, which they upload (``"train_shared"``) or keep
                (``"train_hidden"``). What a deployment runs decides this, not the flag the module happens to carry.
            dropout: ``"off"`` or ``"active"`` where the model has dropout layers.

        Raises:
            ModelError: the model has BatchNorm or dropout and nothing says how they behave, has no linear layer that
                gives the logits, or does not accept inputs of this shape.
        """
        unmade = [name for name, tensor in model.state_dict().items() if is_lazy(tensor)]
        if unmade:
            raise ModelError(
                f"'{unmade[0]}' of the model has no shape yet; run a lazy model once on an input before it is given."
            )
        private = copy.deepcopy(model)
        norms, drops = norm_layers(private), drop_layers(private)
        if norms and batchnorm is None:
            raise ModelError(
                f"the model has BatchNorm layers ('{norms[0]}' and {len(norms) - 1} more) and nothing says how they "
                'behave; set model.batchnorm = "eval" (running statistics, an upper bound on leakage), "train_shared" '
                'or "train_hidden" (the batch\'s own statistics, which clients upload or keep).'
            )
        if drops and dropout is None:
            raise ModelError(
                f"the model has dropout ('{drops[0]}') and nothing says how it behaves; set model.dropout = \"off\" "
                'or "active".'
            )
        if batchnorm not in (None, *BATCHNORM):
            raise ModelError(f"model.batchnorm is {batchnorm!r}; accepted: {', '.join(BATCHNORM)}.")
        if dropout not in (None, *DROPOUT):
            raise ModelError(f"model.dropout is {dropout!r}; accepted: {', '.join(DROPOUT)}.")
        private.eval()
        for parameter in private.parameters():
            parameter.requires_grad_(True)
        if norms and batchnorm != "eval":
            replace_layers(private, norms, by_batch_statistics)
        for name in norms:
            if batchnorm == "eval" and getattr(private.get_submodule(name), "running_mean", None) is None:
                raise ModelError(
                    f"BatchNorm layer '{name}' keeps no running statistics, which eval mode needs; "
                    'set model.batchnorm = "train_shared" or "train_hidden".'
                )
        rates = {name: float(private.get_submodule(name).p) for name in drops} if dropout == "active" else {}  # type: ignore[arg-type]
        shapes = {name: one_mask_shape(private, name, input_shape) for name in rates}
        replace_layers(private, tuple(rates), by_mask)
        norm_params = frozenset(f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias"))
        head = _find_head(private, input_shape, num_classes)
        masks = tuple((name, rate, shapes[name]) for name, rate in rates.items() if rate > 0)
        task = cls(
            private, loss, tuple(input_shape), num_classes, bounds, head, norm_params, norms,
            batchnorm if norms else None, masks,
        )  # fmt: skip
        unused = _unused_parameters(task)
        if unused:
            raise ModelError(f"parameter '{unused[0]}' does not influence the logits; remove it from the model.")
        return task

    @property
    def draws(self) -> tuple[str, ...]:
        """Names of the layers that draw something in each forward pass."""
        return tuple(name for name, *_ in (*self.drops, *self.noises))

    def masks(self, key: Key, batch_size: int) -> Tensors:
        """One draw of what the layers draw for a batch, (b, ...) by buffer name; empty where nothing is drawn.

        Dropout masks are scaled to mean 1; noise is standard normal.
        """
        noise = {
            f"{name}.noise": normal(fold_in(fold_in(key, "noise"), name), (batch_size, *shape))
            for name, shape, _ in self.noises
        }
        return noise | {
            f"{name}.mask": bernoulli(fold_in(fold_in(key, "dropout"), name), 1.0 - rate, (batch_size, *shape)).float()
            / (1.0 - rate)
            for name, rate, shape in self.drops
        }

    def trace(self, weights: Weights, inputs: Tensor, masks: Tensors | None = None) -> Trace:
        """Run the model on inputs (b, *shape) and keep what happens inside.

        Args:
            weights: parameters and buffers to run with.
            inputs: a batch in the model's input space.
            masks: a draw of `masks`; without it active dropout keeps everything, and noise is 0.
        """
        activations: Tensors = {}
        statistics: Tensors = {}
        features: list[Tensor] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if name == self.head:
                    features.append(args[0])
                if name in self.norms:
                    over = [0, *range(2, args[0].dim())]
                    statistics[f"{name}.mean"] = args[0].mean(over)
                    statistics[f"{name}.var"] = args[0].var(over, correction=0)
                activations[name] = output

            return hook

        leaves = [(name, m) for name, m in self.model.named_modules() if not any(True for _ in m.children())]
        handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
        try:
            logits = self.logits(weights, inputs, masks)
        finally:
            for handle in handles:
                handle.remove()
        return Trace(logits, features[-1], activations, statistics)

    def logits(self, weights: Weights, inputs: Tensor, masks: Tensors | None = None) -> Tensor:
        """Logits (b, k) of inputs (b, *shape), without keeping the inside; see `trace`."""
        state = {**weights.params, **weights.buffers, **(masks or {})}
        logits: Tensor = functional_call(self.model, state, (inputs,))
        return logits

    def to(self, device: torch.device | str) -> Task:
        """The same task on a device."""
        return replace(self, model=copy.deepcopy(self.model).to(device), bounds=self.bounds.to(device))


def weights_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Weights:
    """A copy of a module's parameters and buffers, floating point in ``dtype``."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return Weights(
        {name: own(p) for name, p in model.named_parameters()},
        {name: own(b) for name, b in model.named_buffers()},
    )


def fit_weights(task: Task, weights: Weights) -> Weights:
    """Weights for a task whose model a defense may have changed: what both have, and the rest as the task has it.

    Args:
        task: as a defense's `on_task` returns it; what it adds carries its initial values.
        weights: of the model before. They are returned as they are where nothing was added or dropped.
    """
    like = next(iter(weights.params.values()))

    def fitted(needed: dict[str, Tensor], given: Tensors) -> Tensors:
        known = {name for name, value in needed.items() if name in given and given[name].shape == value.shape}
        return {
            name: given[name]
            if name in known
            else value.detach().clone().to(like.device, like.dtype if value.is_floating_point() else value.dtype)
            for name, value in needed.items()
        }

    stored = task.model.state_dict().keys()
    buffers = {n: b for n, b in task.model.named_buffers() if n in stored or n in weights.buffers}
    fit = Weights(fitted(dict(task.model.named_parameters()), weights.params), fitted(buffers, weights.buffers))
    unchanged = all(a.keys() == b.keys() and all(a[n] is b[n] for n in a) for a, b in zip(fit, weights, strict=True))
    return weights if unchanged else fit


def plain_gradient(task: Task, masks: Tensors | None = None) -> GradFn:
    """How an undefended client turns a batch into a gradient: that of the share-weighted mean loss.

    Args:
        task: what is trained.
        masks: dropout masks and noise that are known; otherwise fresh ones are drawn from the gradient's key.
    """

    def gradient(weights: Weights, batch: Batch, key: Key) -> Tensors:
        own = task.masks(key, batch.inputs.shape[0]) if masks is None else masks

        def objective(params: Tensors) -> Tensor:
            logits = task.logits(Weights(params, weights.buffers), batch.inputs, own)
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
    try:
        logits = run_on_zeros(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model gives {got} for two inputs; logits of shape (2, {num_classes}) are needed.")
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
    inputs = torch.zeros(2, *task.input_shape, dtype=next(iter(params.values())).dtype)
    total = task.logits(Weights(params, weights.buffers), inputs).sum()
    if not total.requires_grad:
        raise ModelError("the model's output has no gradient; its forward pass must not run under torch.no_grad().")
    grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    return [name for name, g in zip(params, grads, strict=True) if g is None]
