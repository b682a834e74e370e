"""How well inverted images are recognised, by a network that no attack ever sees.

The evaluator has another architecture than the target and has seen the private images. Nothing is ever chosen by it: it
only scores what is final.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keyhole.core.inversion import Target

PER_FEATURE = 5
"""Images for each feature that a Frechet distance needs; with fewer, principal components stand in for features."""
COMPONENTS = 64
"""Most principal components."""
_SLICE = 256
_PAIRS = 2048


@dataclass(frozen=True, eq=False)
class Evaluator:
    """A trained classifier, and the private training images as it sees them."""

    network: Target
    labels: tuple[int, ...]
    """The evaluator's own class of each private class."""
    private: tuple[Tensor, ...]
    """Features (n, m) of each class's private training images."""

    @classmethod
    def of(cls, network: Target, labels: Sequence[int], images: Tensor, classes: Tensor) -> Evaluator:
        """With private training images (n, c, h, w) in [0, 1] and their classes (n,), numbered as the target does."""
        features = _inside(network, images)[1]
        private = tuple(features[classes.to(features.device) == place] for place in range(len(labels)))
        return cls(network, tuple(labels), private)


@dataclass(frozen=True)
class Scores:
    """What the evaluator says of the images of one target; lists are by private class."""

    top1: tuple[float, ...]
    """Share of the class's images that are recognised as it."""
    top5: tuple[float, ...]
    """Share whose five likeliest classes hold it."""
    knn_distance: float
    """Mean squared distance of features to the nearest private image of the class."""
    feature_distance: float
    """Mean squared distance of features to the mean of the class's private images."""
    fid: float
    """Frechet distance between all images and the private ones, on features or their principal components."""
    diversity: float
    """Mean distance between two images of one class, in pixels; NaN for a single image."""

    @property
    def accuracy(self) -> float:
        """Attack accuracy: the mean over classes of `top1`."""
        return math.fsum(self.top1) / len(self.top1)

    @property
    def accuracy_top5(self) -> float:
        """The mean over classes of `top5`."""
        return math.fsum(self.top5) / len(self.top5)


def score(evaluator: Evaluator, images: Tensor) -> Scores:
    """Score images as what they were made to be.

    Args:
        evaluator: see there.
        images: pixels (k, n, c, h, w) in [0, 1], n of each private class.
    """
    classes, each = images.shape[:2]
    logits, features = _inside(evaluator.network, images.flatten(0, 1))
    wanted = torch.tensor(evaluator.labels, device=logits.device).repeat_interleave(each)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == wanted[:, None]
    by_class = features.reshape(classes, each, -1)
    nearest = [_squared(own, real).amin(1) for own, real in zip(by_class, evaluator.private, strict=True)]
    centred = [(own - real.mean(0)).square().sum(1) for own, real in zip(by_class, evaluator.private, strict=True)]
    return Scores(
        top1=_shares(ranked[:, 0], classes),
        top5=_shares(ranked.any(1), classes),
        knn_distance=float(torch.cat(nearest).mean()),
        feature_distance=float(torch.cat(centred).mean()),
        fid=frechet(torch.cat(evaluator.private), features),
        diversity=diversity(images),
    )


def score_as_others(evaluator: Evaluator, images: Tensor) -> Scores:
    """The same images taken for each of the wrong private classes in turn, on average: random private labels."""
    classes = len(images)
    shifted = [score(evaluator, images.roll(shift, 0)) for shift in range(1, classes)]
    count = len(shifted)

    def mean(name: str) -> float:
        return math.fsum(getattr(one, name) for one in shifted) / count

    def means(name: str) -> tuple[float, ...]:
        return tuple(math.fsum(column) / count for column in zip(*(getattr(one, name) for one in shifted), strict=True))

    return Scores(
        means("top1"), means("top5"), mean("knn_distance"), mean("feature_distance"), mean("fid"), mean("diversity")
    )


def diversity(images: Tensor) -> float:
    """Mean Euclidean distance between two images of one class; NaN where there is one image only.

    Args:
        images: pixels (k, n, c, h, w).
    """
    each = images.shape[1]
    if each < 2:
        return math.nan
    flat = images.flatten(2).double()
    return float(torch.stack([torch.pdist(own).mean() for own in flat]).mean())


def frechet(real: Tensor, made: Tensor) -> float:
    """Frechet distance of two sets of features, taken for Gaussian.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6), here on the
    evaluator's features. Covariances of fewer than `PER_FEATURE` images a feature say little, so that with few images
    both sets are first projected on the leading principal components of the real ones, as many as the images allow.

    Args:
        real: (n, m).
        made: (n', m).
    """
    real, made = real.double(), made.double()
    fewest = min(len(real), len(made))
    if fewest < 2:
        return math.nan
    if fewest < PER_FEATURE * real.shape[1]:
        keep = min(components(fewest), real.shape[1])
        centre = real.mean(0)
        axes = torch.linalg.eigh((real - centre).T @ (real - centre)).eigenvectors[:, -keep:]
        real, made = (real - centre) @ axes, (made - centre) @ axes
    between = (real.mean(0) - made.mean(0)).square().sum()
    first, second = (torch.cov(own.T).reshape(own.shape[1], -1) for own in (real, made))
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    values, axes = torch.linalg.eigh(first)
    root = axes * values.clamp_min(0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    return float(between + first.trace() + second.trace() - 2 * cross)


def components(images: int) -> int:
    """Principal components that a Frechet distance of so few images uses."""
    return max(1, min(COMPONENTS, images // PER_FEATURE))


def _inside(network: Target, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        parts = [network.inside(part) for part in torch.split(images, _SLICE)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([features for _, features in parts])


def _shares(hits: Tensor, classes: int) -> tuple[float, ...]:
    return tuple(hits.reshape(classes, -1).double().mean(1).tolist())


def _squared(own: Tensor, real: Tensor) -> Tensor:
    """Squared distances (n, n'), a slice of the real ones at a time."""
    return torch.cat([torch.cdist(own.double(), part.double()).square() for part in torch.split(real, _PAIRS)], 1)
