"""How long clipped steps are, against steps of torch's own whose length is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded_case import LR, MODEL, Small, keep, record
from torch import Tensor, nn

from keyhole.core.task import Bounds, Task
from keyhole.core.types import Weights
from keyhole.experiment.recorded import audit_transcript
from keyhole.experiment.recorded_training import FEW, scale_of
from keyhole.experiment.transcript import Recorded

CLIP = 0.2


def clipped(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], float]:
    """One step under torch's own clipping; and how much shorter it is for that."""
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    update = {name: LR * value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return update, min(1.0, CLIP / norm)


def case(count: int, seed: int) -> tuple[Small, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = Small()
    return model, torch.rand(count, 1, 8, 8), torch.randint(0, 4, (count,))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_the_length_of_a_clipped_step_is_where_counts_of_labels_are_whole(count: int) -> None:
    for seed in range(4):
        model, images, labels = case(count, seed)
        update, shorter = clipped(model, images, labels)
        task = Task.of(model, (1, 8, 8), 4, Bounds.of((0.0,), (1.0,)))
        weights = Weights({name: value.detach() for name, value in model.named_parameters()}, {})
        one = Recorded(1, "7", weights, update, count, {})
        assert shorter < 0.7, "the case is one in which the learning rate alone says something else"
        found = scale_of(task, one, count, 1, LR)
        # One class alone, or classes as many as predicted, fit many lengths.
        if len(labels.unique()) > 1 and count < 12:
            assert found == pytest.approx(LR * shorter, rel=0.15), (seed, labels)
        assert 0 < found <= LR
        assert scale_of(task, one, FEW + 1, 1, LR) == LR


def test_clients_that_clip_are_attacked_when_it_is_known(tmp_path: Path) -> None:
    model, images, labels = case(3, 1)
    update, _ = clipped(model, images, labels)
    attack = 'attacks=[{name="inverting_gradients",steps=400,restarts=1,tv=0.0}]'
    secrets = keep(tmp_path / "s", "7", images, labels)
    told = {"lr": LR, "local-epochs": 1, "batch-size": 3}
    silent = record(tmp_path / "silent", model, {"7": update}, {"7": 3}, **told)
    (given,) = audit_transcript(silent, MODEL, secrets, (attack, f"clip={CLIP}")).found
    assert not given.training.scale_known
    assert f"clip {CLIP}, as given" in given.training.words
    assert given.attempts[0].metrics["label_accuracy"] == [1.0] * 3
    assert min(given.attempts[0].metrics["ssim"]) > 0.9
    recorded = record(tmp_path / "recorded", model, {"7": update}, {"7": 3}, **told, clip=CLIP)
    (found,) = audit_transcript(recorded, MODEL, secrets, (attack,)).found
    assert found.attempts[0].metrics == given.attempts[0].metrics
    assert f"clip {CLIP}, from the recorded config" in found.training.words
