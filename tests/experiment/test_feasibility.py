"""A dry run: what it measures against closed forms, what it concludes, and that it looks at no private image."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from keyhole.core.registry import ATTACKS
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.core.trial import Spec
from keyhole.experiment import cost, dryrun
from keyhole.experiment.cost import Pace, Pacer, costliest, most_evaluations, price
from keyhole.experiment.dryrun import dry_run
from keyhole.experiment.feasibility import ENOUGH, Reason, about_attacks, about_client, about_update, conclude, predict
from keyhole.experiment.jacobian import pinned_share, singular_values
from keyhole.experiment.plan import Group
from keyhole.experiment.probe import (
    Facts,
    dead_units,
    expected_collisions,
    linear_ranks,
    look,
    operations,
    precision_of,
    public_batch,
    reads_image,
)
from keyhole.experiment.prospect import in_words
from keyhole.experiment.sections import ClientSection, Experiment, Study
from keyhole.experiment.setup import Setup, prepare
from keyhole.experiment.spec import load_experiment, load_study

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return load_experiment("quick")


@pytest.fixture(scope="module")
def setup(experiment: Experiment) -> Setup:
    return prepare(experiment, CPU)


# The Jacobian


def test_all_singular_values_where_there_are_steps_for_all() -> None:
    matrix, x = draw(30, 12), draw(12, seed=1)

    def fn(x: Tensor) -> Tensor:
        return torch.tanh(matrix @ x).square()

    expected = torch.linalg.svdvals(torch.autograd.functional.jacobian(fn, x))
    values, shares = singular_values(fn, x, 12)
    assert torch.allclose(values, expected.sort().values, rtol=1e-8)
    assert shares.sum().item() == pytest.approx(1.0)


def test_two_values_end_the_search_after_two_steps() -> None:
    """A diagonal map, 400 unknowns: the shares are those of its two values, up to the noise of one direction."""
    scale = torch.where(torch.arange(400) < 100, 3.0, 0.01).double()
    values, shares = singular_values(lambda x: scale * x, torch.zeros(400, dtype=torch.float64))
    assert values.tolist() == pytest.approx([0.01, 3.0], rel=1e-6)
    assert shares.tolist() == pytest.approx([0.75, 0.25], abs=3 / math.sqrt(400))


def test_unreachable_directions_are_not_pinned() -> None:
    """Half of the unknowns have no influence, the rest have it all."""
    seen = (torch.arange(400) < 200).double()
    share = pinned_share(lambda x: seen * x, torch.ones(400, dtype=torch.float64), precision=1e-3, error=0.1)
    assert share == pytest.approx(0.5, abs=3 / math.sqrt(400))


@pytest.mark.parametrize(("factor", "share"), [(0.9, 1.0), (1.1, 0.0)])
def test_pinned_from_the_precision_on_that_the_formula_gives(factor: float, share: float) -> None:
    """For fn(x) = s x with |x_i| = 1: precision s sqrt(n) / (sqrt(n) error) <= s, so precision <= error."""
    x = torch.ones(50, dtype=torch.float64)
    assert pinned_share(lambda x: 7.0 * x, x, precision=0.1 * factor, error=0.1) == pytest.approx(share)


# One update


def linear_task(classes: int = 5, size: int = 3) -> Task:
    model = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 20), nn.Sigmoid(), nn.Linear(20, classes))
    return Task.of(model, (1, size, size), classes, Bounds.of((0.0,), (1.0,)))


def test_rank_is_that_of_the_whole_matrix() -> None:
    task = linear_task()
    left, right = draw(20, 3), draw(3, 9, seed=1)
    full = left @ right
    ranks = linear_ranks(task, {"1.weight": full.float(), "3.weight": torch.zeros(5, 20)})
    assert ranks == {"1": np.linalg.matrix_rank(full.numpy()), "3": 0}


def test_rank_of_a_wide_layer_by_random_columns() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(900, 40), nn.Sigmoid(), nn.Linear(40, 2))
    task = Task.of(model, (1, 30, 30), 2, Bounds.of((0.0,), (1.0,)))
    update = {"1.weight": (draw(40, 7) @ draw(7, 900, seed=1)).float()}
    assert linear_ranks(task, update) == {"1": 7}


def test_collisions_are_those_of_all_batches() -> None:
    labels = [0, 0, 0, 1, 1, 2, 3]
    batches = list(itertools.combinations(labels, 4))
    pairs = [sum(a == b for a, b in itertools.combinations(batch, 2)) for batch in batches]
    client = ClientSection(batch_size=4)
    assert expected_collisions(torch.tensor(labels), client) == pytest.approx(sum(pairs) / len(batches))
    assert expected_collisions(torch.tensor(labels), client.model_copy(update={"labels": "equal"})) == 6
    assert expected_collisions(torch.tensor(labels), client.model_copy(update={"labels": "distinct"})) == 0
    assert expected_collisions(torch.tensor([1]), client) == 0


def test_dead_units_are_rows_without_gradient() -> None:
    weight = torch.ones(4, 2, 3, 3)
    weight[1] = 0.0
    weight[2, 0] = 0.0
    assert dead_units({"conv.weight": weight, "conv.bias": torch.tensor([1.0, 0.0, 2.0, 3.0])}) == 2 / 8


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.max_pool2d(nn.functional.relu(self.conv(x)), 2).flatten(1))


def test_kinks_are_found_where_no_module_names_them() -> None:
    task = Task.of(Functional(), (1, 4, 4), 3, Bounds.of((0.0,), (1.0,)))
    kinks, depth, work = operations(task, weights_of(task.model), torch.rand(2, 1, 4, 4))
    assert kinks == ("ReLU", "max pooling")
    assert depth == 2
    assert work == 2 * (2 * 16 * 2 * 9 + 2 * 8 * 3)  # two images; a product and a sum for each weight and position


def test_sigmoids_have_no_kinks() -> None:
    task = linear_task()
    assert operations(task, weights_of(task.model), torch.rand(1, 1, 3, 3))[:2] == ((), 2)


class Disguised(nn.Module):
    """Its second layer is as wide as the image is large, but only a layer on the image itself reads it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.conv = first, nn.Conv2d(1, 2, 3, padding=1)
        self.wide, self.head = nn.Linear(9, 9) if first else nn.Linear(18, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv(x).flatten(1)
        return self.head(torch.sigmoid(self.wide(x.flatten(1) if self.first else side))) + side.mean()


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_reads_the_image_by_value_not_by_width(first: bool) -> None:
    task = Task.of(Disguised(first), (1, 3, 3), 2, Bounds.of((0.0,), (1.0,)))
    assert reads_image(task, weights_of(task.model), torch.rand(2, 1, 3, 3)) is first
    assert not any(module._forward_pre_hooks for module in task.model.modules())


def test_what_a_belief_leaves_unexplained_is_the_sine_of_an_angle(setup: Setup) -> None:
    """Four local steps taken for one gradient: the angle between what was sent and that gradient."""
    changes = ["client={rule='sgd', lr=0.1, batch_size=1, images=4}", "attacker.belief=gradient"]
    wrong = load_experiment("quick", changes)
    facts = look(wrong, setup, [])
    batch, weights = public_batch(setup, wrong.client), setup.weights[0][0]
    point = {name: value.clone().requires_grad_(True) for name, value in weights.params.items()}

    def gradient(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        logits = torch.func.functional_call(setup.task.model, point, (inputs,))
        loss = nn.functional.cross_entropy(logits, targets.argmax(1))
        return list(torch.autograd.grad(loss, list(point.values())))

    first = torch.cat([g.flatten() for g in gradient(batch.inputs, batch.targets)])
    for i in range(4):
        slopes = gradient(batch.inputs[i : i + 1], batch.targets[i : i + 1])
        point = {
            n: (v - 0.1 * g).detach().requires_grad_(True) for (n, v), g in zip(point.items(), slopes, strict=True)
        }
    moved = torch.cat([(weights.params[name] - value).flatten() for name, value in point.items()])
    cosine = float(nn.functional.cosine_similarity(first, moved.detach(), dim=0))
    assert facts.drift == pytest.approx(1 - cosine, rel=1e-3)
    assert facts.mismatch == pytest.approx(math.sqrt(1 - cosine**2), rel=1e-3)
    assert facts.norm == pytest.approx(float(moved.detach().norm()), rel=1e-4)
    right = look(load_experiment("quick", changes[:1]), setup, [])
    assert right.mismatch < 1e-3


def test_a_wrong_learning_rate_alone_is_only_a_scale(setup: Setup) -> None:
    """One step: twice the rate gives twice the update, which points the same way."""
    changes = ["client={rule='sgd', lr=0.1, batch_size=1, images=1}", "attacker.belief={name='sgd', lr=0.2}"]
    assert look(load_experiment("quick", changes), setup, []).mismatch < 1e-3


def test_precision_by_optimizer() -> None:
    assert precision_of(ATTACKS.build("idlg", tolerance=1e-6), ("ReLU",)) == pytest.approx(1e-3)
    by_sign = ATTACKS.build("inverting_gradients")
    smooth, kinked = (precision_of(by_sign, kinks) for kinks in ((), ("ReLU",)))
    assert precision_of(ATTACKS.build("idlg"), ()) < smooth < kinked


@pytest.mark.parametrize(("labels", "expected"), [("equal", 1), ("distinct", 4)])
def test_labels_of_the_simulated_batch(labels: str, expected: int, setup: Setup) -> None:
    batch = public_batch(setup, ClientSection(batch_size=4, labels=labels))
    classes = batch.targets.argmax(1)
    assert len(set(classes.tolist())) == expected
    assert classes.tolist() == sorted(classes.tolist())


def test_no_private_image_is_looked_at(experiment: Experiment, setup: Setup) -> None:
    """With NaN in place of the targets and the tune pool everything is as before, timings apart."""
    poisoned = {
        name: replace(pool, images=torch.full_like(pool.images, math.nan))
        for name, pool in (("target", setup.data.target), ("tune", setup.data.tune))
    }
    blind = replace(setup, data=replace(setup.data, **poisoned))
    attacks = [ATTACKS.build("idlg")]
    assert predict(experiment, blind, attacks) == predict(experiment, setup, attacks)
    (trial, *_) = dryrun._plan(experiment, blind)[0].trials
    pace = Pacer().pace(trial, blind, 1)
    assert pace.problem == ""
    group, own = cost.rehearsal(trial, blind, 3, 5)
    assert torch.equal(own.data.target.images, setup.data.public.images)
    assert {t.limit for t in group.trials} == {5}


# The verdict

GOOD = Facts(
    images=1,
    unknowns=100,
    equations=1000,
    nonzero=1000,
    dead=0.0,
    ranks={"head": 1},
    norm=1.0,
    steps=1,
    drift=0.0,
    mismatch=0.0,
    collisions=0.0,
    kinks=(),
    depth=3,
    precision=1e-3,
    pinned=1.0,
    reads_image=False,
    norms=False,
    drops=False,
)


def verdict(facts: Facts, *changes: str, attacks: list[str] | None = None) -> str:
    built = [ATTACKS.build(name) for name in (["idlg"] if attacks is None else attacks)]
    setting = load_experiment("quick", changes)
    return conclude((*about_attacks(built), *about_update(facts), *about_client(setting, facts)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "likely recoverable"),
        ({"pinned": ENOUGH}, "likely recoverable"),
        ({"pinned": 0.3}, "partly"),
        ({"pinned": 0.05}, "unlikely by these attacks"),
        ({"pinned": None}, "partly"),
        ({"nonzero": 99}, "unlikely by these attacks"),
        ({"norm": 0.0, "nonzero": 0}, "unlikely by these attacks"),
        ({"kinks": ("ReLU",)}, "likely recoverable"),
        ({"kinks": ("ReLU",), "nonzero": 600}, "partly"),
        ({"kinks": ("ReLU",), "nonzero": 600, "reads_image": True}, "likely recoverable"),
        ({"depth": 20}, "likely recoverable"),
        ({"depth": 20, "kinks": ("ReLU",)}, "partly"),
        ({"images": 4, "ranks": {"fc": 4, "head": 3}}, "likely recoverable"),
        ({"images": 4, "ranks": {"fc": 2, "head": 3}}, "partly"),
        ({"images": 32, "ranks": {"head": 32}}, "partly"),
        ({"collisions": 2.0}, "partly"),
        ({"mismatch": 0.3}, "partly"),
        ({"drops": True}, "partly"),
    ],
)
def test_verdict_of_the_facts(change: dict[str, Any], expected: str) -> None:
    assert verdict(replace(GOOD, **change)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("state.train=early", "likely recoverable"),
        ("state.train=late", "partly"),
        ("model.batchnorm=eval", "likely recoverable"),
        ("model.batchnorm=train_shared", "partly"),
        ("model.batchnorm=train_hidden", "partly"),
        ("client={rule='sgd', images=4, batch_size=1, epochs=2, order='shuffled'}", "partly"),
    ],
)
def test_verdict_of_the_setting(change: str, expected: str) -> None:
    assert verdict(replace(GOOD, norms=True), change) == expected


def test_no_images_without_an_attack_on_images() -> None:
    assert verdict(GOOD, attacks=[]) == "unlikely by these attacks"
    assert verdict(GOOD, attacks=["labels_only"]) == "unlikely by these attacks"
    assert verdict(GOOD, attacks=["labels_only", "idlg"]) == "likely recoverable"


def test_known_ends_of_the_scale(setup: Setup) -> None:
    """A network that hardly reads its input reveals little of it; `quick`, which leaks, is told apart from it."""
    attacks = [ATTACKS.build("idlg")]
    quick = predict(load_experiment("quick"), setup, attacks)
    assert quick.verdict == "likely recoverable"
    assert quick.facts.unknowns == 64
    faint = setup.weights[0][0]
    params = {name: value * (1e-5 if name.startswith("conv") else 1.0) for name, value in faint.params.items()}
    weak = replace(setup, weights={0: (faint._replace(params=params),)})
    assert predict(load_experiment("quick"), weak, attacks).verdict == "unlikely by these attacks"


def test_notes_decide_nothing() -> None:
    assert conclude((Reason("note", "a"), Reason("note", "b"))) == "likely recoverable"
    assert conclude((Reason("note", "a"), Reason("hinders", "b"))) == "partly"
    assert conclude((Reason("stops", "a"), Reason("hinders", "b"))) == "unlikely by these attacks"


# The cost


def test_budgets_count_all_starts_and_the_costliest_of_the_grid() -> None:
    assert most_evaluations(ATTACKS.build("inverting_gradients", steps=30, restarts=4)) == 120
    assert most_evaluations(ATTACKS.build("dlg_fb", steps=30)) == 30
    assert most_evaluations(ATTACKS.build("labels_only")) == 1
    experiment = load_experiment("quick", ["attacks.0.tune={steps = [10, 400, 40], tv = [0.0, 0.1]}"])
    chosen = costliest(experiment.attacks[0]).asdict()
    assert (chosen["steps"], chosen["tv"]) == (400, 0.1)


class Fixed(Pacer):
    """Every trial takes one second, a tenth of a second for each evaluation, and a megabyte."""

    def pace(self, trial: Any, setup: Any, width: int) -> Pace:
        return Pace(1.0, 0.1, 1e6, width, "no" if trial.attacker == "adaptive:refused" else "")


def test_price_by_hand(make_trial: Callable[..., Any]) -> None:
    """Groups of 2, 1 and 1 trials with 10 evaluations, 2 s a trial: 8 core-seconds, on two jobs 4 s; and the margin."""
    more = cost.MARGIN

    def group(count: int, **fields: Any) -> tuple[Group, Any]:
        rule, belief = Spec.of("gradient"), Spec.of("exact")
        trial = make_trial("idlg", {"steps": 10, "restarts": 1}, rule=rule, belief=belief, **fields)
        return Group((trial,) * count), None

    groups = [group(2), group(1), group(1)]
    found = price(groups, Fixed(), 2)
    assert (found.core_seconds, found.wall_seconds, found.jobs) == (8.0 * more, 4.0 * more, 2)
    assert found.memory == 3 * 1e6 * cost.RESERVE
    assert price(groups, Fixed(), 1).wall_seconds == 8.0 * more
    free = [group(4, attacker="control:class_mean"), group(4, attacker="adaptive:refused")]
    assert price(free, Fixed(), 1).core_seconds == 0.0
    assert price([group(1, limit=5)], Fixed(), 1).core_seconds == 1.5 * more
    assert price([group(1, episode=(0, 1, 2))], Fixed(), 1).core_seconds == 6.0 * more  # a series of three updates


def test_live_memory_is_what_lives_at_a_time() -> None:
    with cost._LiveTensors() as live:
        a = torch.zeros(1000)
        b = a + 1.0
        del a
        view = b[:10]
        c = b * 2.0
        del b, view, c
        torch.zeros(500)
    assert live.peak == 8000
    assert live.now == 0


def test_a_pace_is_measured_once_for_all_strengths(
    experiment: Experiment, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the machine's own clock more evaluations may take no longer; here each interval is longer than the last.
    ticks = itertools.count()
    monkeypatch.setattr(cost, "_clock", lambda device: 1e-6 * next(ticks) ** 2)
    pacer = Pacer()
    groups = dryrun._plan(experiment, setup)
    naive = next(g.trials[0] for g in groups if g.trials[0].attacker == "naive" and g.trials[0].defense)
    first = pacer.pace(naive, setup, 4)
    monkeypatch.delattr(cost, "run_group")
    other = replace(naive, defense=(naive.defense[0].replace(rate=0.9),), attack=naive.attack.replace(tv=0.3))
    assert pacer.pace(other, setup, 4) == first
    assert first.each > 0
    assert first.memory > 4 * 5722  # at least one update in single precision


# Whole


def test_dry_run_writes_nothing_and_says_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    prospect = dry_run(load_study("quick"), jobs=3)
    assert torch.get_num_threads() == before
    assert not list(tmp_path.iterdir())
    (outlook,) = prospect.settings
    assert {attacker for _, _, attacker in outlook.cells} == {
        "naive",
        "adaptive:survivors",
        "control:prior_only",
        "control:other_client",
        "control:class_mean",
        "check:truth",
    }
    assert (outlook.trials, outlook.tuning, outlook.groups) == (40, 0, 8)
    assert 0 < prospect.cost.wall_seconds <= prospect.cost.core_seconds
    again = json.loads(json.dumps(prospect.asdict()))
    assert again["upper_bound"] is True
    assert again["settings"][0]["feasibility"]["verdict"] == "likely recoverable"
    words = in_words(prospect)
    assert "Prediction without a defense: likely recoverable." in words
    assert "never means safe" in words
    assert max(map(len, words.split("\n"))) <= 110


def settings(*more: str) -> Study:
    return load_study("quick", ["defenses=[]", "attacks.0.steps=20", f"settings=[{', '.join(more)}]"])


def test_a_setting_that_differs_only_in_training_is_no_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early networks are not trained here, yet their trials are counted and paid for."""

    def trained(*arguments: object) -> object:
        raise AssertionError("a dry run trained a network")

    monkeypatch.setattr("keyhole.experiment.setup.train_states", trained)
    study = settings('{name = "fresh"}', '{name = "early", state = {train = "early"}}', '{name = "again"}')
    prospect = dry_run(study, jobs=1)
    fresh, early, again = prospect.settings
    assert fresh.training == again.training == ""
    assert "would first be trained" in early.training
    assert fresh.trials == early.trials
    assert prospect.cost.core_seconds == pytest.approx(fresh.core_seconds + early.core_seconds)


def test_what_cannot_run_is_said_before_it_does_not() -> None:
    study = load_study("quick", ["attacks.0.labels=given"])
    (outlook,) = dry_run(study, jobs=1).settings
    assert outlook.problems
    assert all("needs targets" in problem for problem in outlook.problems)
    assert outlook.feasibility.verdict == "unlikely by these attacks"


def test_who_has_a_guess_for_each_epoch_is_not_wrong_about_its_order(setup: Setup) -> None:
    """The order of the steps is what such an attacker finds; one who guesses it once leaves much unexplained."""
    found = {}
    for belief in ("exact", "order_unknown"):
        client = "client={rule='sgd', lr=0.5, epochs=2, batch_size=1, images=4, order='shuffled'}"
        one = load_experiment("quick", [client, f"attacker.belief={belief}", "run.samples=4"])
        found[belief] = look(one, setup, [ATTACKS.build("idlg")]).mismatch
    assert found["order_unknown"] < 1e-3 < found["exact"]
