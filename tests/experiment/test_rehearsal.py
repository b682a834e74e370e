"""What trainings would cost: counted as they are planned, and nothing left behind."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from command_line import run
from keyhole.errors import ConfigError
from keyhole.experiment.frontier import frontier
from keyhole.experiment.rehearsal import Rehearsal, rehearsal_in_words, rehearse, study_to_come
from keyhole.experiment.train import Problem
from keyhole.experiment.training_plan import TrainingPlan, parse_training
from keyhole.report.names import defense_name
from keyhole.report.write import read_audit

FILE = """
[data]
name = "digits"
target = 2
tune = 0
public = 8
candidates = 0
test = 50
train = 46

[model]
name = "lenet_zhu"

[federation]
clients = 3
rounds = 2
batch_size = 16

[[defenses]]
chain = [{ name = "prune", rate = 0.5 }]

[run]
seeds = [0, 1]

[audit]
rounds = [0, 1, 2]

[[audit.attacks]]
name = "idlg"
steps = 5

[audit.run]
samples = 2
"""


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return parse_training(tomllib.loads(FILE), "small")


@pytest.fixture(scope="module")
def found(plan: TrainingPlan) -> Rehearsal:
    return rehearse(plan, study_to_come(plan, defense_name), jobs=1)


def test_an_audit_is_rehearsed_with_all_the_trials_that_it_will_have(
    plan: TrainingPlan, found: Rehearsal, tmp_path: Path
) -> None:
    frontier(plan, tmp_path, name=defense_name, jobs=1)
    settings, outcomes = read_audit(tmp_path / "audit")
    assert found.audit is not None
    assert [one.setting for one in found.audit.settings] == [setting.name for setting in settings]
    assert sum(one.trials for one in found.audit.settings) == sum(len(setting.planned) for setting in settings)
    # Equal trials of two settings are worked on once; networks that are not there yet count as different ones.
    assert len(outcomes) == sum(one.trials for one in found.audit.settings)


def test_the_cost_is_that_of_all_clients_rounds_and_seeds(plan: TrainingPlan) -> None:
    bare, pruned = plan.defenses
    made = Rehearsal(plan, {bare: 1.0, pruned: 10.0}, test_seconds=0.5, jobs=2, audit=None)
    assert made.core_seconds(bare) == 2 * 2 * (3 * 1.0 + 0.5)
    # The guard trains the first round once more, without the defense.
    assert made.core_seconds(pruned) == 2 * (2 * (3 * 10.0 + 0.5) + 3 * 1.0)
    said = "\n".join(rehearsal_in_words(made, defense_name))
    assert "4 networks (2 defenses, 2 seeds), 2 rounds of 3 clients each" in said
    assert "In all about 71 seconds, 2 at a time (2 minutes of core time)." in said  # 7, then 64 beside 7 and 64
    assert "a few steps of each attack" not in said


@pytest.mark.parametrize(("jobs", "wall"), [(1, 2 * 7 + 2 * 64), (2, 7 + 64), (3, 7 + 64), (4, 64)])
def test_trainings_begin_in_their_order_as_workers_are_free(plan: TrainingPlan, jobs: int, wall: float) -> None:
    bare, pruned = plan.defenses
    made = Rehearsal(plan, {bare: 1.0, pruned: 10.0}, test_seconds=0.5, jobs=jobs, audit=None)
    assert made.wall_seconds == wall


def test_one_long_training_sets_the_time_of_all(plan: TrainingPlan) -> None:
    """Begun last, it has nothing beside it."""
    one = plan.model_copy(update={"run": plan.run.model_copy(update={"seeds": (0,)})})
    made = Rehearsal(one, {(): 1.0, one.defenses[1]: 100.0}, test_seconds=0.0, jobs=2, audit=None)
    assert made.wall_seconds == made.one_training(one.defenses[1]) == 2 * 300 + 3


def test_every_defense_is_timed(found: Rehearsal, plan: TrainingPlan) -> None:
    assert list(found.client_seconds) == list(plan.defenses)
    assert all(seconds > 0 for seconds in found.client_seconds.values())


def test_an_audit_that_the_file_has_not_cannot_be_rehearsed() -> None:
    bare = parse_training(tomllib.loads(FILE[: FILE.index("[audit]")]), "bare")
    with pytest.raises(ConfigError, match=r"needs an \[audit\] section"):
        study_to_come(bare, defense_name)


def test_the_command_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(FILE)
    assert run("train", "small.toml", "--dry-run") == 0
    assert "nothing has been run or written" in capsys.readouterr().out
    assert run("train", "small.toml", "--dry-run", "--backend", "flower") == 2
    assert run("frontier", "small.toml", "--dry-run", "--ray", "local") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_attacks_on_what_clients_send_are_counted_and_timed(
    plan: TrainingPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves a second at each look, ten evaluations take one."""
    raw = tomllib.loads(FILE)
    raw["audit"]["sent"] = {"clients": 2, "attacks": [{"name": "inverting_gradients", "steps": 300, "restarts": 2}]}
    own = parse_training(raw, "small")
    ticks = iter(range(10**6))
    monkeypatch.setattr("keyhole.experiment.rehearsal.time.perf_counter", lambda: float(next(ticks)))
    found = rehearse(own, study_to_come(own, defense_name), jobs=1)
    # Rounds 1 and 2 of two seeds and two clients; naive without a defense, naive and one who knows it with pruning.
    attackers, updates = 1 + 2, 2 * 2 * 2
    assert found.sent_seconds == pytest.approx(600 / 10 * attackers * updates)
    said = "\n".join(rehearsal_in_words(found, defense_name))
    assert "16 updates that clients themselves send: 24 minutes of core time, and " in said
    # Two trainings of two seeds, two rounds each: the global weights and three clients' updates, four bytes a number.
    numbers = sum(value.numel() for value in Problem(own, torch.device("cpu")).fresh((), 0).params.values())
    assert found.sent_bytes == 4 * numbers * (1 + 3) * 2 * 2 * 2
    assert rehearse(plan, jobs=1).sent_seconds == 0.0
