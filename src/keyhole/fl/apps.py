"""Training under defenses with Flower as the transport: a ServerApp and a ClientApp on its simulation engine.

The server's loop is `keyhole.experiment.train.train`, and a client's round `keyhole.experiment.participant.take_part`:
networks are those of the lifted backend, to the last bit on a CPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from keyhole.core.told import Told, silent
from keyhole.core.types import Tensors, Weights
from keyhole.errors import ConfigError, KeyholeError, ModelError, cause
from keyhole.experiment.participant import take_part
from keyhole.experiment.train import Ask, Problem, Trained, folder_of, train
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.experiment.work import available_cores
from keyhole.federation.local import Round
from keyhole.fl.convert import to_record, to_tensors
from keyhole.fl.mods import client_number

_POLL = 0.02
"""Seconds between two looks for replies."""
_JOIN = 120.0
"""Seconds for the clients to turn up."""
_END = 20.0
"""Seconds for a server that was stopped to end; it may be testing a network."""
_LEAVE = 30
"""Whole seconds for a process that was interrupted to end."""


class _Stopped(Exception):
    """Whoever started the server wants it to end."""


def train_in_flower(plan: TrainingPlan, folder: Path, *, told: Told = silent) -> list[Trained]:
    """`keyhole.experiment.train.train`, with each client a node of Flower's simulation engine, one core each.

    Args:
        plan: what to train.
        folder: the output folder; made if needed. Clients keep their defense's state there, each in its own files.
        told: told which training is how far.

    Raises:
        ConfigError: Ray is missing, or the engine does not start.
        ModelError: a client failed, training diverged, or a defended client returned exactly the weights it got.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--backend flower needs Flower's simulation engine: pip install 'keyhole[flower]'.")
    os.environ.setdefault("RAY_usage_stats_enabled", "0")
    # What Ray will do by itself some day, and else warns of in every run.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A thread that comes too late, after the engine's end, would start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Says that it is deprecated, in many lines; there is no other way into the engine from Python.
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    clients = plan.federation.clients
    server = Server(plan, folder, told)
    # Its own Ray: by default it would join whatever cluster was started on this machine.
    init = {"address": "local", "num_cpus": min(clients, available_cores())}
    init |= {"logging_level": "ERROR", "log_to_driver": False}
    config = {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    try:
        run_simulation(server.app(), client_app(plan, folder), clients, backend_config=config)  # type: ignore[arg-type]
    except Exception as error:
        if server.error is None:
            raise ConfigError(f"Flower's simulation engine stopped ({cause(error.__cause__ or error)}).") from error
    finally:
        server.stop()
    return server.result()


@contextmanager
def leaves_when_interrupted() -> Iterator[None]:
    """After Ctrl-C the process ends within 30 seconds, whatever it still waits for; a second Ctrl-C ends it at once.

    Flower's engine leaves threads behind that wait for clients of a Ray that is no more, some of them for ever, and
    Python waits for threads. By the system's alarm, as a hanging process cannot be relied on to end itself; Ray's
    processes end with it. What is written is written whole. For a process that does nothing else.
    """
    usual = signal.getsignal(signal.SIGINT)

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.alarm(_LEAVE)
        raise KeyboardInterrupt

    if usual is signal.default_int_handler:  # and not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, usual)


class Server:
    """The whole of `keyhole.experiment.train.train` as a ServerApp's main function.

    Args:
        plan: what to train.
        folder: the output folder.
        told: told which training is how far.
    """

    def __init__(self, plan: TrainingPlan, folder: Path, told: Told = silent) -> None:
        self.plan, self.folder, self.told = plan, folder, told
        self.done: list[Trained] | None = None
        self.error: BaseException | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._started = False

    def app(self) -> ServerApp:
        """For Flower to run."""
        app = ServerApp()
        app.main()(self.main)
        return app

    def main(self, grid: Grid, context: Context) -> None:
        """Train; how it ended is kept, as Flower passes on neither results nor errors as they are."""
        self._started = True
        try:
            self._nodes(grid)
            self.done = train(self.plan, self.folder, told=self.told, ask=self.ask(grid))
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def stop(self) -> None:
        """End at the next look for replies, and wait for that, though not for ever."""
        self._stop.set()
        if self._started:
            self._ended.wait(_END)

    def result(self) -> list[Trained]:
        """What was trained, or the error that ended it."""
        if self.error is not None:
            raise self.error
        if self.done is None:
            raise ConfigError("Flower's simulation engine ended before the training did.")
        return self.done

    def ask(self, grid: Grid) -> Ask:
        """Runs a round's clients on a grid: all nodes get the same message, and say which client they are."""

        def ask(run: Trained, defended: bool, weights: Weights, number: int) -> tuple[Round, float]:
            index = self.plan.defenses.index(run.defense if defended else ())
            sent = to_record({**weights.params, **weights.buffers})
            # The number as Flower's strategies give it, from 1.
            config = ConfigRecord({"server-round": number + 1, "defense": index, "seed": run.seed})
            content = RecordDict({"arrays": sent, "config": config})
            messages = [Message(content, node, MessageType.TRAIN) for node in self._nodes(grid)]
            return _round(self._replies(grid, messages), weights, number, len(messages))

        return ask

    def _nodes(self, grid: Grid) -> list[int]:
        wanted, began = self.plan.federation.clients, time.monotonic()
        while len(nodes := list(grid.get_node_ids())) < wanted:
            if time.monotonic() - began > _JOIN:
                raise ConfigError(f"only {len(nodes)} of {wanted} clients turned up within {_JOIN:g} seconds.")
            self._wait()
        return nodes

    def _replies(self, grid: Grid, messages: list[Message]) -> list[Message]:
        # Not `send_and_receive`, which cannot be stopped while a client trains.
        waiting = set(grid.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            for reply in grid.pull_messages(waiting):
                if reply.has_error():
                    raise ModelError(f"a client could not train: {_sentence(reply.error.reason)}")
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            if waiting:
                self._wait()
        return replies

    def _wait(self) -> None:
        if self._stop.wait(_POLL):
            raise _Stopped


def client_app(plan: TrainingPlan, folder: Path) -> ClientApp:
    """One client of a plan's trainings: which one is the node's ``partition-id``.

    Args:
        plan: what to train.
        folder: the output folder.
    """
    app = ClientApp()
    # As text, which travels between processes and names what a process has loaded already.
    toml, where = plan.to_toml(), str(folder.resolve())

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        try:
            return Message(_answer(toml, Path(where), message, context), reply_to=message)
        except Exception as error:
            said = str(error) if isinstance(error, KeyholeError) else f"{cause(error)}."
            reason = f"client {client_number(context)}: {said}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    return app


def _answer(toml: str, folder: Path, message: Message, context: Context) -> RecordDict:
    problem, config = _problem(toml), message.content.config_records["config"]
    index, seed, number = (int(str(config[name])) for name in ("defense", "seed", "server-round"))
    client = client_number(context)
    trained, seconds = take_part(
        problem,
        problem.plan.defenses[index],
        seed,
        number - 1,
        client,
        to_tensors(message.content.array_records["arrays"]),
        folder_of(problem.plan, folder, index, seed) / "clients",
    )
    own = {name: value[0] for part in trained.weights for name, value in part.items()}
    metrics = MetricRecord(
        {
            "client": client,
            "num-examples": int(trained.examples[0]),
            "loss": float(trained.loss[0]),
            "seconds": seconds,
        }
    )
    return RecordDict({"arrays": to_record(own), "metrics": metrics})


@lru_cache(maxsize=1)
def _problem(toml: str) -> Problem:
    """Loaded once in a process, not once a round."""
    return Problem(parse_training(tomllib.loads(toml)), torch.device("cpu"))


def _round(replies: Iterable[Message], like: Weights, number: int, clients: int) -> tuple[Round, float]:
    """Replies by client, in whatever order they came, as the strategy takes them, and the mean seconds of a client."""
    by_client = {int(str(_metrics(reply)["client"])): reply for reply in replies}
    if sorted(by_client) != list(range(clients)):
        raise ModelError(f"in round {number + 1} clients {sorted(by_client)} answered; 0 to {clients - 1} should have.")
    ordered = [by_client[client] for client in range(clients)]
    sent = [to_tensors(reply.content.array_records["arrays"]) for reply in ordered]
    metrics = [_metrics(reply) for reply in ordered]
    numbers = {name: [float(str(m[name])) for m in metrics] for name in ("num-examples", "loss", "seconds")}

    def stacked(part: Tensors) -> Tensors:
        return {name: torch.stack([tensors[name] for tensors in sent]).to(like) for name, like in part.items()}

    weights = Weights(stacked(like.params), stacked(like.buffers))
    examples = torch.tensor([int(count) for count in numbers["num-examples"]])
    loss = torch.tensor(numbers["loss"], dtype=torch.float64)
    return Round(weights, examples, loss, ()), sum(numbers["seconds"]) / clients


def _metrics(reply: Message) -> MetricRecord:
    return reply.content.metric_records["metrics"]


def _sentence(reason: str | None) -> str:
    first = (reason or "it gave no reason").strip().split("\n")[0]
    return first if first.endswith(".") else f"{first}."
