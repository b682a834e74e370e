"""The server's noise on the mean of clients, held against means by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import LoopGrid, answer, context, make_model
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from torch import Tensor, nn

from keyhole.core.defense import chain
from keyhole.core.registry import DEFENSES
from keyhole.defenses.user_dp import UserDP
from keyhole.errors import ConfigError, Refused
from keyhole.experiment.transcript import read_transcript
from keyhole.fl import DefenseMod, Recorder, ServerNoise, defended_training
from keyhole.fl.convert import to_tensors


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 3))


def returned(state: dict[str, Tensor], client: int) -> dict[str, Tensor]:
    return {name: value + client + 1 if value.is_floating_point() else value for name, value in state.items()}


def learn(message: Message, where: Context) -> Message:
    """Moves every entry by the client's number, from 1; counts are such that clients would not weigh the same."""
    client = int(where.node_config["partition-id"])
    state = returned(to_tensors(message.content["arrays"]), client)
    reply = answer(message, ArrayRecord(state), loss=float(client))
    reply.content["metrics"]["num-examples"] = 10 ** (client + 1)
    return reply


def federate(strategy: Any, train: Any = learn, model: nn.Module | None = None) -> dict[str, Tensor]:
    """One round of three clients."""
    arrays = ArrayRecord((model or net()).state_dict())
    return to_tensors(strategy.start(LoopGrid(train, 3), arrays, 1).arrays)


def quiet(kind: type = FedAvg) -> Any:
    return kind(fraction_evaluate=0.0)


def noised(multiplier: float = 1.0, clip: float = 0.5, **more: Any) -> ServerNoise:
    return ServerNoise(quiet(), UserDP(clip, multiplier), net(), **more)


def noise(result: dict[str, Tensor], moved: float = 2.0) -> Tensor:
    start = net().state_dict()
    return torch.cat([(result[name] - start[name] - moved).flatten() for name, _ in net().named_parameters()]).double()


def test_without_noise_clients_weigh_the_same() -> None:
    result, start = federate(noised(0.0)), net().state_dict()
    for name, value in start.items():
        moved = 2.0 if value.is_floating_point() else 0.0
        assert torch.allclose(result[name].double(), value.double() + moved, atol=1e-5), name


def test_the_mean_has_noise_of_the_multiplier_times_the_clip_over_the_clients() -> None:
    result = federate(noised(1.5, 0.2, seed=0))
    drawn = noise(result)
    assert len(drawn) == 100 * 100 + 100 + 200 + 303
    assert float(drawn.std()) == pytest.approx(1.5 * 0.2 / 3, rel=0.05)
    assert abs(float(drawn.mean())) < 5 * 0.1 / len(drawn) ** 0.5
    for name, value in net().named_buffers():
        moved = 2.0 if value.is_floating_point() else 0.0
        assert torch.allclose(result[name].double(), value.double() + moved), name


def test_noise_is_divided_by_the_clients_that_answered() -> None:
    def one_fails(message: Message, where: Context) -> Message:
        if int(where.node_config["partition-id"]) == 1:
            return Message(Error(1, "broken"), reply_to=message)
        return learn(message, where)

    # Of the first and third client: moved by 1 and 3.
    assert float(noise(federate(noised(), one_fails)).std()) == pytest.approx(0.5 / 2, rel=0.05)

    def all_fail(message: Message, where: Context) -> Message:
        return Message(Error(1, "broken"), reply_to=message)

    assert not federate(noised(), all_fail)


def test_noise_is_fresh_unless_a_seed_is_given(caplog: pytest.LogCaptureFixture) -> None:
    assert not torch.equal(noise(federate(noised())), noise(federate(noised())))
    assert "fixed seed" not in caplog.text
    fixed = noised(seed=3)
    assert torch.equal(noise(federate(fixed)), noise(federate(fixed)))
    assert fixed._key(1).tolist() != fixed._key(2).tolist()
    assert "Simulation only" in caplog.text


def test_the_strategy_inside_works_on_the_noisy_mean() -> None:
    """An Adam step from noise that is far larger than what clients did has random signs; without noise it has one."""
    steps = [noise(federate(ServerNoise(quiet(FedAdam), UserDP(1.0, z), net())), moved=0.0).sign() for z in (0.0, 1e4)]
    assert (steps[0] == 1).all()
    assert 0.4 < float((steps[1] == 1).double().mean()) < 0.6


def test_a_recorder_around_it_keeps_what_the_server_saw_before(tmp_path: Path) -> None:
    recorded = federate(Recorder(noised(seed=3), tmp_path))
    assert all(torch.equal(value, recorded[name]) for name, value in federate(noised(seed=3)).items())
    found = read_transcript(tmp_path, net())
    assert [one.examples for one in found.updates] == [10, 100, 1000]
    for client, one in enumerate(found.updates):
        assert all(torch.allclose(value, torch.tensor(-1.0 - client), atol=1e-5) for value in one.update.values())


def test_other_strategies_defenses_and_arrays_are_refused(tmp_path: Path) -> None:
    for wrong in (quiet(FedMedian), Recorder(quiet(), tmp_path / "t")):
        with pytest.raises(ConfigError, match=f"{type(wrong).__name__} is not known to take a mean"):
            ServerNoise(wrong, UserDP(), net())
    with pytest.raises(ConfigError, match="Clip leaves no noise to the server"):
        ServerNoise(quiet(), DEFENSES.build("clip"), net())
    with pytest.raises(Refused, match="has '4.bias', which the model given"):
        federate(noised(), model=make_model())


def test_what_clients_leave_to_the_server_is_said(caplog: pytest.LogCaptureFixture) -> None:
    said = "must use keyhole.fl.ServerNoise"
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    DefenseMod(DEFENSES.build("clip"), model)
    assert said not in caplog.text
    DefenseMod(chain(DEFENSES.build("clip"), UserDP()), model)
    assert said in caplog.text
    caplog.clear()
    defended_training(model, UserDP(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), context(), lr=0.1)
    assert said in caplog.text
