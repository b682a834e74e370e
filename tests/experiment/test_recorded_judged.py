"""What is said of an update that was not explained, or that noise was added to; and of what could not be read."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_case import LR, MODEL, QUICK, Small, change, keep, moved, record
from torch import Tensor, nn

from keyhole import cli
from keyhole.errors import ConfigError, DataError
from keyhole.experiment.recorded import Findings, audit_transcript
from keyhole.experiment.transcript import read_transcript, round_folder
from keyhole.report.recorded import conclusion, explains, remarks, write_recorded

BRIEF = 'attacks=[{name="idlg",steps=2}]'
NOISE = 'defense=[{name="gaussian_noise",std=0.003}]'


class Kinked(nn.Module):
    """A network that leaves much of an update at 0."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 64), nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.relu(self.conv(images)).flatten(1))))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(3)
    return Small()


@pytest.fixture
def image() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2])


def noisy(update: dict[str, Tensor], std: float) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(8)
    return {name: value + std * torch.randn(value.shape, generator=made) for name, value in update.items()}


def square(update: dict[str, Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in update.values())


def test_an_update_under_noise_is_explained_by_what_scores_as_the_true_images_would(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    """Their score is the noise's share of the update's square, worked out here from the noise itself."""
    clean = moved(model, [image])
    sent = noisy(clean, 0.003)
    folder = record(tmp_path / "t", model, {"7": sent}, {"7": 1}, lr=LR, epochs=1)
    share = square({name: sent[name] - clean[name] for name in sent}) / square(sent)
    assert 1e-3 < share < 0.1, "the case is one in which the true images do not score 0"
    found = audit_transcript(folder, MODEL, keep(tmp_path / "s", "7", *image), (QUICK, NOISE))
    naive, adaptive = found.found[0].attempts
    assert adaptive.explained_up_to is not None and share <= adaptive.explained_up_to < 1.5 * share + 1e-3
    assert adaptive.metrics["ssim"][0] > 0.8 and adaptive.explains
    assert naive.explains is None or naive.score <= 1e-3
    assert conclusion(found).startswith(
        "1 of 1 private images leaked to the best attack on each update. 1 of 1 attacked"
    )
    # Another image of that class does not.
    other = moved(model, [(torch.rand_like(image[0]), image[1])])
    wrong = square({name: sent[name] - other[name] for name in sent}) / square(sent)
    assert replace(adaptive, score=wrong).explains is False
    write_recorded(found, tmp_path / "out")
    (update,) = json.loads((tmp_path / "out" / "report.json").read_text())["updates"]
    assert [one["explains_update"] for one in update["attacks"]] == [naive.explains, True]


@pytest.mark.parametrize(
    ("std", "epochs", "known", "explains", "said"),
    [
        (0.003, 1, (), False, "0 of 1 attacked update explained. What is not explained is not safe for that"),
        (0.1, 1, (NOISE.replace("0.003", "0.1"),), None, "Of 1 attacked update the attacks' own score tells nothing"),
        (0.0, 2, (), None, "Of 1 attacked update the attacks' own score tells nothing"),
    ],
)
def test_a_score_that_cannot_tell_is_not_taken_for_safety(
    tmp_path: Path,
    model: Small,
    image: tuple[Tensor, Tensor],
    std: float,
    epochs: int,
    known: tuple[str, ...],
    explains: bool | None,
    said: str,
) -> None:
    """Noise that the attacker does not know, noise that is most of the update, and several steps."""
    sent = noisy(moved(model, [image] * epochs), std)
    folder = record(tmp_path / "t", model, {"7": sent}, {"7": 1}, lr=LR, epochs=epochs)
    found = audit_transcript(folder, MODEL, changes=(BRIEF, *known))
    assert {attempt.explains for attempt in found.found[0].attempts} == {explains}
    text = conclusion(found)
    assert said in text and "images were found" not in text and "(--secrets)" in text


@pytest.mark.parametrize(
    ("images", "config", "assumed"),
    [
        (12, {}, True),
        (12, {"epochs": 1}, True),
        (12, {"batch_size": 12}, True),
        (12, {"epochs": 1, "batch_size": 12}, False),
        (1, {"epochs": 1}, False),
        (None, {"epochs": 1, "batch_size": 12}, True),
    ],
)
def test_on_assumed_steps_or_images_no_update_is_called_unexplained(
    tmp_path: Path, model: Small, images: int | None, config: dict[str, Any], assumed: bool
) -> None:
    """The client took five steps on twelve images; what one step leaves over says nothing unless one step is known."""
    generator = torch.Generator().manual_seed(8)
    batch = torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 4
    folder = record(tmp_path, model, {"7": moved(model, [batch] * 5)}, {"7": images}, lr=LR, **config)
    brief = 'attacks=[{name="idlg",steps=2,restarts=1}]'
    found = audit_transcript(folder, MODEL, changes=(brief,))
    (one,) = found.found
    assert one.training.steps == 1 and one.training.assumed == assumed
    assert explains(one) is (None if assumed else False)
    assert ("0 of 1 attacked update explained" in conclusion(found)) != assumed


def test_noise_makes_no_prediction_rosier(tmp_path: Path, image: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(4)
    model = Kinked()
    clean = moved(model, [image])
    zeros = sum(int((value == 0).sum()) for value in clean.values()) / sum(value.numel() for value in clean.values())
    assert zeros > 0.3
    order = ["unlikely by these attacks", "partly", "likely recoverable"]
    verdicts = {}
    for name, update, known in (
        ("clean", clean, ()),
        ("told", noisy(clean, 0.001), (NOISE,)),
        ("untold", noisy(clean, 0.001), ()),
    ):
        folder = record(tmp_path / name, model, {"7": update}, {"7": 1}, lr=LR)
        (finding,) = audit_transcript(folder, f"{__name__}:Kinked", changes=(BRIEF, *known)).found
        verdicts[name] = finding.verdict
        said = " ".join(reason.text for reason in finding.reasons)
        assert ("The clients use gaussian_noise" in said) == (name == "told")
        assert ("something was added" in said) == (name == "untold")
    assert order.index(verdicts["told"]) <= order.index(verdicts["clean"]) == 1
    assert order.index(verdicts["untold"]) <= order.index(verdicts["clean"])


def two_rounds(folder: Path, model: nn.Module, image: tuple[Tensor, Tensor], bad: dict[str, Tensor]) -> Path:
    """Clients 7 and 8; in round 2 what client 8 sent is bad."""
    good = moved(model, [image])
    record(folder, model, {"7": good, "8": good}, {"7": 1, "8": 1}, lr=LR)
    return record(folder, model, {"7": good, "8": bad}, {"7": 1, "8": 1}, number=2, lr=LR)


def test_one_client_with_nan_or_a_part_of_the_model_keeps_no_other_from_being_audited(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    good = moved(model, [image])
    for bad, said in (
        (good | {"head.bias": good["head.bias"] * math.nan}, "'head.bias' holds NaN or infinity"),
        ({name: good[name] for name in good if name != "head.bias"}, "it returned only some of the arrays"),
    ):
        folder = two_rounds(tmp_path / said[:6], model, image, bad)
        found = audit_transcript(folder, MODEL, changes=(BRIEF,))
        assert [one.update.name for one in found.found] == [
            "round 1, client 7", "round 1, client 8", "round 2, client 7",
        ]  # fmt: skip
        (missing,) = found.missing
        assert missing.startswith("round 2, client 8: ") and said in missing
        assert any(text.startswith("Not attacked: round 2, client 8: ") for text in remarks(found))
        assert not audit_transcript(folder, MODEL, changes=(BRIEF, 'clients=["7"]')).missing
        with pytest.raises(DataError, match=said):
            audit_transcript(folder, MODEL, changes=(BRIEF, 'clients=["8"]', "rounds=[2]"))
        # The sum of that round is not known.
        sums = audit_transcript(folder, MODEL, changes=(BRIEF, "sum=true"))
        assert [one.update.name for one in sums.found] == ["round 1, sum of 2 clients"]
        assert "round 2, sum of 1 clients: an update is in it that cannot be read" in sums.missing[-1]


def test_what_is_not_chosen_is_not_read(tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]) -> None:
    folder = two_rounds(tmp_path, model, image, moved(model, [image]))
    (folder / round_folder(2) / "client-8.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cut short"):
        audit_transcript(folder, MODEL, changes=(BRIEF,))
    for chosen in ("rounds=[1]", 'clients=["7"]'):
        found = audit_transcript(folder, MODEL, changes=(BRIEF, chosen))
        assert len(found.found) == 2 and found.recorded == 4
    for chosen in ("rounds=[5]", 'clients=["9"]'):
        with pytest.raises(ConfigError, match="no recorded update has a round and client"):
            audit_transcript(folder, MODEL, changes=(BRIEF, chosen))


def test_a_round_that_is_not_there_is_remarked(tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]) -> None:
    for number in (2, 4):
        folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, number=number, lr=LR)
    found = audit_transcript(folder, MODEL, changes=(BRIEF,))
    assert remarks(found)[0] == "Not in the transcript, though later rounds are: rounds 1, 3."
    write_recorded(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["missing_rounds"] == [[1, 1], [3, 3]]


def test_a_rounds_number_costs_no_memory_and_is_its_folders(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    update = {"7": moved(model, [image])}
    for number in (1, 2, 30_000_000):
        folder = record(tmp_path / "t", model, update, {"7": 1}, number=number, lr=LR)
    tracemalloc.start()
    read = read_transcript(folder, model)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.gaps == ((3, 29_999_999),) and most < 2**25
    found = audit_transcript(folder, MODEL, changes=(BRIEF, "most=1"))
    assert remarks(found)[0] == "Not in the transcript, though later rounds are: rounds 3 to 29999999."
    (folder / "round-0002").rename(folder / "round-0003")
    with pytest.raises(DataError, match="round-0003/round.json' is of the folder 'round-0002'; one of the two"):
        read_transcript(folder, model)


def test_secrets_that_are_no_pixels_are_refused_until_it_is_said_how_they_were_normalised(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    inputs = (image[0] - 0.4) / 0.2
    folder = record(tmp_path / "t", model, {"7": moved(model, [(inputs, image[1])])}, {"7": 1}, lr=LR)
    secrets = keep(tmp_path / "s", "7", inputs, image[1])
    with pytest.raises(DataError, match=r"are no pixels in \[0, 1\], but from -.*--set mean=.*--set std="):
        audit_transcript(folder, MODEL, secrets, (BRIEF,))
    found = audit_transcript(folder, MODEL, secrets, (BRIEF, "mean=[0.4]", "std=[0.2]")).found[0]
    assert found.truth is not None and torch.allclose(found.truth, image[0], atol=1e-6)


def test_clients_without_secrets_are_remarked(tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]) -> None:
    update = moved(model, [image])
    folder = record(tmp_path / "t", model, {"7": update, "8": update}, {"7": 1, "8": 1}, lr=LR)
    secrets = keep(tmp_path / "s", "7", *image)
    said = "Not scored: round 1, client 8, of which the folder of secrets has nothing."

    def audited(*changes: str) -> Findings:
        return audit_transcript(folder, MODEL, secrets, (BRIEF, *changes))

    assert remarks(audited()) == [said] and "of 1 private images" in conclusion(audited())
    none = audited('clients=["8"]')
    assert "the folder of secrets has none of these clients" in conclusion(none)
    assert "(--secrets)" not in conclusion(none)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"local-epochs": "2"}, "epochs 2, from the recorded config"),
        ({"batch-size": "1"}, "batch size 1, from the recorded config"),
        ({"lr": "0.25"}, "learning rate 0.25, from the recorded config"),
        ({"lr": True}, "the recorded config has learning rate True, which cannot be"),
        ({"local-epochs": "two"}, "the recorded config has epochs 'two', which cannot be"),
        ({"batch-size": [1]}, "which cannot be"),
        ({}, "one epoch, which is an assumption (set it with --set epochs=...)"),
    ],
)
def test_numbers_of_a_config_may_be_text_and_what_is_no_number_is_no_number(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor], config: dict[str, Any], expected: str
) -> None:
    update = moved(model, [image])
    folder = record(tmp_path, model, {"7": update, "8": update}, {"7": 1, "8": 1}, lr=LR)
    change(folder, "7", config={"lr": LR} | config)
    found = audit_transcript(folder, MODEL, changes=(BRIEF,))
    words = [word for one in found.found if one.update.client == "7" for word in one.training.words]
    assert any(expected in word for word in (*words, *found.missing))


def test_a_terminal_wraps_names_and_cuts_none(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, number=2, lr=LR)
    arguments = ["audit", "--transcript", str(folder), "--model", MODEL, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["keyhole", *arguments, "--set", BRIEF, "--set", NOISE])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    printed = capsys.readouterr().out
    assert "…" not in printed
    head, *_ = printed.splitlines()
    start = head.index("attacker")
    column = "".join(line[start : head.index("status")].strip() for line in printed.splitlines()[1:8])
    assert "adaptive:likelihood" in column
    assert "Not in the transcript, though later rounds are: round 1." in " ".join(printed.split())
