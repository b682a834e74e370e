"""A Flower app under mods, without a network: messages go in, known updates come back, and replies are looked at."""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from numpy.typing import NDArray
from torch import Tensor, nn

from keyhole.errors import ConfigError, cause
from keyhole.fl.convert import parameter_names

Flat: TypeAlias = NDArray[np.float64]
Arrays: TypeAlias = dict[str, NDArray[Any]]
Answer: TypeAlias = Callable[[Message], Message]
"""What the app makes of a message."""

METRICS, NOTES = {"num-examples": 8, "loss": 0.5}, {"device": "cpu"}
"""What a reply has besides arrays."""


class Withheld(Exception):
    """The update did not come out; in words, what did."""


class Bench:
    """An app under mods that answers as it is told.

    Args:
        mods: in Flower's order, the first one outermost.
        model: a module or its state dict; of the latter all floating-point arrays count as parameters.
        config: of each message.
        run_config: of each Context.

    Raises:
        ConfigError: there are no parameters, or Flower cannot send them or the config.
    """

    def __init__(
        self,
        mods: list[Mod],
        model: nn.Module | Mapping[str, Tensor],
        config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        if isinstance(model, nn.Module):
            state, names = model.state_dict(), set(parameter_names(model))
        elif isinstance(model, Mapping) and all(isinstance(value, Tensor) for value in model.values()):
            state, names = dict(model), {name for name, value in model.items() if value.is_floating_point()}
        else:
            raise ConfigError(f"model is a {type(model).__name__}; a torch.nn.Module or its state dict is needed.")
        state = {name: value.detach().cpu() for name, value in state.items() if value.numel()}
        names &= set(state)
        if not names:
            raise ConfigError("the model has no floating-point parameters.")
        for name, value in state.items():
            if value.dtype == torch.bfloat16:
                raise ConfigError(f"'{name}' is of type bfloat16, which Flower cannot send.")
        self.state: Arrays = {name: value.numpy().copy() for name, value in state.items()}
        self.parts: dict[str, slice] = {}
        self.size = 0
        for name in (name for name in self.state if name in names):
            self.parts[name] = slice(self.size, self.size + self.state[name].size)
            self.size += self.state[name].size
        self.buffers = tuple(name for name in self.state if name not in names)
        try:
            ConfigRecord(dict(config))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config cannot be sent ({cause(error)}).") from error
        self.config, self.run_config = dict(config), dict(run_config)
        self.answer: Answer = plain(self.state)
        self.app = ClientApp(mods=mods)
        for register in (self.app.train, self.app.evaluate):
            register()(lambda message, context: self.answer(message))

    def direction(self, rng: np.random.Generator) -> Flat:
        """A random vector of norm 1 whose tensors differ in scale, so that what is done to each by itself shows."""
        drawn = rng.standard_normal(self.size)
        for number, at in enumerate(self.parts.values()):
            drawn[at] *= (1.0, 4.0, 0.5)[number % 3]
        return drawn / np.linalg.norm(drawn)

    def trained(self, update: Flat, weights: Arrays | None = None) -> Arrays:
        """Weights plus an update, in their own type."""
        base = self.state if weights is None else weights
        moved = {
            name: base[name].astype(np.float64) + update[at].reshape(base[name].shape)
            for name, at in self.parts.items()
        }
        return base | {name: np.asarray(value).astype(base[name].dtype) for name, value in moved.items()}

    def flat(self, arrays: Mapping[str, NDArray[Any]]) -> Flat:
        """Parameters in one vector."""
        return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in self.parts])

    def entries(self, names: Iterable[str]) -> NDArray[Any]:
        """Where some parameters are in that vector."""
        return np.concatenate([np.arange(self.size)[self.parts[name]] for name in names])

    def rounding(self, update: Flat, weights: Arrays | None = None) -> Flat:
        """What arithmetic in the arrays' own type may get wrong in each entry."""
        base = self.state if weights is None else weights
        eps = np.concatenate([np.full(base[name].size, np.finfo(base[name].dtype).eps) for name in self.parts])
        return 8 * eps * (np.abs(self.flat(base)) + np.abs(update))

    def ask(
        self,
        answer: Answer,
        weights: Arrays | None = None,
        *,
        client: int = 1,
        turn: int = 1,
        draws: int = 0,
        kind: str = MessageType.TRAIN,
        state: RecordDict | None = None,
    ) -> Message:
        """One message through the mods.

        Args:
            answer: what the app does.
            weights: what the server sends, by default the model's.
            client: the node, and the partition.
            turn: the server's round.
            draws: the seed of all global generators.
            kind: type of the message.
            state: of the Context, by default empty.

        Raises:
            Withheld: the mods raise; Flower then answers with an error of its own.
        """
        config = ConfigRecord({"server-round": turn, "lr": 0.1, **self.config})
        content = RecordDict({"arrays": record(self.state if weights is None else weights), "config": config})
        # A message by node and type alone takes the rest from Flower's own process, which is not there.
        about = Metadata(1, f"{client}-{turn}", 0, client, "", str(turn), time.time(), 3600.0, kind)
        message = Message(content, metadata=about)  # type: ignore[call-overload]
        own: dict[str, Any] = {"partition-id": client, "num-partitions": 2**31}
        context = Context(1, client, own, RecordDict() if state is None else state, self.run_config)
        self.answer = answer
        seed(draws)
        try:
            reply: Any = self.app(message, context)
        except Exception as error:
            raise Withheld(f"nothing, as it raises {cause(error)}") from error
        if not isinstance(reply, Message):
            raise Withheld(f"a {type(reply).__name__} in place of a message")
        return reply

    def arrays(self, reply: Message) -> Arrays:
        """What a reply has of the model.

        Raises:
            Withheld: it has not all of its parameters, in their shapes.
        """
        if reply.has_error():
            raise Withheld(f"an error ({str(reply.error.reason).strip().rstrip('.')})")
        found = {name: array.numpy() for one in reply.content.array_records.values() for name, array in one.items()}
        if not found:
            raise Withheld("a reply without arrays")
        if any(name not in found or found[name].shape != self.state[name].shape for name in self.parts):
            raise Withheld("arrays of other names or shapes")
        return found

    def updates(
        self,
        answer: Answer,
        count: int,
        weights: Arrays | None = None,
        *,
        client: int = 0,
        turn: int = 0,
        draws: int = 0,
        states: list[RecordDict] | None = None,
    ) -> Flat:
        """What leaves, (count, n), after messages that count up clients, rounds and seeds from these numbers."""
        base, out = self.flat(self.state if weights is None else weights), np.empty((count, self.size))
        for i in range(count):
            state = states[i] if states else None
            reply = self.ask(answer, weights, client=client + i, turn=turn + i, draws=draws + i, state=state)
            out[i] = self.flat(self.arrays(reply)) - base
        return out


def plain(arrays: Arrays) -> Answer:
    """An app's reply as it should be: arrays, metrics and some config."""

    def answer(message: Message) -> Message:
        records: dict[str, Any] = {"metrics": MetricRecord(dict(METRICS)), "notes": ConfigRecord(dict(NOTES))}
        return Message(RecordDict({"arrays": record(arrays), **records}), reply_to=message)

    return answer


def record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Arrays of its own for each message: mods may write into them."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def seed(number: int) -> None:
    """Seed the global generators that a mod may draw from."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


@contextmanager
def apart() -> Iterator[None]:
    """Thousands of messages without a trace: no logs, no warnings, and global generators are put back."""
    loggers = [logging.getLogger(name) for name in ("flwr", "keyhole.fl")]
    levels = [logger.level for logger in loggers]
    python, numpy = random.getstate(), np.random.get_state()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Arithmetic on NaN warns, which a test-suite may turn into errors.
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
