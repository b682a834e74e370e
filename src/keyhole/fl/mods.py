"""A defense as a client mod: one line in ``ClientApp(mods=[...])``."""

from __future__ import annotations

import copy
import logging
import secrets

import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.app import Context as FlowerContext
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from torch import nn

from keyhole.core.defense import Chain, Context, Defense
from keyhole.core.keys import fold_in, new_key
from keyhole.core.modes import norm_layers
from keyhole.core.task import Bounds, Task, cross_entropy
from keyhole.core.types import Key, Tensors, Weights
from keyhole.defenses.user_dp import UserDP
from keyhole.errors import ConfigError, KeyholeError, Refused
from keyhole.fl.convert import keep_state, kept_state, model_record, parameter_names, to_record, to_tensors

_LOG = logging.getLogger("keyhole.fl")


class DefenseMod:
    """A defense that acts on what leaves the client, between the app's training and the network.

    With the weights w that arrived and those v that the app returns, the reply carries ``w - defense(w - v)``. The
    defense acts on the floating-point parameters that are trained. Buffers (such as BatchNorm's running statistics),
    config records and metrics leave as the app made them: they are not protected, and BatchNorm's statistics do tell of
    the images. Frozen parameters (``requires_grad=False`` in ``model``) must come back as they arrived, and stay so;
    they are no part of the update.

    **It fails closed.** Where the defense cannot be applied the reply is an error, never the bare update. Arrays in a
    record beside the model's, or in the answer to another message than a training one, are an error too, unless
    ``allow`` names the record. An app may return some of the model's arrays and keep the others, as in federated
    personalisation.

    What a defense keeps between rounds is kept in Flower's ``Context.state``, which never leaves the client.

    Args:
        defense: one that acts on the update alone; a defense of images, loss or gradients must be in the training loop.
        model: the module that is trained, for the names of its parameters and BatchNorm layers; a `Task` where the
            defense asks for more of it. It is copied.
        allow: keys of further array records that leave as the app made them, such as ``("variates",)``: no defense acts
            on them, and what is in them is not looked at. A log line says so.
        seed: for simulations only. By default 64 bits from the operating system make a fresh key in each round; whoever
            knows a seed, such as the server, can draw the same noise and take it off. A log line says so in each round.

    Raises:
        ConfigError: the defense is none, or does not act on the update alone; or the model has nothing to train.

    Example::

        app = ClientApp(mods=[DefenseMod(GaussianNoise(std=0.01), model=Net())])
    """

    def __init__(
        self, defense: Defense, model: nn.Module | Task, *, allow: tuple[str, ...] = (), seed: int | None = None
    ) -> None:
        check_defense(defense)
        other = _other_hook(defense)
        if other is not None:
            name = type(defense).__name__
            raise ConfigError(
                f"{name} acts in {other}, which a mod cannot do: it only sees the trained weights; train with "
                "keyhole.fl.defended_training instead."
            )
        self.defense, self.seed = defense, seed
        self.task = model if isinstance(model, Task) else _task_of(model)
        trained = {name: p.requires_grad for name, p in self.task.model.named_parameters()}
        named = parameter_names(self.task.model)
        self.names, self.frozen = (frozenset(n for n in named if trained[n] is kind) for kind in (True, False))
        if not self.names:
            raise ConfigError(
                "the model has no floating-point parameters that are trained; there is nothing to defend."
            )
        if isinstance(allow, str):
            raise ConfigError(f"allow is '{allow}'; the keys of records are needed, as in allow=('{allow}',).")
        self.allow = frozenset(allow)
        if self.allow:
            _LOG.warning("Array records that leave as they are, undefended: %s.", ", ".join(sorted(self.allow)))
        tell_of_server(defense)

    def __call__(self, message: Message, context: FlowerContext, call_next: ClientAppCallable) -> Message:
        """Run the app, and defend what it returns."""
        try:
            training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
            # Before the app runs, as it may write into the message.
            received = to_tensors(self._record(message.content, "the message")[1]) if training else {}
            number = _round(message)
        except Exception as error:
            return _refusal(message, error)
        # An app that raises sends nothing; Flower answers for it.
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            if training:
                self._defend(received, reply, context, number)
            elif set(reply.content.array_records) - self.allow:
                raise Refused("the reply has arrays, but does not answer a training message; no defense acts on them.")
        except Exception as error:
            return _refusal(message, error)
        return reply

    def _defend(self, received: Tensors, reply: Message, context: FlowerContext, number: int | None) -> None:
        """Replace the parameters in a reply; it is changed only once everything has worked."""
        place, record = self._record(reply.content, "the reply")
        for extra in sorted(set(reply.content.array_records) - self.allow - {place}):
            raise Refused(
                f"the reply has the array record '{extra}' beside the model's, and no defense acts on it; "
                f"DefenseMod(..., allow=('{extra}',)) lets it leave as it is."
            )
        returned = to_tensors(record)
        _check(received, returned, set(self.task.model.state_dict()), self.frozen)
        sent = [name for name in returned if name in self.names]
        state, rounds = kept_state(context)
        number = rounds + 1 if number is None else number
        client = client_number(context)
        ctx = Context(
            self.task,
            Weights(*({n: t for n, t in received.items() if (n in self.names) is kind} for kind in (True, False))),
            round_key(self.seed, client, number),
            round=number,
            client=client,
            state=state,
            recorded=False,
        )
        update = {name: received[name] - returned[name] for name in sent}
        defended = self.defense.on_update(dict(update), ctx)
        if set(defended) != set(update):
            raise Refused("the defense returned other parameters than it was given.")
        for name, value in defended.items():
            if value.shape != update[name].shape or not torch.isfinite(value).all():
                raise Refused(f"the defense returned something of another shape, or not finite, for '{name}'.")
        leaving = {name: (received[name] - defended[name]).to(returned[name].dtype) for name in sent}
        defended_record = to_record(leaving, record)
        keep_state(context, ctx.state, rounds + 1)
        reply.content[place] = defended_record

    def _record(self, content: RecordDict, whose: str) -> tuple[str, ArrayRecord]:
        return model_record(content, self.names, whose, self.allow)


def client_number(context: FlowerContext) -> int:
    """Which client this is: a simulation's partition, which is the same in each run, or else the node."""
    return int(context.node_config.get("partition-id", context.node_id))


def round_key(seed: int | None, client: int, number: int) -> Key:
    """The randomness of one client in one round: from the operating system, or what follows from a seed."""
    if seed is None:
        return fresh_key()
    _LOG.warning("A fixed seed: the server can draw the same randomness and undo the defense. Simulation only.")
    return fold_in(fold_in(new_key(seed), f"client {client}"), f"round {number}")


def fresh_key() -> Key:
    """64 bits from the operating system."""
    return torch.tensor([secrets.randbits(32), secrets.randbits(32)], dtype=torch.int64)


def check_defense(defense: object) -> None:
    """Raise `ConfigError` unless it is a defense; its name or its class are none."""
    if not isinstance(defense, Defense):
        kind = f"the class {defense.__name__}" if isinstance(defense, type) else f"a {type(defense).__name__}"
        raise ConfigError(f"defense is {kind}; a defense is needed, such as GaussianNoise(std=0.01).")


def tell_of_server(defense: Defense) -> None:
    """Say in the log what a defense leaves to the server."""
    links = defense.links if isinstance(defense, Chain) else (defense,)
    if any(isinstance(link, UserDP) for link in links):
        _LOG.warning("UserDP only clips here; the noise is the server's: it must use keyhole.fl.ServerNoise.")


def _other_hook(defense: Defense) -> str | None:
    """The first hook that a mod cannot serve and that the defense has."""
    if isinstance(defense, Chain):
        return next(filter(None, map(_other_hook, defense.links)), None)
    hooks = ("on_batch", "on_task", "on_loss", "on_gradient")
    return next((hook for hook in hooks if getattr(type(defense), hook) is not getattr(Defense, hook)), None)


def _task_of(model: nn.Module) -> Task:
    """As much of a task as a defense of updates reads: the model and the names of its BatchNorm parameters."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; the torch.nn.Module that clients train is needed.")
    norms = norm_layers(model)
    scales = frozenset(f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias"))
    return Task(copy.deepcopy(model), cross_entropy, (), 0, Bounds.of((0.0,), (1.0,)), "", scales, norms)


def _check(received: Tensors, returned: Tensors, known: set[str], frozen: frozenset[str]) -> None:
    for unknown in sorted(set(returned) - known):
        # It could be a parameter of the app's real model, and would leave as it is.
        raise Refused(f"the reply has '{unknown}', which the model given to the mod has not.")
    for unknown in sorted(set(returned) - set(received)):
        raise Refused(f"the reply has '{unknown}', which was not among the arrays received.")
    for name, value in returned.items():
        if value.shape != received[name].shape:
            shapes = f"{tuple(value.shape)}, received with {tuple(received[name].shape)}"
            raise Refused(f"the reply has '{name}' with shape {shapes}.")
        if not torch.isfinite(value).all():
            raise Refused(f"the reply has '{name}' with values that are not finite.")
        if name in frozen and (value != received[name]).any():
            raise Refused(f"the reply changes '{name}', which is frozen (requires_grad=False) in the mod's model.")


def _round(message: Message) -> int | None:
    """The server's number of the round, where a config record says it as Flower's strategies do."""
    found = [record["server-round"] for record in message.content.config_records.values() if "server-round" in record]
    return int(str(found[0])) if found else None


def _refusal(message: Message, error: Exception) -> Message:
    """An error in place of the reply. What others raised may quote values, so that only its kind is told."""
    _LOG.error("The update was withheld.", exc_info=error)
    reason = str(error) if isinstance(error, KeyholeError) else f"the defense failed ({type(error).__name__})."
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"Keyhole withheld the update: {reason}"), reply_to=message)
