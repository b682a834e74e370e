"""DLG-FB: its start against the formula over a made-up history, what counts as a success, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keyhole.attacks.dlg import dlg
from keyhole.attacks.dlg_fb import FeedbackBlending, dlg_fb
from keyhole.attacks.idlg import idlg
from keyhole.core.keys import new_key, normal, split
from keyhole.core.tensors import map_tensors
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Reconstruction, Tensors
from keyhole.errors import ConfigError, UnknownName
from keyhole.solve.drive import solve
from keyhole.solve.lift import Shared, lift

KEY = new_key(47)
IMAGES = normal(KEY, (9, 2, 1, 4, 4), torch.float64)
"""Nine made-up reconstructions of two images."""


def answer(number: int, score: float) -> Reconstruction:
    return Reconstruction(IMAGES[number], None, torch.tensor(score, dtype=torch.float64))


def memories(attack: FeedbackBlending, scores: list[float]) -> list[Tensors]:
    """The memory before the first update and after each of them."""
    found = [attack.begin(IMAGES[0])]
    for number, score in enumerate(scores):
        found.append(attack.learn(found[-1], answer(number, score)))
    return found


FRESH = torch.full((2, 1, 4, 4), 9.0).double()
GOOD, BAD = 1e-6, 1.0
HISTORY = [GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD, float("inf"), GOOD]


def by_hand(alpha: float, warmup: int, counted: list[int]) -> list[Tensor]:
    """What each update starts from: the weighted sum of the successes before it, written out."""
    starts = []
    for number in range(len(HISTORY) + 1):
        before = [i for i in counted if i < number]
        if len(before) < warmup:
            starts.append(FRESH)
            continue
        total = alpha ** (len(before) - 1) * IMAGES[before[0]]
        for place, i in enumerate(before[1:], 2):
            total = total + (1 - alpha) * alpha ** (len(before) - place) * IMAGES[i]
        starts.append(total)
    return starts


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.0, 1.0])
@pytest.mark.parametrize("warmup", [1, 2, 4])
def test_the_start_is_the_average_of_successes(alpha: float, warmup: int) -> None:
    attack = dlg_fb(alpha=alpha, warmup=warmup)
    expected = by_hand(alpha, warmup, [i for i, score in enumerate(HISTORY) if score == GOOD])
    for memory, start in zip(memories(attack, HISTORY), expected, strict=True):
        assert torch.allclose(attack.next_start(memory, FRESH), start, rtol=1e-12, atol=1e-14)


def test_the_authors_form_for_a_half() -> None:
    """Half the last start and half the reconstruction that came of it."""
    attack = dlg_fb(warmup=1)
    history = memories(attack, [GOOD] * 5)
    for number in range(1, 5):
        start, following = (attack.next_start(history[i], FRESH) for i in (number, number + 1))
        assert torch.allclose(following, 0.5 * start + 0.5 * IMAGES[number], rtol=1e-12)


def test_failures_leave_the_blend_as_it_was() -> None:
    attack = dlg_fb()
    history = memories(attack, [GOOD, GOOD, BAD, float("inf"), float("nan"), 1e-4 * 1.001])
    for memory in history[3:]:
        assert torch.equal(memory["blend"], history[2]["blend"])
        assert float(memory["successes"]) == 2
    damaged = Reconstruction(torch.full_like(IMAGES[0], float("nan")), None, torch.tensor(BAD).double())
    assert bool(attack.learn(history[2], damaged)["blend"].isfinite().all())


def test_without_a_filter_failures_are_blended_too() -> None:
    attack = dlg_fb(keep_failures=True, warmup=1)
    expected = by_hand(0.5, 1, list(range(len(HISTORY))))
    for memory, start in zip(memories(attack, HISTORY), expected, strict=True):
        assert torch.allclose(attack.next_start(memory, FRESH), start, rtol=1e-12, atol=1e-14)


def test_without_feedback_the_blend_is_never_used() -> None:
    attack = dlg_fb(feedback=False)
    for memory in memories(attack, HISTORY):
        assert torch.equal(attack.next_start(memory, FRESH), FRESH)


def test_every_place_of_a_batch_has_its_own_blend() -> None:
    attack = dlg_fb(warmup=1)
    memory = memories(attack, [GOOD, GOOD])[-1]
    for place in (0, 1):
        expected = 0.5 * IMAGES[0, place] + 0.5 * IMAGES[1, place]
        assert torch.allclose(attack.next_start(memory, FRESH)[place], expected, rtol=1e-12)


def test_a_success_is_a_matter_of_the_score_alone() -> None:
    attack = dlg_fb(success=1e-3)
    for score, hit in ((0.0, True), (1e-3, True), (1.001e-3, False), (float("inf"), False), (float("nan"), False)):
        for images in (IMAGES[0], torch.zeros_like(IMAGES[0]), IMAGES[0] * float("nan")):
            for targets in (None, torch.eye(2).double()):
                told = Reconstruction(images, targets, torch.tensor(score, dtype=torch.float64))
                assert bool(attack.matched(told)) is hit


def test_its_memory_lifts() -> None:
    attack = dlg_fb()
    scores = torch.tensor([[GOOD, GOOD, BAD], [BAD, GOOD, BAD], [GOOD, BAD, GOOD]], dtype=torch.float64)
    memory = lift(attack.begin, Shared())(IMAGES[:3])
    for turn in range(3):
        told = Reconstruction(IMAGES[3 * turn : 3 * turn + 3], None, scores[:, turn])
        memory = lift(attack.learn, Shared())(memory, told)
    starts = lift(attack.next_start, Shared())(memory, FRESH.expand(3, -1, -1, -1, -1))
    for trial in range(3):
        own = attack.begin(IMAGES[0])
        for turn in range(3):
            own = attack.learn(own, Reconstruction(IMAGES[3 * turn + trial], None, scores[trial, turn]))
        assert torch.equal(starts[trial], attack.next_start(own, FRESH))


def test_what_it_runs_on_each_update() -> None:
    first, second = dlg_fb(steps=7, start="gray"), dlg_fb(base="dlg", steps=7)
    assert (first.inner.labels, first.inner.steps, first.initial, first.restarts) == ("auto", 7, "gray", 1)
    assert (second.inner.labels, second.restarts, second.initial) == ("optimised", 1, "random")
    assert first.needs == idlg().needs
    assert dlg_fb(labels="given").needs == {"weights", "update", "targets"}
    assert second.needs == dlg().needs


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"warmup": 0},
        {"success": 0.0},
        {"success": -1.0},
        {"steps": 0},
        {"tolerance": -1.0},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dlg_fb(**options)


def test_an_unknown_label_rule_is_answered_with_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="did you mean 'given'"):
        dlg_fb(labels="givn")


# On real updates


def run(bench: Any, attack: Any, rounds: int, *, networks: int = 1) -> tuple:
    """A series of different images near a common mean, in two trials."""
    mean = bench.secrets(2, 1)[0].inputs
    secrets = tuple(batch._replace(inputs=0.9 * mean + 0.1 * batch.inputs) for batch in bench.secrets(2, 1, rounds))
    fresh = tuple(
        bench.weights._replace(params=map_tensors(lambda w, k=k: w * (1 + 0.05 * k), bench.weights.params))
        for k in range(networks)
    )
    seen = bench.see(secrets, ThreatModel(), weights=fresh * (rounds // networks))
    noise = (
        normal(KEY, (2, 1, rounds, 1, 8, 8), torch.float64).flatten(2, 3)[:, :, :rounds].reshape(2, 1, rounds, 1, 8, 8)
    )
    return secrets, solve(attack, bench.task, ThreatModel(), seen, noise, split(KEY, 2), Shared(fresh))


@pytest.mark.parametrize("networks", [1, 3])
def test_feedback_saves_evaluations_where_images_are_alike(networks: int, bench: Any) -> None:
    rounds = 3
    spent = {}
    for feedback in (False, True):
        attack = dlg_fb(feedback=feedback, warmup=1, steps=250, tolerance=1e-6)
        secrets, solved = run(bench, attack, rounds, networks=networks)
        for i, one in enumerate(solved):
            assert [status for status, _, _ in one.rounds] == ["converged"] * rounds
            assert one.evaluations == sum(count for _, count, _ in one.rounds)
            assert one.reconstruction.inputs.shape == (rounds, 1, 8, 8)
            truth = torch.cat([s.inputs[i] for s in secrets])
            assert float((one.reconstruction.inputs - truth).square().mean()) < 1e-3
        spent[feedback] = [[count for _, count, _ in one.rounds] for one in solved]
    for with_it, without in zip(spent[True], spent[False], strict=True):
        assert with_it[0] == without[0], "the first update has nothing to learn from"
        assert sum(with_it[1:]) < 0.8 * sum(without[1:])
