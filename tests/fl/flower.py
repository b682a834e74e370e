"""What the Flower tests share: messages, contexts and a server in this process, without Ray or a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

# Messages say which task made them; Flower's own processes fill this in.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

Train = Callable[[Message, Context], Message]


def make_model() -> nn.Module:
    """One of each kind: convolution, BatchNorm with its buffers, linear layer."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def ask(model: nn.Module, node: int = 1, turn: int = 1, kind: str = "train", config: Any = None) -> Message:
    """What a strategy sends to a node."""
    records = {
        "arrays": ArrayRecord(model.state_dict()),
        "config": ConfigRecord({"server-round": turn, **(config or {})}),
    }
    return Message(RecordDict(records), dst_node_id=node, message_type=kind)


def answer(message: Message, arrays: ArrayRecord | None, **metrics: float) -> Message:
    """What an app returns."""
    records: dict[str, Any] = {"metrics": MetricRecord({"num-examples": 8, **metrics})}
    if arrays is not None:
        records["arrays"] = arrays
    return Message(RecordDict(records), reply_to=message)


def context(node: int = 1, partition: int | None = None) -> Context:
    """A node's context."""
    own = {} if partition is None else {"partition-id": partition, "num-partitions": 2}
    return Context(run_id=1, node_id=node, node_config=own, state=RecordDict(), run_config={})


class LoopGrid:
    """A grid whose nodes live in this process, each with its own context; replies come back in reverse order."""

    def __init__(self, train: Train, nodes: int) -> None:
        self.train = train
        self.contexts = {1000 + i: context(1000 + i, i) for i in range(nodes)}

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients."""
        asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        return [self.train(message, self.contexts[message.metadata.dst_node_id]) for message in reversed(asked)]
