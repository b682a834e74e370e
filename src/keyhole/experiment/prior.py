"""How often a guess would count as a leak if there were no update: the prior of reconstruction bounds."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

LEAK_SSIM = 0.7
"""The similarity from which on the report counts a leak; that it must also beat the controls only makes leaks rarer."""

MOST_IMAGES = 256
WORK = 2e10
"""Multiplications that the estimate may take, about; large images get fewer of them."""

CONFIDENCE = 0.95
WINDOW = 7


def best_guess(pixels: Tensor, labels: Tensor) -> float:
    """An upper confidence limit on the share of images that the best single guess comes near.

    ``max over guesses g of P(SSIM(g, x) >= 0.7)``. Tried are each image, the mean of all, the means of classes,
    and the means of each image with its 3 and its 15 nearest. The share of a guess is that among the images which it
    was not made of (the mean of all is judged on all), and the limit is the one-sided 95 % one of Clopper and Pearson
    for the best share, which is at least one over the number of images.

    What is estimated: a better guess than those tried may exist. That the best of many shares is taken errs on the
    side of too high.

    Args:
        pixels: (n, c, h, w) in [0, 1], of the kind that is attacked; n at least 2.
        labels: their classes, int64 (n,).
    """
    c, h, w = pixels.shape[1:]
    positions = c * (h - WINDOW + 1) * (w - WINDOW + 1)
    count = min(len(pixels), MOST_IMAGES, max(2, int((WORK / (4 * WINDOW**2 * positions)) ** 0.5)))
    images, labels = pixels[:count].float(), labels[:count]
    among = pairwise_ssim(images, images)
    nearest = among.argsort(1, descending=True)
    made_of = [torch.eye(count), *((labels == label).float()[None] for label in set(labels.tolist()))]
    made_of += [torch.zeros(count, count).scatter(1, nearest[:, :k], 1.0) for k in (4, 16) if 8 * k <= count]
    members = torch.cat(made_of)
    members = members[members.sum(1) < count]
    guesses = torch.tensordot(members / members.sum(1, keepdim=True), images, dims=1)
    near = pairwise_ssim(torch.cat([guesses, images.mean(0)[None]]), images) >= LEAK_SSIM
    judged = torch.cat([members == 0, torch.ones(1, count, dtype=torch.bool)])
    hits, others = (near & judged).sum(1), judged.sum(1)
    share = hits / others
    best = int((share + others * 1e-9).argmax())  # of equal shares the one that more images speak for
    return _upper_limit(int(hits[best]), int(others[best]))


def _upper_limit(hits: int, count: int) -> float:
    return 1.0 if hits == count else float(stats.beta.ppf(CONFIDENCE, hits + 1, count - hits))


def pairwise_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of every image of ``a`` with every one of ``b``, as `keyhole.metrics.image` defines it: (n, m).

    Args:
        a: (n, c, h, w) pixels in [0, 1].
        b: (m, c, h, w) pixels in [0, 1].
    """
    dark, flat = 0.01**2, 0.03**2  # the stabilising constants of Wang et al. 2004 for a data range of 1
    left, right = _windows(a), _windows(b)
    total = a.new_zeros(len(a), len(b))
    for x, y in zip(left, right, strict=True):
        # Deviations from each window's own mean, so that their products do not cancel.
        mx, my = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        dx, dy = x - mx, y - my
        vx, vy = dx.square().mean(1, keepdim=True), dy.square().mean(1, keepdim=True)
        light = (2 * mx @ my.T + dark) / (mx.square() + my.square().T + dark)
        total += light * (2 * (dx @ dy.T) / WINDOW**2 + flat) / (vx + vy.T + flat)
    return total / len(left)


def _windows(images: Tensor) -> Tensor:
    """All windows by channel and position: (c x positions, n, 49)."""
    patches = images.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1)
    return patches.permute(1, 2, 3, 0, 4, 5).reshape(-1, images.shape[0], WINDOW**2)
