import math

import pytest
import torch
from torch import nn

from keyhole.core.inversion import Target
from keyhole.core.keys import new_key
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.inversion.identity import (
    FEATURES,
    IDENTITIES,
    cross_entropy,
    flat,
    identity_loss,
    logit,
    max_margin,
    poincare,
    public_features,
)

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])


def test_cross_entropy_logit_and_margin():
    torch.testing.assert_close(
        cross_entropy(LOGITS, LABELS), nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    )
    assert logit(LOGITS, LABELS).tolist() == [-2.0, -0.2]
    assert max_margin(LOGITS, LABELS).tolist() == pytest.approx([0.5 - 2.0, 3.0 - 0.2])


def test_poincare_is_the_distance_in_the_ball():
    u = LOGITS[0] / LOGITS[0].abs().sum()
    v = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - 1e-4
    # The distance in the Poincare ball by its other formula, with Moebius addition.
    dot, uu, vv = float(-u @ v), float(u @ u), float(v @ v)
    added = ((1 + 2 * dot + vv) * -u + (1 - uu) * v) / (1 + 2 * dot + uu * vv)
    expected = 2 * math.atanh(float(added.norm()))
    assert float(poincare(LOGITS[:1], LABELS[:1])[0]) == pytest.approx(expected, rel=1e-9)


def test_poincare_is_finite_where_one_logit_stands_alone():
    alone = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    value = poincare(alone, torch.tensor([0])).sum()
    value.backward()
    assert value.isfinite()
    assert alone.grad.isfinite().all()


@pytest.mark.parametrize("name", IDENTITIES)
def test_each_loss_falls_with_the_own_logit(name):
    logits = LOGITS.clone().requires_grad_(True)
    IDENTITIES[name](logits, LABELS).sum().backward()
    assert (logits.grad.gather(1, LABELS[:, None]) < 0).all()


def target():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    task = Task.of(model, (1, 2, 2), 2, Bounds.of((0.0,), (1.0,), torch.float64))
    return Target(task, weights_of(model, torch.float64)), model


def test_the_logit_loss_keeps_to_public_features():
    attacked, model = target()
    public, images = torch.rand(600, 1, 2, 2).double(), torch.rand(2, 1, 2, 2).double()
    facts = public_features(attacked, public)
    features = model[:3](public).mean(0)
    torch.testing.assert_close(facts[FEATURES], features)
    expected = -model(images)[[0, 1], LABELS] + (model[:3](images) - features).square().mean(1)
    found = identity_loss("logit", attacked, facts, images, LABELS, 0, new_key(0))
    torch.testing.assert_close(found, expected.sum())


def test_views_average_over_copies():
    attacked, _ = target()
    images = torch.rand(2, 1, 2, 2).double()
    plain = identity_loss("cross_entropy", attacked, {}, images, LABELS, 0, new_key(0))
    seen = identity_loss("cross_entropy", attacked, {}, images, LABELS, 3, new_key(0))
    assert seen != plain
    flatter = torch.full_like(images, 0.5)  # copies of a flat image are that image
    torch.testing.assert_close(
        identity_loss("cross_entropy", attacked, {}, flatter, LABELS, 3, new_key(0)),
        identity_loss("cross_entropy", attacked, {}, flatter, LABELS, 0, new_key(0)),
    )


def test_flat_keeps_each_images_class():
    images = torch.arange(6.0).reshape(2, 3, 1, 1, 1)
    pixels, labels = flat(images)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert pixels.flatten().tolist() == list(range(6))
