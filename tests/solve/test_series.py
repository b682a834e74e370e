"""A series of updates: solved one by one, each with its own start, memory, key and budget; paused and resumed."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_drive import Interrupted
from torch import Tensor

from keyhole.core.attack import DirectAttack, IterativeAttack, SequentialAttack
from keyhole.core.keys import fold_in, new_key, normal, split
from keyhole.core.task import Task
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Candidate, Key, Observation, Reconstruction, Seen, Tensors
from keyhole.solve import drive
from keyhole.solve.drive import Paused, Solved, Watch, solve
from keyhole.solve.lift import Shared
from keyhole.solve.optimizers import SGD

N, ROUNDS, TRIALS = 3, 4, 3
KEYS = split(new_key(2), TRIALS)
CENTRES = torch.arange(float(ROUNDS * TRIALS * N), dtype=torch.float64).reshape(ROUNDS, TRIALS, N) / 10
STARTS = normal(new_key(3), (TRIALS, 2, ROUNDS, N), torch.float64)
"""Start images: trials, starts, rounds x one image."""


@dataclass(frozen=True, eq=False)
class Bowl(IterativeAttack):
    """Half the squared distance from the update's centre; one step of SGD(0.5) goes half the way."""

    optimizer: Any = SGD(0.5)
    steps: int = 10
    restarts: int = 1
    initial: Any = "gray"
    tolerance: float = 0.0
    always_restart: bool = False
    with_targets: bool = True

    @property
    def needs(self) -> frozenset:
        return frozenset({"update"})

    def start(self, task: Task, threat: ThreatModel, seen: Seen, images: Tensor | None, key: Key) -> Candidate:
        return {"inputs": normal(key, (1, N), torch.float64) if images is None else images}

    def loss(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, key: Key
    ) -> tuple[Tensor, Tensor]:
        (one,) = seen.observations
        value = 0.5 * (candidate["inputs"][0] - one.update["centre"]).square().sum()
        value = value + torch.where(one.update["sick"] > 0, float("nan"), 0.0)
        return value, value

    def decode(
        self, task: Task, threat: ThreatModel, seen: Seen, candidate: Candidate, score: Tensor
    ) -> Reconstruction:
        targets = candidate["inputs"][:, :2] if self.with_targets else None
        return Reconstruction(candidate["inputs"], targets, score)


@dataclass(frozen=True, eq=False)
class Last(SequentialAttack):
    """Starts each update where the one before it ended, and counts what scored below ``good``."""

    inner: Bowl
    good: float = 1e-3

    @property
    def initial(self) -> str:
        return "gray"

    def begin(self, images: Tensor) -> Tensors:
        return {"last": torch.zeros_like(images), "seen": images.new_zeros(())}

    def next_start(self, memory: Tensors, images: Tensor) -> Tensor:
        return torch.where(memory["seen"] > 0, memory["last"], images)

    def carries(self, memory: Tensors) -> Tensor:
        return memory["seen"] > 0

    def learn(self, memory: Tensors, reconstruction: Reconstruction) -> Tensors:
        return {"last": reconstruction.inputs, "seen": memory["seen"] + 1}

    def matched(self, reconstruction: Reconstruction) -> Tensor:
        return reconstruction.score <= self.good


def see(sick: list[tuple[int, int]] | None = None, centres: Tensor = CENTRES) -> tuple[Observation, ...]:
    marks = torch.zeros(ROUNDS, TRIALS).double()
    for turn, trial in sick or []:
        marks[turn, trial] = 1
    return tuple(Observation(update={"centre": c, "sick": m}) for c, m in zip(centres, marks, strict=False))


def run(
    attack: Any,
    seen: tuple[Observation, ...] | None = None,
    images: Tensor | None = STARTS,
    watch: Watch | None = None,
    threat: ThreatModel | None = None,
) -> list[Solved]:
    task: Any = None
    return solve(attack, task, threat or ThreatModel(), seen or see(), images, KEYS, Shared(), watch)


def reached(start: Tensor, centre: Tensor, evaluations: int) -> Tensor:
    """Where SGD(0.5) on the bowl is at its last evaluation."""
    return centre + (start - centre) * 0.5 ** (evaluations - 1)


def test_every_update_is_solved_from_its_own_start() -> None:
    solved = run(Bowl())
    for trial, one in enumerate(solved):
        expected = torch.stack([reached(STARTS[trial, 0, r], CENTRES[r, trial], 10) for r in range(ROUNDS)])
        assert torch.allclose(one.reconstruction.inputs, expected, rtol=1e-12)
        assert torch.equal(one.reconstruction.targets, one.reconstruction.inputs[:, :2])
        assert one.rounds == (("budget", 10, False),) * ROUNDS
        assert (one.status, one.evaluations) == ("budget", 10 * ROUNDS)
        scores = 0.5 * (expected - CENTRES[:, trial]).square().sum(1)
        assert torch.allclose(one.reconstruction.score, scores.mean(), rtol=1e-12)
        assert [number for number, _ in one.history] == [1, 2, 3, 4]
        assert [score for _, score in one.history] == pytest.approx(scores.tolist(), rel=1e-12)


def test_so_it_is_alone() -> None:
    """One update by itself, under the key and start of its round, is what the series finds."""
    together = run(Bowl(), images=None)
    for turn in range(ROUNDS):
        keys = torch.stack([fold_in(key, f"round {turn}") for key in KEYS])
        task: Any = None
        alone = solve(Bowl(), task, ThreatModel(), (see()[turn],), None, keys, Shared())
        for one, series in zip(alone, together, strict=True):
            assert torch.equal(series.reconstruction.inputs[turn : turn + 1], one.reconstruction.inputs)
    first = together[0].reconstruction.inputs - CENTRES[:, 0]
    assert not torch.allclose(first[0], first[1]), "each update has random starts of its own"


def test_what_was_found_reaches_the_next_update() -> None:
    solved = run(Last(Bowl()))
    for trial, one in enumerate(solved):
        here, expected = STARTS[trial, 0, 0], []
        for turn in range(ROUNDS):
            here = reached(here, CENTRES[turn, trial], 10)
            expected.append(here)
        assert torch.allclose(one.reconstruction.inputs, torch.stack(expected), rtol=1e-12)


def test_what_was_found_enters_the_first_start_alone() -> None:
    """The second start of each update is its own public image, also after a first that fails."""
    solved = run(Last(Bowl(restarts=2, always_restart=True, optimizer=SGD(0.0))))
    for trial, one in enumerate(solved):
        here = STARTS[trial, 0, 0]
        for turn in range(ROUNDS):
            both = torch.stack([here, STARTS[trial, 1, turn]])
            here = both[(both - CENTRES[turn, trial]).square().sum(1).argmin()]
            assert torch.equal(one.reconstruction.inputs[turn], here)
        assert one.evaluations == 20 * ROUNDS


def test_the_status_of_a_learner_is_its_own_and_the_worst_counts() -> None:
    spent = run(Last(Bowl(), good=1e-30))
    carried = (("budget", 10, True),) * (ROUNDS - 1)
    assert [one.rounds for one in spent] == [(("budget", 10, False), *carried)] * TRIALS
    # From far away ten steps are too few, from the last image they are enough.
    near = CENTRES[:1].expand(ROUNDS, -1, -1) + 0.001 * CENTRES
    far = STARTS * 100
    solved = run(Last(Bowl(), good=1e-4), see(centres=near), far)
    assert [[s for s, _, _ in one.rounds] for one in solved] == [
        ["budget", "converged", "converged", "converged"]
    ] * TRIALS
    assert [one.status for one in solved] == ["budget"] * TRIALS


def test_a_sick_update_diverges_and_leaves_the_others_alone() -> None:
    for attack in (Bowl(tolerance=1e-2), Last(Bowl())):
        sick, well = run(attack, see(sick=[(1, 0)])), run(attack)
        assert [s for s, _, _ in sick[0].rounds][1] == "diverged"
        assert sick[0].status == "diverged"
        for trial in (1, 2):
            assert torch.equal(sick[trial].reconstruction.inputs, well[trial].reconstruction.inputs)
            assert sick[trial].rounds == well[trial].rounds
        assert bool(sick[0].reconstruction.inputs.isfinite().all())


def test_updates_of_one_batch_are_one_update() -> None:
    """Rounds of the same images and weights are combined, by default to their mean, and solved once."""
    solved = run(Bowl(), images=STARTS[:, :, :1], threat=ThreatModel(repeated=True))
    for trial, one in enumerate(solved):
        expected = reached(STARTS[trial, 0, 0], CENTRES[:, trial].mean(0), 10)
        assert torch.allclose(one.reconstruction.inputs[0], expected, rtol=1e-12)
        assert (one.evaluations, one.rounds) == (10, ())


def test_a_learner_of_one_update_is_its_inner_attack() -> None:
    (seen, *_), images = see(), STARTS[:, :, :1]
    for a, b in zip(run(Last(Bowl()), (seen,), images), run(Bowl(), (seen,), images), strict=True):
        assert torch.equal(a.reconstruction.inputs, b.reconstruction.inputs)
        assert a.evaluations == b.evaluations


def test_a_learner_needs_start_images() -> None:
    with pytest.raises(TypeError, match="needs start images"):
        run(Last(Bowl()), images=None)


def test_a_direct_attack_answers_each_update() -> None:
    class Twice(DirectAttack):
        needs = frozenset({"update"})

        def reconstruct(self, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Reconstruction:
            (one,) = seen.observations
            return Reconstruction(2 * one.update["centre"][None], None, one.update["centre"].sum())

    for trial, one in enumerate(run(Twice(), images=None)):
        assert torch.equal(one.reconstruction.inputs, 2 * CENTRES[:, trial])
        assert one.reconstruction.targets is None
        assert (one.status, one.evaluations) == ("converged", ROUNDS)


def test_progress_rises_over_all_updates() -> None:
    told: list[float] = []
    run(Bowl(), watch=Watch(progress=told.append))
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_the_limit_is_of_each_update() -> None:
    for one in run(Bowl(), watch=Watch(limit=7)):
        assert [count for _, count, _ in one.rounds] == [7] * ROUNDS


# Paused and resumed


def same(a: list[Solved], b: list[Solved]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.reconstruction.inputs, other.reconstruction.inputs)
        assert torch.equal(one.reconstruction.score, other.reconstruction.score)
        assert (one.reconstruction.targets is None) == (other.reconstruction.targets is None)
        if one.reconstruction.targets is not None:
            assert torch.equal(one.reconstruction.targets, other.reconstruction.targets)
        assert (one.status, one.evaluations) == (other.status, other.evaluations)
        assert (one.history, one.rounds) == (other.history, other.rounds)


MANY = [
    Bowl(steps=25, tolerance=1e-9, optimizer=SGD(0.3)),
    Bowl(steps=12, restarts=2, always_restart=True, with_targets=False),
    Last(Bowl(steps=25, tolerance=1e-9, optimizer=SGD(0.3))),
    Bowl(steps=12, restarts=2, always_restart=True),
    Last(Bowl(steps=25, with_targets=False, optimizer=SGD(0.3)), good=1e-8),
]


@pytest.mark.parametrize(
    "attack", MANY, ids=["each", "starts without labels", "learner", "starts", "learner without labels"]
)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_killed_series_goes_on_to_the_same_bits(
    attack: Any, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "CHECK", 5)
    expected, path = run(attack), tmp_path / "group.safetensors"
    watch, pauses, kept = Watch(checkpoint=path, paused=Interrupted(every)), 0, 0
    while True:
        try:
            got = run(attack, watch=watch)
            break
        except Paused:
            pauses += 1
            left = set(tmp_path.iterdir())
            assert path in left, "the update that was interrupted"
            kept += len(left) == 2
            assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in left)
    assert pauses >= 3
    assert kept >= 1, "finished updates must have been kept"
    assert not list(tmp_path.iterdir()), "nothing of a finished series is left"
    same(got, expected)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two updates, as by a signal: the finished ones are read, not solved."""
    attack, path, asked = Last(Bowl()), tmp_path / "group.safetensors", []
    expected, learn = run(attack), Last.learn

    def third(self: Last, memory: Tensors, reconstruction: Reconstruction) -> Tensors:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return learn(self, memory, reconstruction)

    with monkeypatch.context() as patch:
        patch.setattr(Last, "learn", third)
        with pytest.raises(KeyboardInterrupt):
            run(attack, watch=Watch(checkpoint=path))
    solved: list[float] = []
    same(run(attack, watch=Watch(checkpoint=path, progress=solved.append)), expected)
    assert solved == [0.75, 1.0], "the first two updates were kept"
    assert not list(tmp_path.iterdir())


def test_a_damaged_account_begins_the_series_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unfinished update's own checkpoint is then that of no update in particular."""
    monkeypatch.setattr(drive, "CHECK", 5)
    attack, path = Bowl(steps=25, optimizer=SGD(0.3)), tmp_path / "group.safetensors"
    expected = run(attack)
    with pytest.raises(Paused):
        run(attack, watch=Watch(checkpoint=path, paused=Interrupted(8)))
    (account,) = set(tmp_path.iterdir()) - {path}
    account.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged"):
        same(run(attack, watch=Watch(checkpoint=path)), expected)
