"""A series of updates under every attack: lifted as looped, killed and resumed, and scored update by update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attack_cases import ITERATIVE, NAMES, SEQUENTIAL, model_of, options, start_images

from keyhole.core.keys import new_key, split
from keyhole.core.registry import ATTACKS
from keyhole.core.tensors import map_tensors
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Observation, Reconstruction, Weights
from keyhole.experiment import run as runner
from keyhole.experiment.plan import Group
from keyhole.experiment.run import run_group
from keyhole.solve import drive
from keyhole.solve.drive import Paused, Solved, Watch, solve
from keyhole.solve.lift import Shared, take

ROUNDS, TRIALS = 3, 3
SHORT = {"steps": 6, "restarts": 1, "history": 8, "start": "gray", "warmup": 1, "success": 10.0}
"""Feedback begins at once, so that it is part of what is compared."""


def observed(bench: Any, size: int) -> tuple[tuple[Observation, ...], tuple[Weights, ...]]:
    """Three updates, each of a network of its own."""
    networks = tuple(
        bench.weights._replace(params=map_tensors(lambda w, k=k: w * (1 - 0.1 * k), bench.weights.params))
        for k in range(ROUNDS)
    )
    seen = bench.see(bench.secrets(TRIALS, size, ROUNDS), ThreatModel(batch_size=size), weights=networks)
    return seen, networks


def run(bench: Any, name: str, size: int, which: list[int], watch: Watch | None = None, **wanted: Any) -> list[Solved]:
    attack = ATTACKS.build(name, **options(name, {**SHORT, **wanted}))
    seen, networks = observed(bench, size)
    shared, at = Shared(networks), torch.tensor(which)
    starts = start_images(bench, attack, TRIALS, ROUNDS * size)
    starts = None if starts is None else starts[at]
    keys = split(new_key(61), TRIALS)[at]
    return solve(attack, bench.task, ThreatModel(batch_size=size), take(seen, at, shared), starts, keys, shared, watch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2])
def test_a_lifted_series_is_the_looped_one(name: str, size: int, make_bench: Any) -> None:
    bench = make_bench(model_of(name))
    together = run(bench, name, size, [0, 1, 2])
    for i, one in enumerate(together):
        (alone,) = run(bench, name, size, [i])
        assert (one.status, one.evaluations, one.rounds) == (alone.status, alone.evaluations, alone.rounds)
        assert torch.allclose(one.reconstruction.inputs, alone.reconstruction.inputs, rtol=0, atol=1e-10)
        assert torch.allclose(one.reconstruction.score, alone.reconstruction.score, rtol=0, atol=1e-10)
        assert one.reconstruction.inputs.shape == (ROUNDS * size, 1, 8, 8)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_learner_learns(name: str, bench: Any) -> None:
    """Else the test above would not say anything about what is carried over."""
    usual = run(bench, name, 1, [0])
    other = run(bench, name, 1, [0], feedback=False)
    a, b = (one[0].reconstruction.inputs for one in (usual, other))
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1])
    assert not torch.allclose(a[2], b[2])


@pytest.mark.parametrize("name", [*ITERATIVE, *SEQUENTIAL])
def test_a_killed_series_goes_on_to_the_same_bits(
    name: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "CHECK", 3)
    expected, asked, pauses = run(bench, name, 1, [0, 1, 2], steps=10), [0], 0

    def every_other_look() -> bool:
        asked[0] += 1
        return asked[0] % 2 == 0

    watch = Watch(checkpoint=tmp_path / "group.safetensors", paused=every_other_look)
    while True:
        try:
            got = run(bench, name, 1, [0, 1, 2], watch, steps=10)
            break
        except Paused:
            pauses += 1
    assert pauses >= ROUNDS
    assert not list(tmp_path.iterdir())
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.reconstruction.inputs, other.reconstruction.inputs)
        assert torch.equal(one.reconstruction.score, other.reconstruction.score)
        assert (one.status, one.evaluations, one.history) == (other.status, other.evaluations, other.history)
        assert one.rounds == other.rounds


@pytest.mark.parametrize("name", ["idlg", "dlg_fb"])
def test_a_series_is_told_update_by_update(name: str, make_setup: Any, make_trial: Any) -> None:
    """Two of three updates are given up early: the outcome says which, and what each of them took."""
    given = options(name, {"steps": 60, "tolerance": 1e-4, "success": 1e-4, "start": "gray", "history": 20})
    trial = make_trial(name, given, (0, 1, 2, 3, 4, 5), batch_size=2, fresh=True)
    result = run_group(Group((trial,)), make_setup(networks=3))
    (outcome,) = result.outcomes
    metrics = outcome.metrics
    assert {len(values) for values in metrics.values()} == {6}
    assert result.reconstructions[trial.hash].shape == (6, 1, 8, 8)
    assert sum(metrics["evaluations"][::2]) == outcome.evaluations
    # Feedback begins after two successes; without feedback nothing is ever carried over.
    solved = [sum(metrics["matched"][:place:2]) >= 2 for place in (0, 2, 4)]
    assert metrics["carried"][::2] == [float(hit and name == "dlg_fb") for hit in solved]
    for place in (0, 2, 4):
        assert metrics["evaluations"][place] == metrics["evaluations"][place + 1]
        assert metrics["matched"][place] == metrics["matched"][place + 1]
        assert metrics["label_accuracy"][place] == metrics["label_accuracy"][place + 1]
    assert (outcome.status == "converged") == all(metrics["matched"])


def test_a_guess_stands_for_an_image_of_its_own_update(
    make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to one update must not be scored against the secret of another, where it would be no answer."""
    setup = make_setup()

    def swapped(attack: Any, task: Any, threat: Any, seen: Any, *rest: Any) -> list[Solved]:
        truth = task.bounds.from_pixels(setup.data.target.images[[1, 0]])
        answer = Reconstruction(truth, None, torch.zeros((), dtype=truth.dtype))
        return [Solved(answer, "converged", 2, (), (("converged", 1, False), ("converged", 1, False)))]

    monkeypatch.setattr(runner, "solve", swapped)
    (outcome,) = run_group(Group((make_trial("idlg", {}, (0, 1)),)), setup).outcomes
    assert min(outcome.metrics["mse"]) > 0.01
