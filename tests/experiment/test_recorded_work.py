"""Attacks on recorded updates are kept: what is done is not done twice, and side by side comes out as one by one."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_case import LR, MODEL, Small, keep, moved, record
from torch import Tensor, nn

from keyhole.errors import ConfigError, ModelError, StoreError
from keyhole.experiment import recorded_work
from keyhole.experiment.recorded import Findings, audit_transcript
from keyhole.experiment.recorded_attack import Attempt
from keyhole.experiment.store import Store
from keyhole.solve.drive import Watch

BRIEF = 'attacks=[{name="idlg",steps=30,restarts=1},{name="inverting_gradients",steps=30,restarts=1}]'


def pictures(count: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [(torch.rand(1, 1, 8, 8, generator=random), torch.tensor([i % 4])) for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clients with an image each, and their secrets."""
    torch.manual_seed(3)
    model = Small()
    one, two = pictures(2)
    updates = {"7": moved(model, [one]), "8": moved(model, [two])}
    keep(tmp_path / "s", "7", *one)
    keep(tmp_path / "s", "8", *two)
    record(tmp_path / "t", model, updates, {"7": 1, "8": 1}, lr=LR)
    return tmp_path


def run(folder: Path, *changes: str, out: str | None = "out", secrets: str = "s", **how: Any) -> Findings:
    place = None if out is None else folder / out
    return audit_transcript(folder / "t", MODEL, folder / secrets, (BRIEF, *changes), out=place, **how)


def same(one: Findings, two: Findings) -> None:
    assert [f.update.name for f in one.found] == [f.update.name for f in two.found]
    for a, b in zip(one.found, two.found, strict=True):
        assert (a.verdict, a.reasons, a.training) == (b.verdict, b.reasons, b.training)
        assert torch.equal(a.truth, b.truth)  # type: ignore[arg-type]
        for first, second in zip(a.attempts, b.attempts, strict=True):
            told = [{k: v for k, v in vars(x).items() if k != "guesses"} for x in (first, second)]
            assert told[0] == told[1] and torch.equal(first.guesses, second.guesses)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which update and attack were run."""
    done: list[tuple[str, str]] = []
    real = recorded_work.attempt

    def attempt(task: Any, one: Any, training: Any, name: str, *rest: Any) -> Attempt:
        done.append((one.client, name))
        return real(task, one, training, name, *rest)

    monkeypatch.setattr(recorded_work, "attempt", attempt)
    return done


def test_side_by_side_kept_and_read_again_is_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(folder, out=None)
    together = run(folder, jobs=2)
    same(alone, together)
    done = counted(monkeypatch)
    same(together, run(folder))
    assert not done
    files = sorted((folder / "out" / "updates").iterdir())
    assert [path.name[:-21] for path in files] == ["round-0001-client-7", "round-0001-client-8"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


def test_an_attack_that_was_cut_off_goes_on_and_those_before_it_are_not_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, out=None)
    real = recorded_work.attempt

    def cut(task: Any, one: Any, training: Any, name: str, *rest: Any) -> Attempt:
        *rest, watch = rest
        if (one.client, name) != ("8", "inverting_gradients"):
            return real(task, one, training, name, *rest, watch)
        monkeypatch.setattr("keyhole.solve.drive.CHECKPOINT_SECONDS", 0.0)

        def progress(fraction: float) -> None:
            if any(watch.checkpoint.parent.iterdir()):
                raise KeyboardInterrupt

        return real(task, one, training, name, *rest, Watch(watch.limit, watch.checkpoint, progress))

    monkeypatch.setattr(recorded_work, "attempt", cut)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    (checkpoint,) = (folder / "out" / "updates" / "checkpoints").iterdir()
    monkeypatch.setattr(recorded_work, "attempt", real)
    done, fractions = counted(monkeypatch), list[tuple[str, float]]()
    same(whole, run(folder, told=lambda what, fraction: fractions.append((what, fraction))))
    assert done == [("8", "inverting_gradients")]
    # Two attacks, and a third of the second was done.
    going = [fraction for what, fraction in fractions if what == "attacking round-0001-client-8"]
    assert going[0] > 0.75 and going[-1] == 1.0
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        (["seed=1"], 4),
        (['defense=[{name="prune",rate=0.5}]'], 8),
        (["images=2"], 4),
        (['clients=["8"]'], 0),
    ],
)
def test_what_is_known_otherwise_is_attacked_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], again: int
) -> None:
    run(folder)
    done = counted(monkeypatch)
    run(folder, *changes)
    assert len(done) == again


def test_other_secrets_or_updates_are_not_taken_for_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(folder)
    other = pictures(3)[2]
    for client in "78":
        keep(folder / "other", client, *other)
    done = counted(monkeypatch)
    after = run(folder, secrets="other")
    assert len(done) == 4
    assert before.found[0].attempts[0].metrics["ssim"] != after.found[0].attempts[0].metrics["ssim"]
    assert torch.equal(before.found[0].attempts[0].guesses, after.found[0].attempts[0].guesses)


def test_two_transcripts_in_one_folder_keep_what_is_found_of_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model = Small()
    record(folder / "t2", model, {"7": moved(model, [pictures(3)[2]])}, {"7": 1}, lr=LR)
    run(folder)
    audit_transcript(folder / "t2", MODEL, changes=(BRIEF,), out=folder / "out")
    done = counted(monkeypatch)
    run(folder)
    assert not done


class Normed(nn.Module):
    """With BatchNorm of this momentum, from which the batch's statistics follow, and dropout of this rate."""

    momentum, rate, input_shape = 0.1, 0.0, (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1, momentum=self.momentum), nn.Dropout(self.rate)
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.drop(self.norm(images).flatten(1)))
        return hidden


class Slower(Normed):
    momentum = 0.3


class Dropping(Normed):
    rate = 0.5


def test_a_model_that_is_another_in_what_weights_do_not_say_is_attacked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model = Normed()
    update = {name: 0.1 * torch.randn_like(v) for name, v in model.state_dict().items() if v.is_floating_point()}
    folder = record(tmp_path / "t", model, {"7": update}, {"7": 4}, lr=LR, epochs=1)
    done = counted(monkeypatch)
    brief = 'attacks=[{name="inverting_gradients",steps=2,restarts=1}]'
    for kind, changes in (
        ("Normed", ()), ("Slower", ()), ("Dropping", ()), ("Normed", ("mean=[0.1307]", "std=[1.0]")),
        ("Normed", ("mean=[0.13072]", "std=[1.0]")),
    ):  # fmt: skip
        known = (brief, "batchnorm=train_shared", "dropout=active", "shape=[1,8,8]", *changes)
        for _ in range(2):
            audit_transcript(folder, f"{__name__}:{kind}", changes=known, out=tmp_path / "out")
    assert len(done) == 5


def test_a_damaged_file_is_told_and_done_again(folder: Path) -> None:
    whole = run(folder)
    (path,) = (folder / "out" / "updates").glob("round-0001-client-7-*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="client-7-[0-9a-f]{8}.safetensors is damaged .* attacked anew"):
        same(whole, run(folder))


def test_wrong_input_leaves_nothing_and_a_folder_in_use_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="steps"):
        audit_transcript(folder / "t", MODEL, changes=('attacks=[{name="idlg",steps=0}]',), out=folder / "out")
    assert not (folder / "out").exists()
    with Store(folder / "out"), pytest.raises(StoreError, match="another audit or training is running"):
        run(folder)


def test_names_of_clients_cannot_leave_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Small()
    picture = pictures(1)[0]
    record(tmp_path / "t", model, {"7": moved(model, [picture])}, {"7": 1}, lr=LR)
    place = tmp_path / "t" / "round-0001" / "round.json"
    place.write_text(place.read_text().replace('"client": "7"', '"client": "../../7"'))
    found = audit_transcript(tmp_path / "t", MODEL, changes=(BRIEF,), out=tmp_path / "out")
    assert found.found[0].update.client == "../../7"
    assert [path.name[:20] for path in (tmp_path / "out" / "updates").iterdir()] == ["round-0001-client-7-"]


def test_the_output_folder_must_be_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out, said in (("t", "is what is audited"), ("s", "is what is audited")):
        with pytest.raises(StoreError, match=said):
            run(folder, out=out)
    (folder / "other").mkdir()
    (folder / "other" / "config.toml").write_text("")
    with pytest.raises(StoreError, match="holds something else than the audit of a transcript"):
        run(folder, out="other")
    monkeypatch.chdir(folder)
    with pytest.raises(StoreError, match="holds something else than the audit of a transcript"):
        audit_transcript(folder / "t", MODEL, changes=(BRIEF,), out=Path("other"))
    (folder / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to the output folder"):
        run(folder, out="file")


def test_parameters_that_did_not_move_are_not_expected_to(tmp_path: Path) -> None:
    """As those of layers that clients freeze: attacked as if they had moved, nothing explains the update."""
    torch.manual_seed(3)
    model = Small()
    picture = pictures(1)[0]
    update = moved(model, [picture])
    for name in ("conv.weight", "conv.bias"):
        update[name] = torch.zeros_like(update[name])
    folder = record(tmp_path / "t", model, {"7": update}, {"7": 1}, lr=LR)
    long = 'attacks=[{name="idlg",steps=200}]'
    (finding,) = audit_transcript(folder, MODEL, keep(tmp_path / "s", "7", *picture), (long,)).found
    naive, adaptive = finding.attempts
    assert (naive.attacker, adaptive.attacker) == ("naive", "adaptive:survivors")
    assert adaptive.score < 1e-3 < naive.score
    assert adaptive.metrics["ssim"][0] > 0.95 and adaptive.explains
    assert "2 of 4 parameters did not move ('conv.weight'), as frozen ones do not" in finding.training.words
    assert not any("use withhold" in reason.text for reason in finding.reasons), "nobody said that they do"
    # What the user says of the defense stands.
    said = (long, 'defense=[{name="clip",norm=1000.0}]')
    assert all(
        a.attacker != "adaptive:survivors" for a in audit_transcript(folder, MODEL, changes=said).found[0].attempts
    )


class Branching(Small):
    """Decides by a value, which cannot be lifted."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if images.sum() > 0 else super().forward(-images)


@pytest.mark.parametrize(
    ("model", "changes", "kind", "said"),
    [
        (f"{__name__}:Branching", (), ModelError, "no branch on values"),
        (MODEL, ("std=[0.5]",), ConfigError, "std was given without mean"),
        ("lenet_zhu", ("shape=[1,8,8]",), ConfigError, r"--set shape=\[1,28,28\] and --set classes=10"),
    ],
)
def test_a_model_that_cannot_be_attacked_is_refused(
    folder: Path, model: str, changes: tuple[str, ...], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        audit_transcript(folder / "t", model, changes=(BRIEF, *changes), out=folder / "out")
    assert not (folder / "out").exists()
