"""A local loop for defenses that act on images, loss or gradients, which a mod cannot see."""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord
from flwr.app import Context as FlowerContext
from torch import Tensor, nn

from keyhole.core.defense import Context, Defense, defended_gradient
from keyhole.core.keys import fold_in
from keyhole.core.rule import LocalSGD
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.types import Batch, Weights
from keyhole.errors import ConfigError, DataError, ModelError, check_range
from keyhole.fl.convert import check_images, keep_state, kept_state
from keyhole.fl.mods import check_defense, client_number, round_key, tell_of_server
from keyhole.solve.files import digest

_IMAGES = "keyhole.images"


def defended_training(
    model: nn.Module,
    defense: Defense,
    inputs: Tensor,
    labels: Tensor,
    context: FlowerContext,
    *,
    lr: float,
    epochs: int = 1,
    batch_size: int = 32,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batchnorm: str | None = None,
    dropout: str | None = None,
    public: Batch | None = None,
    round: int | None = None,
    seed: int | None = None,
) -> None:
    """Train a model in place for one round under a defense, with all of its hooks: ``w <- w - defense(w - w_T)``.

    Plain SGD in a fresh random order each epoch, as `keyhole.core.rule.LocalSGD`; the last batch may be smaller. What
    the defense keeps between rounds is kept in ``context.state``. Do not add a `DefenseMod` of the same defense.

    Frozen parameters (``requires_grad=False``) stay as received, to the last bit. To the defense they are no part of
    the update: it neither noises them nor counts them in a norm or in a share of entries to keep.

    Where this raises, the model and what the defense keeps are as they were.

    Args:
        model: as received from the server; ends linear, gives logits.
        defense: any that leaves the model's parameters as they are.
        inputs: all images of the round as the model reads them, (n, *shape), at least one.
        labels: their classes as whole numbers, (n,).
        context: the client's.
        lr: learning rate, above 0.
        epochs: passes over the images, at least 1.
        batch_size: images in a step, at least 1.
        mean: of the pixels in [0, 1], subtracted before the model reads them; a number for each channel, by default 0.
        std: by which they are then divided, by default 1.
        batchnorm: as in `Task.of`; running statistics stay as received.
        dropout: as in `Task.of`.
        public: public images, for defenses that need some.
        round: the server's number of the round, from 1, as the message's ``server-round`` says it: for defenses with a
            schedule. By default the rounds that this client took part in are counted.
        seed: for simulations only; by default the operating system gives 64 bits of randomness.

    Raises:
        ConfigError: the defense is none, adds or drops parameters of the model, so that server and clients would
            differ, or acts on a frozen one; all are frozen; images and labels do not fit; or the round is below 1.
        DataError: there are no images, some are not finite, or labels are not the model's classes.
        ModelError: see `Task.of`; or training diverged, so that the update is not finite.
    """
    check_range("round", 1 if round is None else round, 1)
    check_defense(defense)
    check_images(inputs, labels)
    if not len(inputs):
        raise DataError("there are no images to train on.")
    if not torch.isfinite(inputs).all():
        raise DataError("the images hold NaN or infinity.")
    if labels.is_floating_point():
        raise ConfigError(f"labels are {labels.dtype}; whole numbers are needed.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("all parameters of the model are frozen (requires_grad=False); there is nothing to train.")
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shape = tuple(inputs.shape[1:])
    bounds = Bounds.of(mean or (0.0,) * shape[0], std or (1.0,) * shape[0], inputs.dtype)
    classes = heads[-1].out_features if heads else 0
    plain = Task.of(model, shape, classes, bounds, batchnorm=batchnorm, dropout=dropout)
    task = defense.on_task(plain)
    if set(dict(task.model.named_parameters())) != set(dict(plain.model.named_parameters())):
        raise ConfigError(f"{type(defense).__name__} changes the model's parameters; the server has to have them too.")
    tell_of_server(defense)
    state, rounds = kept_state(context)
    client = client_number(context)
    number = rounds + 1 if round is None else round
    key = round_key(seed, client, number)
    # In their order, as what a defense made of the images last time is kept in that order.
    images = digest({"inputs": inputs, "labels": labels})
    before = context.state.config_records.get(_IMAGES, {"digest": ""})["digest"]
    whole = weights_of(model, inputs.dtype)
    # A gradient is only taken by parameters; what is frozen is run with all the same.
    frozen = {name: value for name, value in whole.params.items() if name not in trained}
    weights = Weights({name: whole.params[name] for name in trained}, {**whole.buffers, **frozen})
    ctx = Context(
        task,
        weights,
        fold_in(key, "defense"),
        round=number - 1,
        again=before == images,
        training=True,
        client=client,
        public=public,
        state=state,
        recorded=False,
    )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels go from {low} to {high}; the model has classes 0 to {classes - 1}.")
    targets = nn.functional.one_hot(labels.long(), classes).to(inputs.dtype)
    batch = defense.on_batch(Batch(inputs, targets, torch.full_like(targets[:, 0], 1.0 / len(inputs))), ctx)
    rule = LocalSGD(epochs, lr, batch_size, "shuffled")
    try:
        upload = rule(defended_gradient(task, defense, ctx), weights, batch, fold_in(key, "client"))
    except KeyError as error:
        if error.args[0] in frozen:
            raise ConfigError(f"{type(defense).__name__} acts on '{error.args[0]}', which is frozen.") from error
        raise
    update = defense.on_update(upload.update, ctx)
    for name in trained:
        if not torch.isfinite(update[name]).all():
            raise ModelError(f"training diverged: the update of '{name}' is not finite; lower the learning rate.")
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in trained:
            parameters[name].sub_(update[name].to(parameters[name].dtype))
    keep_state(context, ctx.state, rounds + 1)
    context.state[_IMAGES] = ConfigRecord({"digest": images})
