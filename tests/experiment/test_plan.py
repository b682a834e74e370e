"""The plan is a function of the experiment; tuning looks at the tune pool alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keyhole.core.trial import Outcome
from keyhole.experiment.plan import choose, plan, plan_tuning
from keyhole.experiment.setup import Setup, prepare
from keyhole.experiment.spec import Experiment, load_experiment

OVERRIDES = ["attacks.0.tune={tv = [0.0, 0.01]}", "run.seeds=[0, 1]", "run.group=3"]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment("quick", OVERRIDES)


@pytest.fixture(scope="module")
def setup(experiment: Experiment) -> Setup:
    return prepare(experiment, torch.device("cpu"))


def test_every_attacker_has_its_trials(experiment: Experiment, setup: Setup) -> None:
    trials = [t for g in plan(experiment, setup, choose(experiment, setup, [])) for t in (*g.trials, *g.others)]
    assert len({t.hash for t in trials}) == len(trials)
    tally: dict[tuple[bool, str], int] = {}
    for trial in trials:
        key = (bool(trial.defense), trial.attacker)
        tally[key] = tally.get(key, 0) + 1
    everyone = 8  # 4 images on 2 networks
    assert tally == {
        (False, "naive"): everyone,
        (False, "control:prior_only"): everyone,
        (False, "control:other_client"): everyone,
        (False, "control:class_mean"): everyone,
        (False, "check:truth"): everyone,
        (True, "naive"): everyone,
        (True, "adaptive:survivors"): everyone,
        (True, "control:prior_only"): everyone,
        (True, "control:other_client"): everyone,
        (True, "check:truth"): everyone,
    }


def test_the_attack_on_noise_does_without_the_statistics_that_clients_send(
    experiment: Experiment, setup: Setup
) -> None:
    """So that an audit finished with them is not taken for one without; all other trials are as they were."""
    model = experiment.model.model_copy(update={"batchnorm": "train_shared"})
    shared = experiment.model_copy(update={"model": model})
    seen = {
        (sent, trial.attacker): trial.sees
        for sent, one in ((False, experiment), (True, shared))
        for group in plan(one, setup, choose(one, setup, []))
        for trial in (*group.trials, *group.others)
    }
    assert {attacker for _, attacker in seen} > {"naive", "control:prior_only", "control:other_client"}
    for (sent, attacker), sees in seen.items():
        given = sent and attacker != "control:prior_only"
        assert sees == (("statistics", *experiment.sees) if given else experiment.sees)


def test_groups_hold_one_network_and_never_more_than_the_size(experiment: Experiment, setup: Setup) -> None:
    for group in plan(experiment, setup, choose(experiment, setup, [])):
        assert len({(t.seed, t.attacker, t.defense, t.attack) for t in group.trials}) == 1
        # Of 4 trials in groups of 3 the last would be alone; where it needs a neighbour it joins the others.
        assert len(group.trials) <= 3 or (group.others and len(group.trials) == 4)


def test_tuning_gives_every_attacker_the_same_grid(experiment: Experiment, setup: Setup) -> None:
    groups = plan_tuning(experiment, setup)
    assert all(t.pool == "tune" and t.seed == 0 for g in groups for t in g.trials)
    tried: dict[str, set[float]] = {}
    for group in groups:
        tried.setdefault(group.trials[0].attacker, set()).add(group.trials[0].attack.asdict()["tv"])
    assert tried == {"naive": {0.0, 0.01}, "adaptive:survivors": {0.0, 0.01}}


def test_the_best_on_the_tune_pool_is_chosen(experiment: Experiment, setup: Setup) -> None:
    def score(defended: bool, tv: float) -> float:
        return {(False, 0.0): 0.9, (False, 0.01): 0.5, (True, 0.0): 0.2, (True, 0.01): 0.8}[defended, tv]

    outcomes = [
        Outcome(t, "converged", {"ssim": [score(bool(t.defense), t.attack.asdict()["tv"])]}, 0.0, 1)
        for g in plan_tuning(experiment, setup)
        for t in g.trials
    ]
    masked = experiment.defenses[1]
    chosen = choose(experiment, setup, outcomes)
    assert chosen((), 0, "naive").asdict()["tv"] == 0.0
    assert chosen(masked, 0, "adaptive:survivors").asdict()["tv"] == 0.01
    assert chosen(masked, 0, "naive").asdict()["tv"] == 0.0  # unaware of the mask: tuned undefended
    # What was scored on the target pool must not sway the choice.
    leaked = [replace(o, trial=replace(o.trial, pool="target"), metrics={"ssim": [1.0]}) for o in outcomes]
    swayed = choose(experiment, setup, [*outcomes, *leaked])
    assert all(swayed(d, 0, a) == chosen(d, 0, a) for d, a in (((), "naive"), (masked, "adaptive:survivors")))
