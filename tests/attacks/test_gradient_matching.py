"""Gradient matching: its objective by hand, its options, and inputs that it must recover."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import keyhole.parts.labels  # noqa: F401  (fills the registry of label rules)
from keyhole.attacks.idlg import idlg
from keyhole.attacks.inverting_gradients import inverting_gradients
from keyhole.core.defense import chain
from keyhole.core.keys import fold_in, new_key, normal, split
from keyhole.core.threat import ThreatModel, observe
from keyhole.core.types import Batch, Seen
from keyhole.errors import ConfigError, UnknownName
from keyhole.solve.drive import Solved, solve
from keyhole.solve.lift import Shared

KEY = new_key(17)
GIVEN = frozenset({"weights", "update", "targets"})


def run(
    attack: Any, bench: Any, trials: int = 2, size: int = 1, rounds: int = 1, images: Tensor | None = None
) -> tuple:
    threat = ThreatModel(batch_size=size, sees=GIVEN)
    secrets = bench.secrets(trials, size, rounds)
    seen = bench.see(secrets, threat)
    solved = solve(attack, bench.task, threat, seen, images, split(KEY, trials), Shared(bench.weights))
    return secrets, solved


def gray(bench: Any, trials: int, size: int) -> Tensor:
    flat = 0.5 + 0.01 * normal(KEY, (trials, 1, size, *bench.task.input_shape), torch.float64)
    return bench.task.bounds.from_pixels(flat)


def error(bench: Any, one: Solved, truth: Tensor) -> float:
    return float(
        (bench.task.bounds.to_pixels(one.reconstruction.inputs) - bench.task.bounds.to_pixels(truth)).square().mean()
    )


def numeric_gradient(bench: Any, batch: Batch) -> Tensor:
    """The update as one vector, by a loaded module and torch.autograd."""
    model = copy.deepcopy(bench.task.model).eval()
    model.load_state_dict({**bench.weights.params, **bench.weights.buffers})
    logits = model(batch.inputs)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_the_objective_by_hand(which: str, request: pytest.FixtureRequest) -> None:
    own = request.getfixturevalue(which)
    threat, batch = ThreatModel(batch_size=2, sees=GIVEN), own.batch(2, 1)
    (seen,) = observe(own.task, threat, chain(), own.weights, (batch,), KEY)
    x = normal(KEY, (2, 1, 8, 8), torch.float64)
    guess, truth = numeric_gradient(own, batch._replace(inputs=x)), numeric_gradient(own, batch)
    across, down = x.diff(dim=3), x.diff(dim=2)
    attack = idlg(tv=0.3, labels="given")
    state = Seen((seen,), attack.infer(own.task, threat, Seen((seen,), {}), KEY))
    assert set(state.facts) == {"square", "client", "targets"}
    assert float(state.facts["square"]) == pytest.approx(float(truth.square().sum()), rel=1e-12)

    value, score = attack.loss(own.task, threat, state, {"inputs": x}, KEY)
    expected = float((guess - truth).square().sum() / truth.square().sum())
    prior = float((across**2 + 1e-6).sqrt().mean() + (down**2 + 1e-6).sqrt().mean())
    assert float(score) == pytest.approx(expected, rel=1e-10)
    assert float(value) == pytest.approx(expected + 0.3 * prior, rel=1e-10)

    value, score = inverting_gradients(tv=0.3).loss(own.task, threat, state, {"inputs": x}, KEY)
    angle = float(1 - torch.nn.functional.cosine_similarity(guess, truth, dim=0))
    assert float(score) == pytest.approx(angle, rel=1e-10)
    assert float(value) == pytest.approx(angle + 0.3 * float(across.abs().mean() + down.abs().mean()), rel=1e-10)


def test_statistics_by_hand(make_bench: Any) -> None:
    """Yin et al.'s prior in units of the seen variance, and none where they are hidden."""
    own = make_bench("conv_norm", "train_shared")
    batch, x = own.batch(3), normal(KEY, (3, 1, 8, 8), torch.float64)
    sees = frozenset({"weights", "update", "targets", "statistics"})
    threat, attack = ThreatModel(batch_size=3, sees=sees), inverting_gradients(tv=0.0, statistics=0.7, labels="given")
    (seen,) = observe(own.task, threat, chain(), own.weights, (batch,), KEY)
    state = Seen((seen,), attack.infer(own.task, threat, Seen((seen,), {}), KEY))
    p = own.weights.params
    (mine, true) = (torch.conv2d(i, p["0.weight"], p["0.bias"], stride=2, padding=1) for i in (x, batch.inputs))
    (m, v), (m0, v0) = ((t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0) + 1e-6) for t in (mine, true))
    expected = ((m - m0) ** 2 / v0 + ((v / v0).sqrt() - 1) ** 2).mean()
    value, score = attack.loss(own.task, threat, state, {"inputs": x}, KEY)
    assert float(value - score) == pytest.approx(0.7 * float(expected), rel=1e-10)
    value, score = attack.loss(own.task, threat, state, {"inputs": batch.inputs}, KEY)
    assert abs(float(value)) < 1e-14
    hidden = state._replace(observations=(seen._replace(statistics=None),))
    value, score = attack.loss(own.task, threat, hidden, {"inputs": x}, KEY)
    assert float(value) == float(score)


def test_there_is_no_prior_where_there_are_no_layers_to_have_statistics(bench: Any) -> None:
    threat = ThreatModel(batch_size=2, sees=frozenset({"weights", "update", "targets", "statistics"}))
    attack = inverting_gradients(tv=0.0, statistics=0.7, labels="given")
    (seen,) = observe(bench.task, threat, chain(), bench.weights, (bench.batch(2),), KEY)
    state = Seen((seen,), attack.infer(bench.task, threat, Seen((seen,), {}), KEY))
    value, score = attack.loss(bench.task, threat, state, {"inputs": normal(KEY, (2, 1, 8, 8), torch.float64)}, KEY)
    assert float(value) == float(score)


@pytest.mark.parametrize("which", ["bench", "norm_bench"])
def test_idlg_recovers_single_images(which: str, request: pytest.FixtureRequest) -> None:
    own = request.getfixturevalue(which)
    (secret,), solved = run(idlg(steps=300, tolerance=1e-12), own, trials=3, images=gray(own, 3, 1))
    for i, one in enumerate(solved):
        assert one.status == "converged"
        assert error(own, one, secret.inputs[i]) < 1e-6
        assert torch.equal(one.reconstruction.targets, secret.targets[i])
        assert float(one.reconstruction.score) <= 1e-12


def test_idlg_recovers_every_round_of_an_episode(bench: Any) -> None:
    secrets, (one,) = run(idlg(steps=500, tolerance=1e-12), bench, trials=1, rounds=2, images=gray(bench, 1, 2))
    assert error(bench, one, torch.cat([s.inputs[0] for s in secrets])) < 1e-6
    assert torch.equal(one.reconstruction.targets, torch.cat([s.targets[0] for s in secrets]))


def test_inverting_gradients_comes_near_and_stays_in_the_box(bench: Any) -> None:
    attack = inverting_gradients(steps=200, restarts=1, tv=0.0, start="gray")
    (secret,), solved = run(attack, bench, trials=2, images=gray(bench, 2, 1))
    for i, one in enumerate(solved):
        start = float((bench.task.bounds.to_pixels(secret.inputs[i]) - 0.5).square().mean())
        assert error(bench, one, secret.inputs[i]) < 0.2 * start
        assert torch.allclose(bench.task.bounds.clamp(one.reconstruction.inputs), one.reconstruction.inputs, atol=1e-14)
        assert one.status == "budget"


def test_the_first_candidate_is_the_public_image_or_noise(bench: Any) -> None:
    facts = {"targets": torch.eye(4).double()[:2], "square": torch.zeros(()).double()}
    threat, state = ThreatModel(batch_size=2), Seen((), facts)
    images = torch.ones(2, 1, 8, 8).double()
    assert torch.equal(idlg().start(bench.task, threat, state, images, KEY)["inputs"], images)
    first = idlg().start(bench.task, threat, state, None, KEY)["inputs"]
    assert first.shape == (2, 1, 8, 8)
    assert first.dtype == torch.float64
    assert abs(float(first.mean())) < 0.4
    assert abs(float(first.std()) - 1) < 0.3
    assert not torch.equal(first, idlg().start(bench.task, threat, state, None, fold_in(KEY, 1))["inputs"])


def test_projection_is_to_the_box_where_there_is_one(bench: Any) -> None:
    far = {"inputs": 10 * normal(KEY, (1, 1, 8, 8), torch.float64), "counter.z": torch.full((2,), 99.0)}
    inside = inverting_gradients().project(bench.task, far)
    assert torch.equal(inside["inputs"], bench.task.bounds.clamp(far["inputs"]))
    assert inside["counter.z"] is far["counter.z"]
    assert inverting_gradients(box=False).project(bench.task, far)["inputs"] is far["inputs"]
    assert idlg().project(bench.task, far)["inputs"] is far["inputs"]


def test_a_prior_switches_the_tolerance_off() -> None:
    assert idlg(tolerance=1e-5).tolerance == 1e-5
    assert idlg(tolerance=1e-5, tv=1e-4).tolerance == 0


def test_what_an_attack_needs_follows_its_label_rule() -> None:
    for make in (idlg, inverting_gradients):
        assert make().needs == {"weights", "update"}
        assert make(labels="given").needs == {"weights", "update", "targets"}


@pytest.mark.parametrize("make", [idlg, inverting_gradients])
@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"tv": -1e-9}, {"tv": float("nan")}, {"steps": -5}])
def test_options_out_of_range_are_refused(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(**options)


@pytest.mark.parametrize("options", [{"tolerance": -1.0}, {"history": 0}, {"history": -1}])
def test_options_of_idlg_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        idlg(**options)


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan")])
def test_a_step_size_must_be_positive(lr: float) -> None:
    with pytest.raises(ConfigError, match="lr"):
        inverting_gradients(lr=lr)


@pytest.mark.parametrize("make", [idlg, inverting_gradients])
def test_an_unknown_label_rule_is_answered_with_a_suggestion(make: Any) -> None:
    with pytest.raises(UnknownName, match="unknown label rule 'givn' in attack option 'labels'; did you mean 'given'"):
        make(labels="givn")


def test_a_weight_of_zero_costs_nothing(bench: Any) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("called")

    attack = replace(idlg(), penalties=((0.0, never),))
    _, (one,) = run(replace(attack, steps=2), bench, trials=1, images=gray(bench, 1, 1))
    assert one.evaluations == 2
