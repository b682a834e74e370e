"""Whole audits: resumed after a kill, in one process or two, on bad updates, and what they leave behind."""

from __future__ import annotations

import io
import json
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from keyhole.cli import KINDS, main
from keyhole.errors import StoreError
from keyhole.experiment.audit import audit
from keyhole.experiment.spec import load_experiment
from keyhole.experiment.store import Store

SMALL = ["attacks.0.steps=40", "run.samples=4"]
TINY = ["attacks.0.steps=5", "run.samples=4"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> dict[str, Any]:
    """report.json without its times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "client_seconds")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads((folder / "report.json").read_text()))


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def keyhole(*arguments: str) -> Said:
    """The command line, in this process: starting another takes longer than most of what is tested."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["keyhole", *arguments])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line replaces
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = keyhole("audit", "quick", "--out", str(folder), "--jobs", "1", *(f"--set={o}" for o in SMALL))
    assert done.returncode == 0, done.stderr
    assert "Undefended" in done.stdout
    return folder


def copy_of(whole: Path, folder: Path) -> Path:
    """The uninterrupted run, to be damaged."""
    return Path(shutil.copytree(whole, folder / "copy"))


def test_folder_holds_what_is_promised(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.toml", "outcomes.jsonl", "reconstructions", "report.html", "report.json"} <= names
    for path in whole.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, f"{path} is readable by others"
    assert not list((whole / "checkpoints").iterdir())
    report = json.loads((whole / "report.json").read_text())
    assert (report["schema"], report["kind"], report["complete"]) == (1, "update", True)
    undefended = next(r for r in report["rows"] if r["attacker"] == "naive" and r["defense"] == "none")
    assert (undefended["n"], undefended["networks"]) == (4, 1)
    assert {"value", "low", "high"} <= undefended["leak_rate"].keys()
    assert {"median", "mean", "low", "high", "q10", "q90"} <= undefended["psnr"].keys()


def test_rerun_does_nothing(whole: Path) -> None:
    before = (whole / "outcomes.jsonl").read_bytes()
    assert audit(load_experiment("quick", SMALL), whole, jobs=1)
    assert (whole / "outcomes.jsonl").read_bytes() == before


def test_report_is_rebuilt_from_the_folder_alone(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = timeless(whole)
    (whole / "report.json").unlink()
    monkeypatch.setenv("KEYHOLE_DATA", "/nonexistent")
    done = keyhole("report", str(whole))
    assert done.returncode == 0, done.stderr
    assert timeless(whole) == before


def test_two_jobs_give_the_same(whole: Path, tmp_path: Path) -> None:
    done = keyhole("audit", "quick", "--out", str(tmp_path), "--jobs", "2", *(f"--set={o}" for o in SMALL))
    assert done.returncode == 0, done.stderr
    assert timeless(tmp_path) == timeless(whole)


KILLED = """
import os, signal
from keyhole.cli import main
from keyhole.experiment.store import Store

append = Store.append

def first_only(self, outcomes):
    if self.lines.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, outcomes)

Store.append = first_only
main()
"""


def test_killed_in_the_middle_then_resumed(whole: Path, tmp_path: Path) -> None:
    """By the process itself: another may come too late."""
    command = [sys.executable, "-c", KILLED, "audit", "quick", "--out", str(tmp_path), "--jobs", "1"]
    process = subprocess.run([*command, *(f"--set={o}" for o in SMALL)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    first = {line["hash"]: line for line in lines(tmp_path)}
    assert 0 < len(first) < len(lines(whole))
    done = keyhole("audit", "quick", "--out", str(tmp_path), "--jobs", "1", *(f"--set={o}" for o in SMALL))
    assert done.returncode == 0, done.stderr
    hashes = [line["hash"] for line in lines(tmp_path)]
    assert len(hashes) == len(set(hashes)), "a trial was stored twice"
    kept = {line["hash"]: line for line in lines(tmp_path) if line["hash"] in first}
    assert kept == first, "a stored trial was done again"
    assert timeless(tmp_path) == timeless(whole)


def test_half_written_line_is_dropped_with_a_warning(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    path = folder / "outcomes.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="cut off"):
        assert audit(load_experiment("quick", SMALL), folder, jobs=1)
    assert sorted(line["hash"] for line in lines(folder)) == sorted(line["hash"] for line in lines(whole))


def test_reading_leaves_a_half_written_line_to_its_writer(whole: Path, tmp_path: Path) -> None:
    """`keyhole report` may look while an audit is in the middle of a line."""
    path = copy_of(whole, tmp_path) / "outcomes.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="cut off"):
        Store(path.parent).outcomes()
    assert path.read_bytes() == before


def test_changed_line_is_an_error(whole: Path, tmp_path: Path) -> None:
    path = copy_of(whole, tmp_path) / "outcomes.jsonl"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7', 1))
    with pytest.raises(StoreError, match="line 1 .* delete that line"):
        Store(path.parent).outcomes()


def test_pause_keeps_a_checkpoint_and_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paused at every ninth look, so in the middle of groups, the run ends where an uninterrupted one does."""
    looks, found_checkpoint = [0], False

    def ninth(deadline: float | None) -> bool:
        looks[0] += 1
        return looks[0] % 9 == 0

    monkeypatch.setattr("keyhole.experiment.work.passed", ninth)
    experiment, rounds = load_experiment("quick", SMALL), 1
    while not audit(experiment, tmp_path, jobs=1):
        rounds += 1
        found_checkpoint |= bool(list((tmp_path / "checkpoints").iterdir()))
        assert rounds < 50, "the run makes no progress"
    assert rounds > 2, "the run was not paused"
    assert found_checkpoint, "no group was paused in the middle"
    done = keyhole("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert timeless(tmp_path) == timeless(whole)


def test_seconds_end_with_their_own_code(tmp_path: Path) -> None:
    done = keyhole("audit", "quick", "--out", str(tmp_path), "--jobs", "1", "--seconds", "0.001")
    assert done.returncode == 3, done.stderr
    assert "goes on" in done.stderr


def test_another_experiments_folder(whole: Path) -> None:
    with pytest.raises(StoreError, match="another experiment"):
        audit(load_experiment("quick", [*SMALL, "run.seeds=[5]"]), whole)


def test_folder_in_use(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(StoreError, match="another audit or training is running"), Store(tmp_path):
        pass


def test_images_none_stores_no_picture(tmp_path: Path) -> None:
    assert audit(load_experiment("quick", [*TINY, "run.images=none"]), tmp_path, jobs=1)
    assert not list((tmp_path / "reconstructions").iterdir())


def test_weights_that_are_not_finite_are_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A non-finite update ends its trials as diverged; the audit goes on to the end."""
    from keyhole.experiment import run

    see = run._see

    def broken(*arguments: Any) -> Any:
        observations, notes = see(*arguments)
        for tensor in observations[0].update.values():
            tensor[1] = float("nan")
        return observations, notes

    monkeypatch.setattr(run, "_see", broken)
    assert audit(load_experiment("quick", TINY), tmp_path, jobs=1)
    naive = [line for line in lines(tmp_path) if line["trial"]["attacker"] == "naive" and not line["trial"]["defense"]]
    assert [line["status"] == "diverged" for line in naive] == [False, True, False, False]
    assert "not finite" in naive[1]["detail"]


def test_a_crash_is_a_failed_trial_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyhole.experiment import run

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("something broke")

    monkeypatch.setattr(run, "solve", broken)
    assert audit(load_experiment("quick", TINY), tmp_path, jobs=1)
    naive = [line for line in lines(tmp_path) if line["trial"]["attacker"] == "naive"]
    assert {line["status"] for line in naive} == {"failed"}
    assert "something broke" in naive[0]["detail"]


def test_one_thread_is_restored(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert audit(load_experiment("quick", TINY), tmp_path, jobs=1)
    assert torch.get_num_threads() == before


def test_every_kind_is_listed() -> None:
    done = keyhole("list", "--json")
    listed = json.loads(done.stdout)
    assert {*KINDS, "presets"} == listed.keys()
    assert [card["name"] for card in listed["attacks"]] == [card.name for card in KINDS["attacks"]]
