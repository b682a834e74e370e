import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from keyhole.core.inversion import Target
from keyhole.core.task import Bounds, Task, weights_of
from keyhole.inversion.evaluate import Evaluator, components, diversity, frechet, score, score_as_others


def gaussian(n, m, seed, spread=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, spread, (n, m)))


def by_scipy(real, made):
    """The textbook formula with scipy's matrix square root of the product."""
    real, made = real.numpy(), made.numpy()
    one, two = np.cov(real, rowvar=False), np.cov(made, rowvar=False)
    root = linalg.sqrtm(one @ two).real
    return float(((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root))


def test_frechet_is_the_textbook_formula():
    real, made = gaussian(60, 4, 0), gaussian(40, 4, 1, 2.0, 0.5)
    assert frechet(real, made) == pytest.approx(by_scipy(real, made), rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_and_a_shift_counts_squared():
    real = gaussian(100, 3, 2)
    assert frechet(real, real) == pytest.approx(0.0, abs=1e-9)
    assert frechet(real, real + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25.0, rel=1e-9)


def test_few_images_are_compared_on_principal_components_of_the_real_ones():
    # All variance of the real ones lies in the first two features; the made ones differ in the last only.
    real = torch.cat([gaussian(12, 2, 3, 5.0), 1e-9 * gaussian(12, 6, 4)], 1)
    made = real.clone()
    made[:, -1] += 100.0
    assert components(12) == 2
    assert frechet(real, made) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(frechet(real[:1], made))


def test_diversity_is_the_mean_distance_within_classes():
    images = torch.rand(3, 4, 1, 2, 2, dtype=torch.float64)
    pairs = [torch.linalg.vector_norm(own[i] - own[j]) for own in images for i in range(4) for j in range(i)]
    assert diversity(images) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)
    assert diversity(images[:, :1].expand(-1, 4, -1, -1, -1)) == 0.0
    assert math.isnan(diversity(images[:, :1]))


class Reader(nn.Module):
    """Features are the four pixels; class i is likeliest where pixel i is brightest."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight.data = torch.eye(4)

    def forward(self, x):
        return self.head(x.flatten(1))


def lit(*pixels):
    """An image for each number: that pixel lit."""
    return torch.eye(4)[list(pixels)].reshape(-1, 1, 2, 2)


@pytest.fixture
def evaluator():
    model = Reader()
    task = Task.of(model, (1, 2, 2), 4, Bounds.of((0.0,), (1.0,)))
    # Private classes 0 and 1 of the target are the evaluator's classes 2 and 3.
    private, classes = torch.cat([lit(2, 2, 3), 0.5 * lit(3)]), torch.tensor([0, 0, 1, 1])
    return Evaluator.of(Target(task, weights_of(model)), (2, 3), private, classes)


def test_scores_of_a_known_evaluator(evaluator):
    images = torch.stack([lit(2, 0), lit(3, 3)])
    found = score(evaluator, images)
    assert found.top1 == (0.5, 1.0)
    assert found.accuracy == 0.75
    assert found.accuracy_top5 == 1.0  # of four classes the five likeliest are all
    # To the nearest of its class: 0, 2 (two pixels apart), 0, 0.
    assert found.knn_distance == pytest.approx(0.5)
    # To the class's mean: 0 and 2 for class 0; (1 - .75)^2 for class 1.
    assert found.feature_distance == pytest.approx((0 + 2 + 2 * 0.25**2) / 4)
    assert found.diversity == pytest.approx(math.sqrt(2) / 2)


def test_taken_for_the_other_class_nothing_is_recognised(evaluator):
    images = torch.stack([lit(2, 2), lit(3, 3)])
    assert score(evaluator, images).accuracy == 1.0
    assert score_as_others(evaluator, images).accuracy == 0.0
    swapped = score_as_others(evaluator, images.flip(0))
    assert swapped.accuracy == 1.0
