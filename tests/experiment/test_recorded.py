from __future__ import annotations

import json
import math
import stat
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_case import LR, MODEL, QUICK, Small, keep, moved, record
from torch import Tensor

from keyhole.errors import ConfigError, DataError, UnknownName
from keyhole.experiment import recorded_work
from keyhole.experiment.recorded import audit_transcript
from keyhole.experiment.transcript import as_json, round_folder
from keyhole.metrics.image import structural_similarity
from keyhole.report.recorded import leaks, write_recorded


@pytest.fixture
def model() -> Small:
    torch.manual_seed(3)
    return Small()


@pytest.fixture
def image() -> tuple[Tensor, Tensor]:
    return torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2])


def test_an_image_comes_back_from_transcript_and_model_alone(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    told = {"lr": LR, "local-epochs": 1, "batch-size": 1}
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, **told)
    (finding,) = audit_transcript(folder, MODEL, changes=(QUICK,)).found
    (attempt,) = finding.attempts
    assert float(structural_similarity(attempt.guesses, image[0])) > 0.95
    assert attempt.labels == (2,)
    assert attempt.score < 1e-3
    assert not attempt.metrics and not leaks(attempt)
    assert finding.verdict == "likely recoverable"
    assert finding.training.words[1] == "learning rate 0.3, from the recorded config"


def test_scores_come_from_the_secrets_and_nothing_else_does(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, lr=LR)
    other = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    right = audit_transcript(folder, MODEL, keep(tmp_path / "right", "7", *image), (QUICK,)).found[0].attempts[0]
    wrong = audit_transcript(folder, MODEL, keep(tmp_path / "wrong", "7", other, image[1]), (QUICK,)).found[0]
    assert torch.equal(right.guesses, wrong.attempts[0].guesses)
    assert right.score == wrong.attempts[0].score
    assert right.metrics["ssim"][0] > 0.95 and leaks(right) == [True]
    assert right.metrics["label_accuracy"] == [1.0]
    assert right.control["ssim"][0] < 0.5
    assert leaks(wrong.attempts[0]) == [False]


def test_the_learning_rate_is_estimated_where_nobody_says_it(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1})
    matching = 'attacks=[{name="inverting_gradients",steps=600,restarts=1,tv=0.0}]'
    finding = audit_transcript(folder, MODEL, changes=(matching,)).found[0]
    assert not finding.training.scale_known
    assert finding.training.rule.lr == pytest.approx(LR, rel=0.2)
    assert float(structural_similarity(finding.attempts[0].guesses, image[0])) > 0.9
    given = audit_transcript(folder, MODEL, changes=(QUICK, "lr=0.25")).found[0].training
    assert given.rule.lr == 0.25 and given.scale_known
    quick = tuple({**options, "steps": 2, "restarts": 1} for options in recorded_work.ONE_STEP)
    monkeypatch.setattr(recorded_work, "ONE_STEP", quick)
    # By default only an attack that does not mind the scale is tried.
    names = [a.attack for a in audit_transcript(folder, MODEL, changes=("images=1",)).found[0].attempts]
    assert names == ["inverting_gradients"]


def test_under_secure_aggregation_the_sum_is_one_update_of_all_images(tmp_path: Path, model: Small) -> None:
    """Weighted by images, one step of each client is one step on all images: checked with torch's own optimizer."""
    made = torch.Generator().manual_seed(5)
    images, labels = torch.rand(4, 1, 8, 8, generator=made), torch.tensor([0, 1, 2, 3])
    parts = {"1": (images[:1], labels[:1]), "2": (images[1:], labels[1:])}
    updates = {client: moved(model, [part]) for client, part in parts.items()}
    folder = record(tmp_path / "t", model, updates, {"1": 1, "2": 3}, lr=LR)
    for client, part in parts.items():
        keep(tmp_path / "s", client, *part)
    found = audit_transcript(folder, MODEL, tmp_path / "s", ("sum=true", 'attacks=[{name="idlg",steps=20}]'))
    (finding,) = found.found
    expected = moved(model, [(images, labels)])
    for name, value in finding.update.update.items():
        assert torch.allclose(value, expected[name], atol=1e-7)
    assert finding.training.images == 4 and finding.training.steps == 1
    assert finding.update.client == "sum of 2"
    assert torch.equal(finding.truth, images)  # type: ignore[arg-type]


def test_several_steps_are_taken_for_what_they_are(tmp_path: Path, model: Small) -> None:
    made = torch.Generator().manual_seed(5)
    images, labels = torch.rand(4, 1, 8, 8, generator=made), torch.tensor([0, 1, 2, 3])
    steps = [(images[:2], labels[:2]), (images[2:], labels[2:])] * 2
    told = {"lr": LR, "epochs": 2, "batch_size": 2}
    folder = record(tmp_path / "t", model, {"7": moved(model, steps)}, {"7": 4}, **told)
    finding = audit_transcript(folder, MODEL, changes=('attacks=[{name="idlg",steps=20}]',)).found[0]
    assert finding.training.steps == 4 and finding.training.rule.order == "shuffled"
    assert finding.verdict != "likely recoverable"
    assert len(finding.attempts[0].guesses) == 4


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "known", "expected"),
    [
        (1, 1, 1, {}, (1, 1, 1)),
        (1, 1, 3, {}, (3, 1, 3)),
        (2, 1, 1, {"epochs": 1}, (2, 1, 1)),
        (2, 1, 2, {"batch-size": 1}, (4, 1, 2)),
        (2, 2, 2, {}, (2, 2, 2)),
    ],
)
def test_steps_are_estimated_where_the_learning_rate_is_known_and_they_are_not(
    tmp_path: Path, model: Small, count: int, batch: int, epochs: int, known: dict[str, int], expected: tuple[int, ...]
) -> None:
    """Steps, batch size and epochs of a client that says none of them, or one."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    parts = list(zip(images.split(batch), torch.tensor([0, 1])[:count].split(batch), strict=True))
    update = moved(model, parts * epochs, lr=0.005)
    folder = record(tmp_path / "t", model, {"7": update}, {"7": count}, lr=0.005, **known)
    found = audit_transcript(folder, MODEL, changes=('attacks=[{name="idlg",steps=2}]',)).found[0].training
    assert (found.steps, found.rule.batch_size, found.rule.epochs) == expected
    assert any("estimated from the last layer's length" in word for word in found.words) == (expected[0] > 1)
    given = audit_transcript(folder, MODEL, changes=('attacks=[{name="idlg",steps=2}]', "epochs=1", "batch_size=2"))
    assert given.found[0].training.steps == 1
    # Noise is not taken for length.
    update |= {"head.bias": update["head.bias"] + torch.tensor([0.01, 0.02, -0.005, 0.01])}
    noised = record(tmp_path / "noised", model, {"7": update}, {"7": count}, lr=0.005)
    words = audit_transcript(noised, MODEL, changes=('attacks=[{name="idlg",steps=2}]',)).found[0].training.words
    assert "one epoch, which is an assumption (set it with --set epochs=...)" in words
    # A network that prefers a class says nothing of it, and then one step is assumed.
    with torch.no_grad():
        model.head.bias[0] += 2.0
    sure = record(tmp_path / "sure", model, {"7": moved(model, parts * epochs, lr=0.005)}, {"7": count}, lr=0.005)
    words = audit_transcript(sure, MODEL, changes=('attacks=[{name="idlg",steps=2}]',)).found[0].training.words
    assert "one epoch, which is an assumption (set it with --set epochs=...)" in words


def test_an_attacker_who_knows_the_defense_tries_its_counters(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    half = {n: u * (torch.arange(u.numel()).reshape(u.shape) % 2) for n, u in moved(model, [image]).items()}
    folder = record(tmp_path / "t", model, {"7": half}, {"7": 1}, lr=LR)
    secrets = keep(tmp_path / "s", "7", *image)
    changes = (QUICK, 'defense=[{name="random_masking",rate=0.5}]')
    naive, adaptive = audit_transcript(folder, MODEL, secrets, changes).found[0].attempts
    assert (naive.attacker, adaptive.attacker.partition(":")[0]) == ("naive", "adaptive")
    assert adaptive.metrics["ssim"][0] > 0.9 > naive.metrics["ssim"][0]


def test_a_counter_with_a_second_attack_inverts_the_features_of_what_was_found(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    """The features of its images are nearly those of the client's image, worked out with the model itself."""
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, lr=LR)
    attack = 'attacks=[{name="inverting_gradients",steps=400,restarts=1,tv=0.0}]'
    findings = audit_transcript(
        folder, MODEL, keep(tmp_path / "s", "7", *image), (attack, 'defense=[{name="obscuring"}]')
    )
    naive, _, second = findings.found[0].attempts
    assert second.attacker == "adaptive:feature_inversion" and second.status != "refused"
    assert second.evaluations > naive.evaluations and second.labels == naive.labels
    features = [torch.sigmoid(model.conv(x)) for x in (second.guesses, image[0], torch.full_like(image[0], 0.5))]
    assert (features[0] - features[1]).norm() < 0.5 * (features[2] - features[1]).norm()
    assert not torch.allclose(second.guesses, naive.guesses, atol=0.01), "the second attack prefers smooth images"
    # Its score is a distance of features, and says nothing of the update.
    assert math.isnan(second.score)
    write_recorded(findings, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["updates"][0]["attacks"][2]["explains_update"]
    assert "It began at gray" in (tmp_path / "out" / "report.md").read_text()


def test_attackers_that_need_more_than_a_transcript_has_are_refused_with_the_reason(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, lr=LR)
    wanted = 'attacks=[{name="inverting_gradients",steps=2,restarts=1,start="mean"}]'
    findings = audit_transcript(folder, MODEL, changes=(wanted, 'defense=[{name="concealing"}]'))
    naive, told, _ = findings.found[0].attempts
    assert naive.status == "refused" and "start = 'mean' needs public images" in naive.detail
    assert "it needs hints, which a transcript does not hold" in told.detail
    write_recorded(findings, tmp_path / "out")
    for file in ("report.md", "report.html"):
        text = (tmp_path / "out" / file).read_text()
        assert "needs public images" in text and "needs hints" in text


def test_counters_are_told_how_many_images_there_are_and_explain_one_step(tmp_path: Path, model: Small) -> None:
    made = torch.Generator().manual_seed(5)
    batch = (torch.rand(2, 1, 8, 8, generator=made), torch.tensor([0, 1]))
    changes = ('attacks=[{name="inverting_gradients",steps=2,restarts=1}]', 'defense=[{name="concealing"}]')
    one = record(tmp_path / "one", model, {"7": moved(model, [batch])}, {"7": 2}, lr=LR)
    found = audit_transcript(one, MODEL, changes=changes).found[0].attempts[2]
    assert found.attacker == "adaptive:labels_found" and found.status == "budget" and len(found.guesses) == 2
    two = record(tmp_path / "two", model, {"7": moved(model, [batch, batch])}, {"7": 2}, lr=LR, epochs=2)
    refused = audit_transcript(two, MODEL, changes=changes).found[0].attempts[2]
    assert refused.status == "refused" and "can only explain an update of one gradient" in refused.detail


@pytest.mark.parametrize(
    ("examples", "config", "said"),
    [
        (0, {}, "it says that it trained on 0 images"),
        (-3, {}, "it says that it trained on -3 images"),
        (1.5, {}, "it says that it trained on 1.5 images"),
        (math.inf, {}, "it says that it trained on inf images"),
        ("many", {}, "it says that it trained on 'many' images"),
        (10**9, {}, "1000000000 images and 1 steps are behind the update; up to 10000"),
        (10**400, {}, "it says that it trained on 1000"),
        (1, {"local-epochs": 10**9}, "1 images and 1000000000 steps"),
        (4, {"batch-size": 0.5}, "batch size 0.5, which cannot be"),
        (4, {"batch-size": -1}, "batch size -1, which cannot be"),
        (4, {"epochs": 0.5}, "epochs 0.5, which cannot be"),
        (1, {"lr": math.inf}, "learning rate inf, which cannot be"),
        (1, {"lr": 10**400}, "learning rate 1000"),
    ],
    ids=count(),
)
def test_a_client_of_whom_nonsense_is_recorded_keeps_no_other_from_being_audited(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor], examples: Any, config: dict[str, Any], said: str
) -> None:
    update = moved(model, [image])
    folder = record(tmp_path / "t", model, {"7": update, "8": update}, {"7": examples, "8": 1}, lr=LR)
    place = folder / round_folder(1) / "round.json"
    told = json.loads(place.read_text())
    told["clients"][0]["config"] |= config
    place.write_bytes(as_json(told))
    quick = 'attacks=[{name="idlg",steps=2}]'
    findings = audit_transcript(folder, MODEL, changes=(quick, "most=1"))
    assert [one.update.client for one in findings.found] == ["8"]
    (missing,) = findings.missing
    assert missing.startswith("round 1, client 7: ") and said in missing
    write_recorded(findings, tmp_path / "out")
    assert f"Not attacked: {missing[:40]}" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises((DataError, ConfigError), match="can be attacked|no update of a complete round"):
        audit_transcript(folder, MODEL, changes=(quick, 'clients=["7"]'))


def test_what_is_given_stands_for_nonsense_that_was_recorded(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 10**9}, lr=LR, epochs=-2)
    given = ('attacks=[{name="idlg",steps=2}]', "images=1", "epochs=1")
    assert audit_transcript(folder, MODEL, changes=given).found[0].training.images == 1


def test_files_that_cannot_be_computed_with_or_are_nested_without_end_are_said_in_a_sentence(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]
) -> None:
    small = {name: value.to(torch.float8_e4m3fn) for name, value in moved(model, [image]).items()}
    with pytest.raises(DataError, match="is of type torch.float8_e4m3fn, which is not read"):
        audit_transcript(record(tmp_path / "small", model, {"7": small}, {"7": 1}), MODEL)
    for name in ("transcript.json", f"{round_folder(1)}/round.json"):
        folder = record(tmp_path / name[0], model, {"7": moved(model, [image])}, {"7": 1})
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(DataError, match="is damaged or cut short"):
            audit_transcript(folder, MODEL)


def test_the_report_says_what_was_found(tmp_path: Path, model: Small, image: tuple[Tensor, Tensor]) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, lr=LR)
    findings = audit_transcript(folder, MODEL, keep(tmp_path / "s", "7", *image), (QUICK,))
    page = write_recorded(findings, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kind"] == "transcript"
    (update,) = report["updates"]
    assert update["attacks"][0]["leak_rate"] == 1.0 and update["attacks"][0]["explains_update"]
    assert "1 of 1 private images leaked" in page.read_text()
    assert "| 1 | 7 | 1 | 1 | likely recoverable | idlg |" in (tmp_path / "out" / "report.md").read_text()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        (("shapes=[1,8,8]",), UnknownName, "unknown key 'shapes'"),
        (("lr=-1.0",), ConfigError, "lr"),
        (("rounds=[9]",), ConfigError, "no recorded update"),
        (('attacks=[{name="nothing"}]',), UnknownName, "nothing"),
        (("shape=[1,4,4]",), DataError, "too small"),
        (("shape=[1,16,16]",), Exception, "does not accept inputs"),
        (("mean=[0.5,0.5]",), ConfigError, "one number for each channel"),
        (("images=2",), None, ""),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    tmp_path: Path, model: Small, image: tuple[Tensor, Tensor], changes: tuple[str, ...], kind: Any, said: str
) -> None:
    folder = record(tmp_path / "t", model, {"7": moved(model, [image])}, {"7": 1}, lr=LR)
    secrets = keep(tmp_path / "s", "7", image[0].repeat(3, 1, 1, 1), image[1].repeat(3))
    if kind is None:
        with pytest.raises(DataError, match="say how many there are with --set images=3"):
            audit_transcript(folder, MODEL, secrets, (*changes, 'attacks=[{name="idlg",steps=2}]'))
        return
    with pytest.raises(kind, match=said):
        audit_transcript(folder, MODEL, None, changes)
