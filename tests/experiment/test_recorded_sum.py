"""Sums over clients, as secure aggregation shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recorded_case import LR, MODEL, Small, change, keep, moved, record
from torch import Tensor

from keyhole.errors import ConfigError, DataError
from keyhole.experiment.recorded import Finding, audit_transcript
from keyhole.experiment.transcript import round_folder
from keyhole.report.recorded import told, write_recorded
from keyhole.solve.files import tensors_as_bytes

BRIEF = 'attacks=[{name="idlg",steps=2}]'


@pytest.fixture
def model() -> Small:
    torch.manual_seed(3)
    return Small()


def batches(count: int, size: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, 1, 8, 8, generator=made), (torch.arange(size) + i) % 4) for i in range(count)]


def one_of(folder: Path, *changes: str) -> Finding:
    (finding,) = audit_transcript(folder, MODEL, changes=(BRIEF, "sum=true", *changes)).found
    return finding


def test_one_step_of_each_client_is_one_step_on_all_images_though_a_batch_is_one_clients(
    tmp_path: Path, model: Small
) -> None:
    """Checked with torch's own optimizer on all images at once."""
    steps = batches(4, 1)
    updates = {str(i): moved(model, [step]) for i, step in enumerate(steps)}
    told_of = {"lr": LR, "batch-size": 1, "local-epochs": 1}
    folder = record(tmp_path / "t", model, updates, dict.fromkeys(updates, 1), **told_of)
    finding = one_of(folder)
    together = moved(model, [(torch.cat([x for x, _ in steps]), torch.cat([y for _, y in steps]))])
    for name, value in finding.update.update.items():
        assert torch.allclose(value, together[name], atol=1e-7)
    training = finding.training
    assert (training.steps, training.images, training.rule.order) == (1, 4, "fixed")
    assert training.rule.steps(4) == 1 and training.rule.scale(4) == pytest.approx(LR)
    assert not any("order" in reason.text for reason in finding.reasons)
    assert "1 local step a client" in training.words


def test_a_sum_gives_the_images_back_that_its_clients_have(tmp_path: Path, model: Small) -> None:
    """Taken for four steps in a row it is not explained."""
    steps = batches(4, 1)
    updates = {str(i): moved(model, [step]) for i, step in enumerate(steps)}
    folder = record(tmp_path / "t", model, updates, dict.fromkeys(updates, 1), lr=LR, batch_size=1, epochs=1)
    for client, step in zip(updates, steps, strict=True):
        keep(tmp_path / "s", client, *step)
    changes = ('attacks=[{name="idlg",steps=300}]', "sum=true")
    found = audit_transcript(folder, MODEL, tmp_path / "s", changes)
    (attempt,) = found.found[0].attempts
    assert min(attempt.metrics["ssim"]) > 0.9 and attempt.explains


@pytest.mark.parametrize(
    ("examples", "steps", "scale", "said"),
    [
        ({"1": 4, "2": 4}, 2, 2.0, "2 local steps a client"),
        ({"1": 2, "2": 6}, 3, 2.5, "1 to 3 local steps a client"),
        ({"1": None, "2": None}, 1, 1.0, "2 images of 2 clients, assuming one where 2 of the clients do not say"),
    ],
)
def test_steps_are_those_of_a_client_and_the_length_is_that_of_their_mean(
    tmp_path: Path, model: Small, examples: dict[str, int | None], steps: int, scale: float, said: str
) -> None:
    """With batches of 2; a mean of 1 step for a quarter of the images and 3 for the others has the length of 2.5."""
    updates = {client: moved(model, batches(1, 2)) for client in examples}
    folder = record(tmp_path / "t", model, updates, examples, lr=LR, **{"batch-size": 2, "epochs": 1})
    training = one_of(folder).training
    assert training.steps == steps
    assert training.rule.scale(training.images) == pytest.approx(scale * LR)
    assert any(words.startswith(said) for words in training.words)
    assert ("images of all clients weighed alike, which is an assumption" in training.words) == (scale == 2.5)


def test_what_the_protocol_never_shows_or_one_start_cannot_explain_is_refused(tmp_path: Path, model: Small) -> None:
    updates = {client: moved(model, batches(1, 1)) for client in "123"}
    folder = record(tmp_path / "t", model, updates, dict.fromkeys(updates, 1), lr=LR)
    with pytest.raises(ConfigError, match="leave out clients"):
        one_of(folder, 'clients=["1","2"]')
    change(folder, "2", config={"lr": 0.1})
    with pytest.raises(DataError, match="told different learning rates; say which one to assume"):
        one_of(folder)
    assert one_of(folder, "lr=0.3").training.scale_known
    change(folder, "2", config={"lr": LR}, examples=-1)
    with pytest.raises(DataError, match="an update is in it that cannot be read"):
        one_of(folder)
    change(folder, "2", examples=1)
    place = folder / round_folder(1)
    other = tensors_as_bytes({name: value + 1 for name, value in model.state_dict().items()})
    (place / "weights-2.safetensors").write_bytes(other)
    listed = json.loads((place / "round.json").read_text())
    listed["files"]["weights-2.safetensors"] = len(other)
    listed["clients"][1]["weights"] = "weights-2.safetensors"
    (place / "round.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match="sum of 3 clients: its clients were sent different weights"):
        one_of(folder)


def test_the_report_calls_a_sum_a_sum(tmp_path: Path, model: Small) -> None:
    updates = {client: moved(model, batches(1, 1)) for client in "12"}
    folder = record(tmp_path / "t", model, updates, dict.fromkeys(updates, 1), lr=LR)
    findings = audit_transcript(folder, MODEL, changes=(BRIEF, "sum=true", 'defense=[{name="gaussian_noise"}]'))
    page = write_recorded(findings, tmp_path / "out").read_text()
    assert "Round 1, sum of 2 clients" in page and "client sum" not in page
    (line,) = told(findings)
    assert line.startswith("Round 1, sum of 2 clients: 2 images of 2 clients, as the clients say; ")
    assert "counters of the defense are made for one client's update" in line
    # The noise of a mean has another law than that of one client.
    assert [attempt.explained_up_to for attempt in findings.found[0].attempts] == [None, None]
