"""What an honest-but-curious server knows of a run, written down while it goes on."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

import keyhole
from keyhole.core.types import Tensors
from keyhole.errors import ConfigError, Refused, StoreError, cause
from keyhole.experiment.transcript import (
    KIND,
    ROUND,
    TRANSCRIPT,
    VERSION,
    as_json,
    client_file,
    round_folder,
)
from keyhole.fl.convert import check_images, to_tensors
from keyhole.solve.files import make_folder, tensors_as_bytes, write_whole

_LOG = logging.getLogger("keyhole.fl")

MAX_BYTES = 2**30
"""Most bytes of a transcript where nothing else is said: 1 GiB."""


class Recorder(Strategy):
    """A strategy that does what another one does, and writes down what its server sees.

    Per round and client: the global weights as sent, how far the client moved (sent minus returned, of all
    floating-point arrays), config, metrics and number of examples. Replies are handed on as they came, so that the
    aggregate is the same to the last bit. A round is written whole or not at all. When the disk is full or the limit
    reached, recording stops and training goes on; the log and ``transcript.json`` say so.

    **A transcript is as sensitive as the data behind it.** Its folders and files are for their owner alone.

    Args:
        strategy: any strategy of Flower's Message API.
        directory: a new folder for the transcript.
        max_bytes: most bytes of all files together, at least 1.

    Raises:
        ConfigError: ``strategy`` is not one.
        StoreError: the folder cannot be written, or holds a transcript already.

    Example::

        strategy = Recorder(FedAvg(), "transcript")
    """

    def __init__(self, strategy: Strategy, directory: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        if not isinstance(strategy, Strategy):
            kind = strategy.__name__ if isinstance(strategy, type) else type(strategy).__name__
            raise ConfigError(f"{kind} is not a strategy; it must be an flwr.serverapp.strategy.Strategy.")
        if max_bytes < 1:
            raise ConfigError(f"max_bytes is {max_bytes!r}; it must be at least 1.")
        self.strategy, self.folder, self.max_bytes = strategy, Path(directory), max_bytes
        # Kept, as `start` puts this object's own in their place.
        self._configure, self._aggregate = strategy.configure_train, strategy.aggregate_train
        self._sent: dict[int, tuple[ArrayRecord, Tensors, dict[str, Any]]] = {}
        self._asked: list[Metadata] = []
        self._used = 0
        self._stopped = ""
        self._about = {
            "kind": KIND,
            "version": VERSION,
            "keyhole": keyhole.__version__,
            "strategy": type(strategy).__name__,
        }
        try:
            make_folder(self.folder)
            if (self.folder / TRANSCRIPT).exists():
                raise StoreError(f"'{self.folder}' holds a transcript already; name another folder.")
            write_whole(self.folder / TRANSCRIPT, as_json(self._about))
        except OSError as error:
            raise StoreError(f"cannot write a transcript to '{self.folder}': {error.strerror}.") from error

    def __getattr__(self, name: str) -> Any:
        """What strategies offer beside their common methods, such as the keys of their records."""
        if name == "strategy":  # not there yet: while it is unpickled
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """The strategy's own loop, with what this object does in place of configuring and aggregating."""
        own: Any = self.strategy
        own.configure_train, own.aggregate_train = self.configure_train, self.aggregate_train
        try:
            result: Result = own.start(*args, **kwargs)
            return result
        finally:
            del own.configure_train, own.aggregate_train

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages; keeps what each client is sent."""
        messages = list(self._configure(server_round, arrays, config, grid))
        if not self._stopped:
            self._guarded(lambda: self._keep(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's aggregate of the very same replies, once they are written down."""
        replies = list(replies)
        if not self._stopped:
            self._guarded(lambda: self._write(server_round, replies))
        return self._aggregate(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The strategy's."""
        self.strategy.summary()

    def _guarded(self, do: Any) -> None:
        """Whatever goes wrong here must not end a training; it ends the recording."""
        try:
            do()
        except Exception as error:
            self._stopped = str(error) if isinstance(error, StoreError) else cause(error)
            self._sent = {}
            _LOG.error("Recording to '%s' stopped: %s", self.folder, self._stopped)
            try:
                write_whole(self.folder / TRANSCRIPT, as_json({**self._about, "stopped": self._stopped}))
            except OSError:
                _LOG.error("The transcript cannot say so, as nothing can be written.")

    def _keep(self, messages: list[Message]) -> None:
        self._sent = {}
        # Not the numbers of the messages, which they only get when they are sent.
        self._asked = [message.metadata for message in messages]
        read: list[tuple[ArrayRecord, Tensors]] = []
        for message in messages:
            records = list(message.content.array_records.values())
            if len(records) != 1:
                continue
            (record,) = records
            # Most strategies send all clients the same record. Decoded now, as a client in this process may change it.
            known = next((one for one in read if one[0] is record), None)
            if known is None:
                known = (record, to_tensors(record))
                read.append(known)
            config = {k: v for one in message.content.config_records.values() for k, v in one.items()}
            self._sent[message.metadata.dst_node_id] = (*known, config)

    def _write(self, number: int, replies: list[Message]) -> None:
        """A folder for the round, file by file: beside the replies memory holds one client's update at a time."""
        place = self.folder / round_folder(number)
        partial = place.with_suffix(".partial")
        sizes: dict[str, int] = {}

        def check(more: int) -> None:
            if self._used + sum(sizes.values()) + more > self.max_bytes:
                raise StoreError(f"round {number} would take the transcript over {self.max_bytes} bytes.")

        def keep(name: str, tensors: Tensors) -> None:
            # Before they are copied, too: where it is full there may be no memory either.
            check(sum(tensor.nbytes for tensor in tensors.values()))
            data = tensors_as_bytes(tensors)
            check(len(data))
            write_whole(partial / name, data)
            sizes[name] = len(data)

        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(mode=0o700)
            clients = self._keep_clients(replies, keep)
            about = as_json({"round": number, "clients": clients, "files": sizes})
            check(len(about))
            write_whole(partial / ROUND, about)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._sent = {}
        self._used += sum(sizes.values()) + len(about)

    def _keep_clients(self, replies: list[Message], keep: Callable[[str, Tensors], None]) -> list[dict[str, Any]]:
        """Keep what clients were sent and how far they moved; returns what is said of each."""
        names: dict[int, str] = {}
        clients: list[dict[str, Any]] = []
        # SuperLink answers in its own name for a node that is gone.
        asked = {one.message_id: one.dst_node_id for one in self._asked if one.message_id}
        nodes = [asked.get(one.metadata.reply_to_message_id, one.metadata.src_node_id) for one in replies]
        for node, reply in sorted(zip(nodes, replies, strict=True), key=lambda one: one[0]):
            told: dict[str, Any] = {"client": str(node)}
            clients.append(told)
            if reply.has_error():
                told["error"] = f"the reply is an error: {reply.error.reason}"
                continue
            try:
                record, sent, config = self._sent.get(node) or _never_sent()
                update = _moved(sent, reply)
            except Refused as error:
                told["error"] = str(error)
                continue
            if id(record) not in names:
                names[id(record)] = f"weights{f'-{len(names) + 1}' if names else ''}.safetensors"
                keep(names[id(record)], sent)
            keep(client_file(str(node)), update)
            metrics = {k: v for one in reply.content.metric_records.values() for k, v in one.items()}
            told |= {
                "weights": names[id(record)],
                "update": client_file(str(node)),
                "examples": metrics.get(getattr(self.strategy, "weighted_by_key", "num-examples")),
                "config": {k: v for k, v in config.items() if not isinstance(v, bytes)},
                "metrics": metrics,
            }
        silent = sorted(set(self._sent) - set(nodes))
        return clients + [{"client": str(node), "error": "no reply came."} for node in silent]


def _never_sent() -> Any:
    raise Refused("it was not sent one record of arrays in this round.")


def _moved(sent: Tensors, reply: Message) -> Tensors:
    """Sent minus returned, of all floating-point arrays."""
    found = [record for record in reply.content.array_records.values() if set(record) <= set(sent) and record]
    if len(found) != 1:
        raise Refused(f"the reply has {len(found)} records with arrays that were sent; one is needed.")
    returned = to_tensors(found[0])
    for name, value in returned.items():
        if value.shape != sent[name].shape:
            raise Refused(f"the reply has '{name}' in another shape than it was sent.")
    return {name: sent[name] - value for name, value in returned.items() if value.is_floating_point()}


def record_batches(directory: str | os.PathLike[str], message: Message, inputs: Tensor, labels: Tensor) -> None:
    """Keep what a client trains on, so that attacks on a transcript can be scored. For test runs with data of no harm.

    Call it in the client's train function, once a round. Folders and files are for their owner alone.

    Args:
        directory: a folder for the secrets of all clients, apart from the transcript.
        message: the message that asked for training; it says which round and client this is.
        inputs: all images of the round as the model reads them, in the order of training, (n, *shape).
        labels: their classes, (n,).

    Raises:
        ConfigError: the message names no round; or images and labels are no tensors, or differ in number.
        StoreError: the folder cannot be written.
    """
    rounds = [one["server-round"] for one in message.content.config_records.values() if "server-round" in one]
    if not rounds:
        raise ConfigError("the message has no 'server-round' in its config, so that its secrets have no place.")
    check_images(inputs, labels)
    place = Path(directory) / round_folder(int(str(rounds[0])))
    data = tensors_as_bytes({"inputs": inputs, "labels": labels.reshape(-1).to(torch.int64)})
    try:
        make_folder(place)
        write_whole(place / client_file(str(message.metadata.dst_node_id)), data)
    except OSError as error:
        raise StoreError(f"cannot write secrets to '{place}': {error.strerror}.") from error
