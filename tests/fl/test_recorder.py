from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower import LoopGrid, Train, answer, ask, make_model
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg, Result
from torch import nn

from keyhole.errors import ConfigError, DataError, StoreError
from keyhole.experiment.transcript import read_secret, read_transcript
from keyhole.fl import Recorder, record_batches
from keyhole.fl.convert import to_tensors


def learn(message: Message, where: Context) -> Message:
    """One step on data of the client's own; counts are such that the mean is a weighted one."""
    model = make_model()
    model.load_state_dict(to_tensors(message.content["arrays"]))
    made = torch.Generator().manual_seed(int(where.node_config["partition-id"]))
    inputs = torch.randn(4, 1, 8, 8, generator=made)
    nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0])).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    reply = answer(message, ArrayRecord(model.state_dict()), loss=0.25)
    reply.content["metrics"]["num-examples"] = 4 + 3 * int(where.node_config["partition-id"])
    return reply


def federate(strategy: Any, rounds: int = 2, train: Train = learn) -> Result:
    torch.manual_seed(0)
    arrays = ArrayRecord(make_model().state_dict())
    return strategy.start(LoopGrid(train, 3), arrays, rounds, train_config=ConfigRecord({"lr": 0.1}))


def quiet(kind: type = FedAvg) -> Any:
    return kind(fraction_evaluate=0.0)


def data(record: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in record.items()}


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    federate(Recorder(quiet(), tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_the_aggregate_is_the_same_to_the_last_bit(kind: type, tmp_path: Path) -> None:
    plain, recorded = federate(quiet(kind)), federate(Recorder(quiet(kind), tmp_path))
    assert data(plain.arrays) == data(recorded.arrays)
    assert {k: dict(v) for k, v in plain.train_metrics_clientapp.items()} == {
        k: dict(v) for k, v in recorded.train_metrics_clientapp.items()
    }


def test_the_strategy_gets_the_very_same_replies(tmp_path: Path) -> None:
    got: list[Message] = []
    sent: list[Message] = []

    class Watching(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            got.extend(replies)
            return super().aggregate_train(server_round, got)

    def train(message: Message, where: Context) -> Message:
        sent.append(learn(message, where))
        return sent[-1]

    federate(Recorder(quiet(Watching), tmp_path), 1, train)
    assert [id(one) for one in got] == [id(one) for one in sent]


def test_what_is_written_is_what_was_sent_minus_what_came_back(tmp_path: Path) -> None:
    replies: dict[tuple[int, str], tuple[Any, Any]] = {}

    def train(message: Message, where: Context) -> Message:
        sent = to_tensors(message.content["arrays"])
        reply = learn(message, where)
        turn = int(message.content["config"]["server-round"])
        replies[turn, str(where.node_id)] = (sent, to_tensors(reply.content["arrays"]))
        if where.node_config["partition-id"] == 0:  # the last of the round, as all share what they are sent
            message.content["arrays"] = ArrayRecord({n: t * 0 for n, t in sent.items()})
        return reply

    federate(Recorder(quiet(), tmp_path), 2, train)
    found = read_transcript(tmp_path, make_model())
    assert not found.missing and found.about["strategy"] == "FedAvg"
    assert [(one.round, one.client) for one in found.updates] == sorted(replies)
    for one in found.updates:
        before, after = replies[one.round, one.client]
        for name, value in one.update.items():
            assert torch.equal(value, before[name] - after[name])
            assert torch.equal(one.weights.params[name], before[name])
        assert set(one.update) == {name for name, _ in make_model().named_parameters()}
        assert set(one.weights.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert one.config == {"lr": 0.1, "server-round": one.round}
        assert one.examples in (4, 7, 10)


def test_only_the_owner_can_read_a_transcript(transcript: Path) -> None:
    assert stat.S_IMODE(transcript.stat().st_mode) == 0o700
    files = [path for path in transcript.rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * (1 + 1 + 3)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in transcript.rglob("*") if path.is_dir()} == {0o700}


def test_a_strategy_with_a_loop_of_its_own_is_recorded_too(tmp_path: Path) -> None:
    class Own(FedAvg):
        def start(self, grid: Any, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
            config = ConfigRecord()
            replies = grid.send_and_receive(self.configure_train(1, initial_arrays, config, grid))
            return self.aggregate_train(1, replies)[0]

    own = quiet(Own)
    federate(Recorder(own, tmp_path))
    assert len(read_transcript(tmp_path, make_model()).updates) == 3
    assert "configure_train" not in vars(own), "the strategy is left as it was"


def test_a_recorder_inside_another_wrapper_records_what_it_wraps(tmp_path: Path) -> None:
    recorder = Recorder(quiet(), tmp_path)
    federate(DifferentialPrivacyServerSideFixedClipping(recorder, 0.1, 5.0, 3), 1)
    assert len(read_transcript(tmp_path, make_model()).updates) == 3
    assert recorder.arrayrecord_key == "arrays"


def test_errors_and_odd_replies_are_noted_and_the_rest_is_recorded(tmp_path: Path) -> None:
    def train(message: Message, where: Context) -> Message:
        if where.node_config["partition-id"] == 1:
            return Message(Error(2, "out of memory"), reply_to=message)
        return learn(message, where)

    federate(Recorder(quiet(), tmp_path), 1, train)
    found = read_transcript(tmp_path, make_model())
    assert [one.client for one in found.updates] == ["1000", "1002"]
    assert found.missing == ("round 1, client 1001: the reply is an error: out of memory",)


def test_a_client_that_died_is_named_although_the_server_answers_for_it(tmp_path: Path) -> None:
    """Flower's SuperLink answers with an error from node 1, itself; and for some, nobody answers."""

    class Real(LoopGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            asked = list(messages)
            for message in asked:
                message.metadata.__dict__["_message_id"] = message.object_id
            replies = [one for one in super().send_and_receive(asked) if one.metadata.src_node_id != 1002]
            for reply in replies:
                if reply.has_error():
                    reply.metadata.__dict__["_src_node_id"] = 1
            return replies

    def train(message: Message, where: Context) -> Message:
        if where.node_config["partition-id"] == 1:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        return learn(message, where)

    arrays = ArrayRecord(make_model().state_dict())
    Recorder(quiet(), tmp_path).start(Real(train, 3), arrays, 1)  # type: ignore[arg-type]
    found = read_transcript(tmp_path, make_model())
    assert [one.client for one in found.updates] == ["1000"]
    assert found.missing == (
        "round 1, client 1001: the reply is an error: Node Unavailable",
        "round 1, client 1002: no reply came.",
    )


def test_the_limit_ends_the_recording_and_not_the_training(transcript: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in (transcript / "round-0001").iterdir())
    limited = federate(Recorder(quiet(), tmp_path / "limited", max_bytes=size + 10))
    assert data(limited.arrays) == data(federate(quiet()).arrays)
    found = read_transcript(tmp_path / "limited", make_model())
    assert {one.round for one in found.updates} == {1}
    assert "round 2 would take the transcript over" in found.about["stopped"]


def test_clients_are_written_one_by_one_and_nothing_is_copied_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose replies only just fit into memory goes on training."""
    from keyhole.fl import recorder

    made, write, done = recorder.tensors_as_bytes, recorder.write_whole, []

    def writes(path: Path, content: bytes) -> None:
        done.append(f"wrote {path.stem}")
        write(path, content)

    monkeypatch.setattr(recorder, "tensors_as_bytes", lambda tensors: done.append("copied") or made(tensors))
    monkeypatch.setattr(recorder, "write_whole", writes)
    federate(Recorder(quiet(), tmp_path / "whole"), 1)
    files = [f"wrote {name}" for name in ("weights", "client-1000", "client-1001", "client-1002")]
    assert done == ["wrote transcript", *(step for file in files for step in ("copied", file)), "wrote round"]
    # With room for the weights and the first client's update, and no more.
    room = sum(
        (tmp_path / f"whole/round-0001/{name}.safetensors").stat().st_size for name in ("weights", "client-1000")
    )
    for limit, copied in ((room, 2), (1, 0)):
        done.clear()
        federate(Recorder(quiet(), tmp_path / f"{limit}", max_bytes=limit), 1)
        assert done.count("copied") == copied
        assert [path.name for path in (tmp_path / f"{limit}").iterdir()] == ["transcript.json"]


def test_a_full_disk_ends_the_recording_and_leaves_no_half_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyhole.fl import recorder

    write, calls = recorder.write_whole, []

    def fails(path: Path, content: bytes) -> None:
        calls.append(path)
        if "round-0002" in str(path) and path.name == "client-1001.safetensors":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(recorder, "write_whole", fails)
    result = federate(Recorder(quiet(), tmp_path), 3)
    assert data(result.arrays) == data(federate(quiet(), 3).arrays)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0001", "transcript.json"]
    assert "No space left" in json.loads((tmp_path / "transcript.json").read_text())["stopped"]
    assert not any("round-0003" in str(path) for path in calls)


def test_a_server_killed_while_it_writes_leaves_a_transcript_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyhole.fl import recorder

    write = recorder.write_whole

    def killed(path: Path, content: bytes) -> None:
        if "round-0002" in str(path) and path.name == "client-1001.safetensors":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(recorder, "write_whole", killed)
    # A kill gives no time to clean up.
    monkeypatch.setattr(recorder.shutil, "rmtree", lambda path, ignore_errors: None)
    with pytest.raises(KeyboardInterrupt):
        federate(Recorder(quiet(), tmp_path))
    assert (tmp_path / "round-0002.partial").exists()
    assert {one.round for one in read_transcript(tmp_path, make_model()).updates} == {1}


def test_what_is_no_strategy_is_refused(tmp_path: Path) -> None:
    for wrong, name in ((FedAvg, "FedAvg"), ("fedavg", "str"), (None, "NoneType")):
        with pytest.raises(ConfigError, match=f"{name} is not a strategy"):
            Recorder(wrong, tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_two_runs_never_share_a_folder(transcript: Path) -> None:
    with pytest.raises(StoreError, match="holds a transcript already"):
        Recorder(quiet(), transcript)


# The reader


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "transcript.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resized(folder: Path, name: str, content: bytes) -> None:
    """Another content, of a length that the round's list agrees with."""
    (folder / name).write_bytes(content)
    told = json.loads((folder / "round.json").read_text())
    told["files"][name] = len(content)
    (folder / "round.json").write_text(json.dumps(told))


def test_a_transcript_of_a_newer_keyhole(transcript: Path) -> None:
    rewritten(transcript, version=2)
    with pytest.raises(DataError, match="version 2, of a newer Keyhole"):
        read_transcript(transcript, make_model())


def test_a_folder_that_is_no_transcript(transcript: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is no transcript: it has no transcript.json"):
        read_transcript(tmp_path / "empty", make_model())
    rewritten(transcript, kind="something else")
    with pytest.raises(DataError, match="does not describe a transcript"):
        read_transcript(transcript, make_model())


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
    ],
)
def test_a_transcript_of_another_model(transcript: Path, model: nn.Module) -> None:
    with pytest.raises(DataError, match="it is of another model"):
        read_transcript(transcript, model)


@pytest.mark.parametrize("name", ["weights.safetensors", "client-1001.safetensors", "round.json"])
def test_a_transcript_cut_short(transcript: Path, name: str) -> None:
    path = transcript / "round-0002" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut short"):
        read_transcript(transcript, make_model())
    path.unlink()
    with pytest.raises(DataError, match="cut short"):
        read_transcript(transcript, make_model())


def test_a_transcript_without_a_round(transcript: Path) -> None:
    for place in transcript.glob("round-*"):
        place.rename(place.with_suffix(".partial"))
    with pytest.raises(DataError, match="no update of a complete round"):
        read_transcript(transcript, make_model())


@pytest.mark.parametrize("name", ["weights.safetensors", "client-1001.safetensors"])
def test_a_transcript_with_nan(transcript: Path, name: str) -> None:
    from safetensors.torch import load, save

    place = transcript / "round-0001"
    tensors = load((place / name).read_bytes())
    tensors["4.bias"][1] = float("nan")
    resized(place, name, save(tensors))
    found = read_transcript(transcript, make_model())
    assert found.missing and all("'4.bias' holds NaN" in said for said in found.missing)
    assert {(1, "1001"), (2, "1001")} - {(one.round, one.client) for one in found.updates} == {(1, "1001")}
    with pytest.raises(DataError, match="'4.bias' holds NaN"):
        read_transcript(transcript, make_model(), rounds=[1], clients=["1001"])


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_pickled_weights_are_refused_and_never_loaded(
    transcript: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"4.bias": torch.zeros(3)}, tmp_path / "weights.pt")
    for content in (pickle.dumps(Bomb()), (tmp_path / "weights.pt").read_bytes()):
        resized(transcript / "round-0001", "client-1001.safetensors", content)
        with pytest.raises(DataError, match="is a pickle, which could run code and is never loaded"):
            read_transcript(transcript, make_model())
    assert not (tmp_path / "exploded").exists()


def test_a_round_cannot_name_files_elsewhere(transcript: Path) -> None:
    path = transcript / "round-0001" / "round.json"
    told = json.loads(path.read_text())
    told["clients"][0]["update"] = "../round-0002/client-1000.safetensors"
    told["files"]["../round-0002/client-1000.safetensors"] = 1
    path.write_text(json.dumps(told))
    with pytest.raises(DataError, match="is damaged"):
        read_transcript(transcript, make_model())


def test_secrets_of_a_test_run(tmp_path: Path) -> None:
    message = ask(make_model(), node=42, turn=3)
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([2, 0, 1, 1, 0])
    secrets = tmp_path / "runs" / "secrets"
    record_batches(secrets, message, images, labels)
    (path,) = tmp_path.rglob("*.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(place.stat().st_mode) for place in (path.parent, secrets, secrets.parent)] == [0o700] * 3
    secret = read_secret(secrets, 3, "42")
    assert secret is not None
    assert torch.equal(secret.inputs, images) and torch.equal(secret.labels, labels)
    assert read_secret(secrets, 4, "42") is None
    with pytest.raises(ConfigError, match="do not fit"):
        record_batches(tmp_path, message, images, labels[:2])
    for wrong in (images.tolist(), images.numpy(), None):
        with pytest.raises(ConfigError, match=f"images are a {type(wrong).__name__}; a torch.Tensor is needed"):
            record_batches(tmp_path, message, wrong, labels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="labels are a list"):
        record_batches(tmp_path, message, images, labels.tolist())  # type: ignore[arg-type]
    del message.content["config"]
    with pytest.raises(ConfigError, match="no 'server-round'"):
        record_batches(tmp_path, message, images, labels)
