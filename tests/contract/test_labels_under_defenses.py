"""The adaptive attacker reads labels off what it makes of the update, not off what the defense left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from keyhole.experiment.plan import Group
from keyhole.experiment.run import run_group

EPISODES = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 0, 1, 4), (2, 6, 3, 3)]


Make = Callable[..., Any]


def overlap(make_setup: Make, make_trial: Make, labels: str, attacker: str, *defense: Any) -> float:
    options = {"steps": 1, "labels": labels}
    trials = tuple(make_trial("idlg", options, e, defense, attacker=attacker, batch_size=4) for e in EPISODES)
    outcomes = run_group(Group(trials), make_setup()).outcomes
    assert {o.status for o in outcomes} == {"budget"}, outcomes[0].detail
    return sum(o.metrics["label_accuracy"][0] for o in outcomes) / len(outcomes)


@pytest.mark.parametrize("rule", ["bias_corrected", "geng", "ilrg"])
def test_a_rescaled_mask_is_undone_before_labels_are_read(rule: str, make_setup: Any, make_trial: Any) -> None:
    """With and without rescaling the mask is the same, so what is left of the update must read the same."""
    plain = ("random_masking", {"rate": 0.5})
    rescaled = ("random_masking", {"rate": 0.5, "rescale": True})
    known = overlap(make_setup, make_trial, rule, "adaptive:survivors", plain)
    assert overlap(make_setup, make_trial, rule, "adaptive:survivors", rescaled) == known


def test_clipping_does_not_hide_labels_from_who_knows_it(make_setup: Any, make_trial: Any) -> None:
    """`auto` then counts by signs and ratios, which a factor leaves alone."""
    clip = ("clip", {"norm": 0.1, "scale": "update"})
    by_ratio = overlap(make_setup, make_trial, "bias_corrected", "naive")
    assert by_ratio > 0.7
    assert overlap(make_setup, make_trial, "auto", "adaptive:norm_matched", clip) == by_ratio
