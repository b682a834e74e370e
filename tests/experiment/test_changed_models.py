"""Defenses that change the model: their networks are trained, kept, resumed and audited with what they added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keyhole.errors import ModelError
from keyhole.experiment.frontier import study_of
from keyhole.experiment.plan import build_defense
from keyhole.experiment.setup import prepare
from keyhole.experiment.spec import parse_experiment
from keyhole.experiment.train import Trained, train
from keyhole.experiment.training_plan import TrainingPlan, parse_training

CPU = torch.device("cpu")
MID = {"name": "mid", "beta": 0.001}


def plan_of(*links: dict[str, Any], **federation: Any) -> TrainingPlan:
    return parse_training({
        "data": {
            "name": "digits", "target": 4, "tune": 0, "public": 8, "candidates": 0, "test": 60, "train": 62,
        },
        "model": {"name": "lenet_zhu", "activation": "relu", "init": "default"},
        "federation": {"clients": 3, "rounds": 2, "batch_size": 16, **federation},
        "defenses": [{"chain": [link]} for link in links],
        "audit": {"rounds": [0, 2], "attacks": [{"name": "idlg", "steps": 2}], "run": {"samples": 1}},
    })  # fmt: skip


def whole(run: Trained) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(len(run.rounds) - 1))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingPlan, list[Trained], Path]:
    plan, folder = plan_of(MID), tmp_path_factory.mktemp("trained")
    return plan, train(plan, folder), folder


def test_a_checkpoint_has_what_was_added_and_not_what_was_dropped(done: Any) -> None:
    bare, mid = done[1]
    added = {f"head.{layer}.{leaf}" for layer in ("encode", "head") for leaf in ("weight", "bias")}
    assert whole(mid).keys() == whole(bare).keys() - {"head.weight", "head.bias"} | added
    assert all(bool(value.isfinite().all()) for value in whole(mid).values())
    before = load_file(mid.checkpoint(0))
    assert torch.equal(before["conv1.weight"], load_file(bare.checkpoint(0))["conv1.weight"])
    assert not any(torch.equal(before[name], value) for name, value in whole(mid).items())
    assert mid.changed == 1


def test_an_interrupted_training_ends_as_a_whole_one(done: Any, tmp_path: Path) -> None:
    def stop(what: str, fraction: float) -> None:
        if "mid" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(done[0], tmp_path, told=stop)
    told: list[str] = []
    again = train(done[0], tmp_path, told=lambda what, fraction: told.append(f"{what} {fraction:.1f}"))
    assert told == ["training 01-mid, seed 0 1.0"]
    assert all(torch.equal(value, whole(again[1])[name]) for name, value in whole(done[1][1]).items())


def test_an_audit_attacks_the_network_that_was_trained(done: Any) -> None:
    plan, runs, folder = done
    settings = study_of(plan, runs, folder, lambda specs: "+".join(spec.name for spec in specs) or "none").experiments
    for experiment in settings:
        setup = prepare(experiment, CPU)
        changed = experiment.setting == "mid, round 2"
        assert setup.task.draws == (("head.sample",) if changed else ())
        trained = whole(runs[1] if changed else runs[0])
        if experiment.setting.endswith("round 2"):
            (weights,) = setup.weights[0]
            assert weights.params.keys() == trained.keys()
            assert all(torch.equal(weights.params[name], value) for name, value in trained.items())
        for specs in experiment.defenses:
            task = build_defense(specs).on_task(setup.task)
            assert bool(task.draws) == (changed or bool(specs))
            assert (task is setup.task) == (changed or not specs)


def test_a_file_of_another_network_is_still_refused(done: Any, tmp_path: Path) -> None:
    audit = {
        "data": {"name": "digits", "target": 4, "tune": 0, "public": 8, "candidates": 0},
        "model": {"name": "lenet_zhu", "activation": "relu", "init": "default"},
        "attacks": [{"name": "idlg", "steps": 2}],
        "run": {"samples": 1},
    }
    mid, bare = (run.checkpoint(2) for run in reversed(done[1]))

    def load(state: Path, *links: dict[str, Any]) -> Any:
        defenses = [{"chain": [link]} for link in links]
        return prepare(parse_experiment({**audit, "state": {"train": str(state)}, "defenses": defenses}), CPU)

    for links in ((), ({"name": "clip"},), ({**MID, "width": 5},)):
        with pytest.raises(ModelError, match="lacks 'head.bias'.*another model"):
            load(mid, *links)
    assert load(mid, {"name": "clip"}, MID).task.draws == ("head.sample",)
    assert load(bare, MID).task.draws == ()
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "none.safetensors", MID)
