"""The lifted loop on toy objectives whose answers are known: best iterates, ends, restarts, pauses, compaction."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keyhole.core.attack import DirectAttack, IterativeAttack
from keyhole.core.keys import advance, new_key, normal, split, uniform
from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Candidate, Key, Observation, Reconstruction, Seen
from keyhole.solve import drive
from keyhole.solve.drive import Paused, Solved, Watch, solve
from keyhole.solve.lbfgs import LBFGS
from keyhole.solve.lift import Shared
from keyhole.solve.optimizers import SGD, adam, signed

Objective = Callable[[Tensor, dict[str, Tensor], Key], tuple[Tensor, Tensor]]
N = 3


def bowl(x: Tensor, data: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
    """Squares with a curvature of each trial's own, zero at its centre; ``sick`` trials have no number."""
    value = (data["curvature"] * (x - data["centre"]).square()).sum()
    value = value + torch.where(data["sick"] > 0, float("nan"), 0.0)
    return value, value


@dataclass(frozen=True, eq=False)
class Toy(IterativeAttack):
    objective: Objective = bowl
    optimizer: Any = SGD(0.1)
    steps: int = 40
    restarts: int = 1
    initial: Any = "gray"
    tolerance: float = 0.0
    patience: int = 0
    min_progress: float = 0.01
    always_restart: bool = False

    @property
    def needs(self) -> frozenset:
        return frozenset({"update"})

    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        return {"inputs": normal(key, (N,), torch.float64) if images is None else images}

    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        return self.objective(candidate["inputs"], seen.observations[0].update or {}, key)

    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        return Reconstruction(candidate["inputs"], None, score)


def data(trials: int, **given: Any) -> dict[str, Tensor]:
    base = {"curvature": torch.ones(trials), "centre": torch.zeros(trials, N), "sick": torch.zeros(trials)}
    base.update({name: torch.as_tensor(value) for name, value in given.items()})
    return {name: value.double() for name, value in base.items()}


def run(
    attack: Toy,
    given: dict[str, Tensor],
    images: Tensor | None = None,
    watch: Watch | None = None,
    which: slice | None = None,
) -> list[Solved]:
    which = which or slice(None)
    keys = split(new_key(2), len(given["sick"]))[which]
    update = {name: value[which] for name, value in given.items()}
    starts = None if images is None else images[which].double()
    task: Any = None  # the loop only hands it on
    return solve(attack, task, ThreatModel(), (Observation(update=update),), starts, keys, Shared(), watch)


def flat(value: float) -> Tensor:
    """The same number in every coordinate."""
    return torch.full((N,), value, dtype=torch.float64)


def starts(*rows: list[float]) -> Tensor:
    """One trial: each row's numbers are the starts, the same in every coordinate."""
    return torch.tensor(rows).double()[:, :, None].expand(-1, -1, N).clone()


def test_the_best_iterate_is_returned_not_the_last() -> None:
    # Every step multiplies x by -1.2, so the start is the best.
    (one,) = run(Toy(optimizer=SGD(1.1), steps=20), data(1), starts([1.5]))
    assert one.reconstruction.inputs.tolist() == [1.5] * N
    assert float(one.reconstruction.score) == pytest.approx(N * 1.5**2)
    assert (one.status, one.evaluations) == ("budget", 20)


def test_gradient_descent_on_a_quadratic_gives_the_closed_form() -> None:
    (one,) = run(Toy(optimizer=SGD(0.1), steps=21), data(1, centre=[[1.0, 2.0, 3.0]]), starts([0.0]))
    expected = torch.tensor([1.0, 2.0, 3.0]).double() * (1 - 0.8**20)  # 21 evaluations, 20 steps between them
    assert torch.allclose(one.reconstruction.inputs, expected, rtol=1e-12)
    assert one.evaluations == 21


def test_the_score_of_the_best_iterate_is_returned_without_the_prior() -> None:
    def with_prior(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
        return x.square().sum() + 7.0, x.square().sum()

    (one,) = run(Toy(with_prior, steps=21), data(1), starts([1.0]))
    assert float(one.reconstruction.score) == pytest.approx(N * 0.8**40, rel=1e-10)


def test_a_trial_converges_at_its_tolerance_on_the_grid() -> None:
    # x_k = 0.8^k: 3 * 0.64^k <= 1e-3 first at k = 18, evaluation 19, seen at evaluation 20.
    (one,) = run(Toy(tolerance=1e-3), data(1), starts([1.0]))
    assert (one.status, one.evaluations) == ("converged", 20)


def test_an_objective_without_a_number_is_diverged_and_leaves_the_start() -> None:
    for optimizer in (SGD(0.1), adam(0.1), LBFGS(history=5)):
        sick, well = run(Toy(optimizer=optimizer), data(2, sick=[1.0, 0.0]), starts([1.0], [1.0]))
        assert (sick.status, sick.evaluations) == ("diverged", 10)
        assert sick.reconstruction.inputs.tolist() == [1.0] * N
        assert sick.history == ()
        (alone,) = run(Toy(optimizer=optimizer), data(1), starts([1.0]))
        assert well.status == alone.status
        assert torch.allclose(well.reconstruction.inputs, alone.reconstruction.inputs, rtol=0, atol=1e-12)


def test_a_trial_that_becomes_sick_keeps_what_it_had() -> None:
    def cliff(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
        value = x.square().sum()
        value = value + torch.where(value < 0.5, float("nan"), 0.0)
        return value, value

    (one,) = run(Toy(cliff, optimizer=SGD(0.1)), data(1), starts([1.0]))
    # 3 * 0.64^4 = 0.503 is the last number above the cliff.
    assert torch.allclose(one.reconstruction.inputs, flat(0.8**4), rtol=1e-12)
    assert one.status == "stalled"


def no_number_below_zero(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
    value = x.sqrt().sum() * 0 + (x - 2).square().sum()
    return value, value


def test_the_next_start_follows_a_failed_one() -> None:
    toy = Toy(no_number_below_zero, restarts=3, tolerance=1e-3)
    (one,) = run(toy, data(1), starts([-1.0, 1.0, 1.5]))
    assert one.status == "converged"
    assert one.evaluations == 30  # 10 for the failed start, 20 for the second; the third is not needed
    assert torch.allclose(one.reconstruction.inputs, flat(2.0), atol=0.03)


def test_a_start_that_used_its_steps_is_followed_too() -> None:
    toy = Toy(restarts=2, steps=15, tolerance=1e-3)
    (one,) = run(toy, data(1), starts([100.0, 0.01]))
    assert (one.status, one.evaluations) == ("converged", 20)


def two_wells(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
    """Objective 0 at 0, and 1 at 10; the score, without the prior, says the opposite."""
    near, far = x.square().sum(), (x - 10).square().sum()
    return torch.minimum(near, far + 1), torch.minimum(near + 1, far)


def test_a_gradient_without_a_number_is_diverged_though_the_objective_has_one() -> None:
    def vertical(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
        value = (0.0 * x).sqrt().sum()  # 0, with a slope of 0 times infinity
        return value, value

    for optimizer in (SGD(0.1), adam(0.1), signed(adam(0.1)), LBFGS(history=5)):
        (one,) = run(Toy(vertical, optimizer=optimizer, steps=20), data(1), starts([1.0]))
        assert one.status == "diverged"


def test_of_all_starts_the_best_score_is_kept_whatever_the_order() -> None:
    for first, second in ((0.5, 10.5), (10.5, 0.5)):
        toy = Toy(two_wells, restarts=2, always_restart=True, steps=30)
        (one,) = run(toy, data(1), starts([first, second]))
        assert one.evaluations == 60
        assert torch.allclose(one.reconstruction.inputs, flat(10.0), atol=0.01)
        assert float(one.reconstruction.score) < 0.001


def test_always_restart_goes_on_after_a_start_that_converged() -> None:
    toy = Toy(restarts=3, always_restart=True, tolerance=1e-3)
    (one,) = run(toy, data(1), starts([1.0, 1.0, 0.001]))
    assert one.evaluations == 20 + 20 + 10
    assert torch.allclose(one.reconstruction.inputs, flat(0.001 * 0.8**9), rtol=1e-9)
    assert one.status == "converged"


@pytest.mark.parametrize("always", [True, False])
def test_diverged_means_that_every_start_went_to_infinity(always: bool) -> None:
    toy = Toy(no_number_below_zero, restarts=2, steps=20, always_restart=always)
    (one,) = run(toy, data(1), starts([1.0, -1.0]))
    assert torch.allclose(one.reconstruction.inputs, flat(2 - 0.8**19), rtol=1e-9)
    assert one.status == "budget"
    (one,) = run(toy, data(1), starts([-1.0, -2.0]))
    assert one.status == "diverged"


def test_a_trial_that_converged_in_one_start_has_converged() -> None:
    toy = Toy(restarts=2, steps=20, always_restart=True, tolerance=1e-2)
    (one,) = run(toy, data(1), starts([0.1, 100.0]))
    assert float(one.reconstruction.score) <= 1e-2
    assert one.status == "converged"


@pytest.mark.parametrize("limit", [7, 25, 40])
def test_the_limit_counts_all_starts_together(limit: int) -> None:
    toy = Toy(restarts=4, steps=15, always_restart=True)
    (one,) = run(toy, data(1), starts([1.0, 1.0, 1.0, 1.0]), Watch(limit=limit))
    assert (one.status, one.evaluations) == ("budget", limit)
    (one,) = run(Toy(steps=30), data(1), starts([1.0]), Watch(limit=1000))
    assert one.evaluations == 30


def test_patience_ends_what_no_longer_falls() -> None:
    def flat(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
        return 1.0 + 1e-6 * x.square().sum(), x.square().sum()

    (one,) = run(Toy(flat, steps=500, patience=30), data(1), starts([1.0]))
    assert (one.status, one.evaluations) == ("stalled", 60)  # the first 30 set the mark
    (one,) = run(Toy(steps=500, patience=30, optimizer=SGD(0.001)), data(1), starts([1.0]))
    assert one.status == "budget"  # 11 percent in 30 evaluations is progress
    (one,) = run(Toy(steps=500, patience=30, optimizer=SGD(0.0001)), data(1), starts([1.0]))
    assert one.status == "budget"  # 1.2 percent is, just
    (one,) = run(Toy(steps=500, patience=30, min_progress=0.02, optimizer=SGD(0.0001)), data(1), starts([1.0]))
    assert one.status == "stalled"


def test_history_is_thin_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "CHECK", 1)
    (one,) = run(Toy(steps=150, optimizer=SGD(0.01)), data(1), starts([1.0]))
    ticks, scores = zip(*one.history, strict=True)
    assert len(ticks) <= drive.HISTORY_POINTS
    assert (ticks[0], ticks[-1]) == (1, 150)
    assert all(b > a for a, b in zip(ticks, ticks[1:], strict=False))
    assert max(b - a for a, b in zip(ticks, ticks[1:], strict=False)) <= 3
    for tick, score in one.history:
        assert score == pytest.approx(N * 0.98 ** (2 * (tick - 1)), rel=1e-9)


def test_randomness_in_an_objective_is_fresh_at_every_evaluation() -> None:
    def draw(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
        value = uniform(key, (), torch.float64) + 0 * x.sum()
        return value, value

    solved = run(Toy(draw, steps=20), data(3), starts([1.0], [1.0], [1.0]))
    for one, key in zip(solved, split(new_key(2), 3), strict=True):
        expected = min(float(uniform(advance(key, tick), (), torch.float64)) for tick in range(20))
        assert float(one.reconstruction.score) == expected


def test_random_starts_differ_between_trials_and_starts() -> None:
    toy = Toy(steps=1, optimizer=SGD(0.0))
    first, second = run(toy, data(2))
    assert not torch.equal(first.reconstruction.inputs, second.reconstruction.inputs)
    several = [one.reconstruction.inputs for one in run(Toy(steps=1, restarts=3, always_restart=True), data(2))]
    squares = [float(x.square().sum()) for x in several]
    assert squares[0] <= float(first.reconstruction.inputs.square().sum())
    assert not torch.equal(several[0], several[1])


def valley(x: Tensor, given: dict[str, Tensor], key: Key) -> tuple[Tensor, Tensor]:
    """Rosenbrock's, around a centre; ``curvature`` says how steep its walls are."""
    d = x - given["centre"]
    value = (10 * given["curvature"] * (d[1:] - d[:-1] ** 2) ** 2 + (1 - d[:-1]) ** 2).sum()
    value = value + torch.where(given["sick"] > 0, float("nan"), 0.0)
    return value, value


HARD = data(
    6,
    curvature=[1.0, 0.3, 4.0, 0.05, 1.0, 2.0],
    centre=torch.arange(18).reshape(6, 3) / 6.0,
    sick=[0, 0, 0, 0, 1.0, 0],
)
TWO_STARTS = starts([9.0, 1.0], [3.0, -1.0], [0.5, 0.4], [2.0, 1.0], [0.0, 1.0], [-3.0, 3.0])
MANY = [
    Toy(valley, optimizer=LBFGS(history=6), steps=60, tolerance=1e-12),
    Toy(optimizer=SGD(0.2, 0.5), steps=70, tolerance=1e-4, restarts=2),
    Toy(optimizer=adam(0.1), steps=50, tolerance=1e-4, restarts=2, always_restart=True),
    Toy(optimizer=adam(0.3), steps=35, tolerance=1e-3, restarts=2),
]


def equal(a: list[Solved], b: list[Solved], tolerance: float) -> None:
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        assert (one.status, one.evaluations) == (other.status, other.evaluations), i
        assert torch.allclose(one.reconstruction.inputs, other.reconstruction.inputs, rtol=0, atol=tolerance), i
        assert [k for k, _ in one.history] == [k for k, _ in other.history], i
        for (_, p), (_, q) in zip(one.history, other.history, strict=True):
            assert p == pytest.approx(q, rel=1e-6, abs=max(tolerance, 1e-300)), i


@pytest.mark.parametrize("toy", MANY, ids=["lbfgs", "sgd", "adam", "odd steps"])
def test_every_trial_of_a_group_ends_as_it_would_alone(toy: Toy) -> None:
    together = run(toy, HARD, TWO_STARTS[:, : toy.restarts])
    alone = [run(toy, HARD, TWO_STARTS[:, : toy.restarts], which=slice(i, i + 1))[0] for i in range(6)]
    assert len({one.evaluations for one in together}) > 1, "the trials must be of different difficulty"
    equal(together, alone, 1e-8)


def test_a_neighbour_whose_budget_ends_between_two_looks_changes_nothing() -> None:
    # The first trial starts again at 10 and passes its tolerance at about 21; the second's 25 steps end off the grid.
    toy = Toy(no_number_below_zero, steps=25, restarts=2, tolerance=1e-2)
    images = starts([-1.0, 1.0], [60.0, 60.0])
    together, alone = run(toy, data(2), images), run(toy, data(1), images[:1])
    assert (together[0].status, alone[0].status) == ("converged", "converged")
    assert together[0].evaluations == alone[0].evaluations
    assert torch.allclose(together[0].reconstruction.inputs, alone[0].reconstruction.inputs, atol=1e-12)


class Interrupted:
    """Says stop at every n-th question."""

    def __init__(self, every: int) -> None:
        self.every, self.asked = every, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked % self.every == 0


@pytest.mark.parametrize("toy", MANY, ids=["lbfgs", "sgd", "adam", "odd steps"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_paused_group_goes_on_to_the_same_bits(
    toy: Toy, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "CHECK", 5)
    images = TWO_STARTS[:, : toy.restarts]
    expected = run(toy, HARD, images)
    path = tmp_path / "group.safetensors"
    watch = Watch(checkpoint=path, paused=Interrupted(every))
    pauses = 0
    while True:
        try:
            got = run(toy, HARD, images, watch)
            break
        except Paused:
            pauses += 1
            assert path.exists()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert pauses >= 2
    assert not path.exists(), "the checkpoint of a finished group is removed"
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.reconstruction.inputs, other.reconstruction.inputs)
        assert torch.equal(one.reconstruction.score, other.reconstruction.score)
        assert (one.status, one.evaluations, one.history) == (other.status, other.evaluations, other.history)


def test_a_checkpoint_is_written_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "group.safetensors"
    there: list[bool] = []
    run(Toy(steps=30), data(1), starts([1.0]), Watch(checkpoint=path, progress=lambda _: there.append(path.exists())))
    assert there == [False, True, True]
    assert list(tmp_path.iterdir()) == []


def test_a_pause_without_a_checkpoint_stops_all_the_same() -> None:
    with pytest.raises(Paused):
        run(Toy(steps=30), data(1), starts([1.0]), Watch(paused=lambda: True))


def test_a_group_that_is_done_is_not_thrown_away_by_a_pause(tmp_path: Path) -> None:
    for checkpoint in (tmp_path / "group.safetensors", None):
        # Asked first when the only look, at the end of the budget, finds every trial done.
        (one,) = run(Toy(steps=10), data(1), starts([1.0]), Watch(checkpoint=checkpoint, paused=lambda: True))
        assert one.evaluations == 10


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    run(MANY[1], HARD, TWO_STARTS, Watch(progress=told.append))
    assert told[-1] == 1
    assert all(0 < value <= 1 for value in told)


def test_a_direct_attack_is_lifted_and_its_trials_are_separate() -> None:
    class Twice(DirectAttack):
        needs = frozenset({"update"})

        def reconstruct(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Reconstruction:
            x = seen.observations[0].update["centre"] * 2
            return Reconstruction(x, None, x.sum())

    given = data(3, centre=torch.arange(9).reshape(3, 3))
    solved = run(Twice(), given)  # type: ignore[arg-type]
    for i, one in enumerate(solved):
        assert torch.equal(one.reconstruction.inputs, 2 * given["centre"][i])
        assert (one.status, one.evaluations, one.reconstruction.targets) == ("converged", 1, None)


def test_what_is_no_attack_is_an_error() -> None:
    class Neither:
        def infer(self, *args: Any) -> dict[str, Tensor]:
            return {}

    with pytest.raises(TypeError, match="Neither is neither"):
        run(Neither(), data(1))  # type: ignore[arg-type]
