"""The scorer's retrieval by features: against images that are made to share them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from keyhole.core.keys import fold_in, new_key, uniform
from keyhole.experiment import run
from keyhole.zoo.datasets import Pool


def test_an_image_far_in_pixels_is_found_by_its_features(
    make_setup: Any, make_trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ENOUGH_CANDIDATES", 5)
    setup, trial = make_setup(model="mlp"), make_trial()
    others = uniform(fold_in(new_key(3), "candidates"), (5, 1, 8, 8), torch.float64)
    pool = Pool(others, torch.zeros(5, dtype=torch.int64), tuple(range(5)))
    setup = replace(setup, data=replace(setup.data, candidates=pool))
    truth = setup.data.target.images[:1]
    # As much of the way to a candidate as the first layer does not see: 24 units look at 64 pixels.
    blind = torch.linalg.svd(setup.weights[0][0].params["1.weight"]).Vh[24:]
    moved = truth + ((others[:1] - truth).flatten() @ blind.T @ blind).reshape(truth.shape)
    features = run._Features(setup, trial)
    assert torch.allclose(features.of(moved), features.of(truth), atol=1e-9)
    scores = []
    for guess in (moved, truth, others[:1]):
        result = run.GroupResult([])
        run._score(result, trial, run.Answer(guess, None, "converged", 1), setup, 0.0, features)
        metrics = result.outcomes[0].metrics
        scores.append((metrics["identified"], metrics["identified_by_features"]))
    assert scores == [([0.0], [1.0]), ([1.0], [1.0]), ([0.0], [0.0])]


def test_few_candidates_say_little_and_are_left_out(make_setup: Any, make_trial: Any) -> None:
    setup, trial, result = make_setup(), make_trial(), run.GroupResult([])
    answer = run.Answer(setup.data.target.images[:1], None, "converged", 1)
    run._score(result, trial, answer, setup, 0.0, run._Features(setup, trial))
    assert not {"identified", "identified_by_features"} & set(result.outcomes[0].metrics)
