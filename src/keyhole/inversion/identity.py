"""Identity losses: how far images are from being taken for their class by the target network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from keyhole.core.inversion import Target
from keyhole.core.types import Key, Tensors
from keyhole.solve.views import averaged

IdentityName = Literal["cross_entropy", "logit", "max_margin", "poincare"]

FEATURES = "features"
"""Name of the fact that holds the target's mean features of public images."""
_PUBLIC = 5000
"""Public images behind that mean."""
_SLICE = 256


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log p_y``, which fades where the network is sure already.

    Args:
        logits: (n, k).
        labels: class of each image, int64 (n,).

    Returns:
        (n,), as of all losses here.
    """
    return -torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]


def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative logit of the class (Nguyen et al. 2023, "Re-thinking model inversion", arXiv 2304.01669)."""
    return -logits.gather(1, labels[:, None])[:, 0]


def max_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit less that of the class (Yuan et al. 2023, arXiv 2302.09814)."""
    own = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(-1) + logit(logits, labels)


def poincare(logits: Tensor, labels: Tensor) -> Tensor:
    """Hyperbolic distance between the logits and the class (Struppek et al. 2022, arXiv 2201.12179).

    ``arccosh(1 + 2 |u - v|^2 / ((1 - |u|^2)(1 - |v|^2)))`` with u the logits over their l1 norm and v the one-hot class
    less 1e-4.
    """
    u = logits / logits.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    v = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype) - 1e-4
    # One logit alone makes |u| = 1, where the distance is infinite.
    inside = (1 - u.square().sum(-1)).clamp_min(1e-6) * (1 - v.square().sum(-1)).clamp_min(1e-6)
    return torch.acosh(1 + 2 * (u - v).square().sum(-1) / inside)


IDENTITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "logit": logit,
    "max_margin": max_margin,
    "poincare": poincare,
}


def public_features(target: Target, public: Tensor) -> Tensors:
    """What `identity_loss` keeps close to with ``logit``: the target's mean features of public images, (m,)."""
    images = public[:_PUBLIC]
    with torch.no_grad():
        features = [target.inside(part)[1] for part in torch.split(images, _SLICE)]
    return {FEATURES: torch.cat(features).mean(0)}


def identity_loss(
    name: str, target: Target, facts: Tensors, images: Tensor, labels: Tensor, views: int, key: Key
) -> Tensor:
    """The sum over images of their identity loss, averaged over transformed copies where there are views.

    With ``logit`` the mean squared distance of the features to those of public images joins, weight 1, as in LOMMA's
    released configuration: alone the logit has no bound.

    Args:
        name: of the loss.
        target: the attacked network.
        facts: of `public_features`, for ``logit``.
        images: pixels (n, c, h, w).
        labels: int64 (n,).
        views: transformed copies of each image; 0: the image as it is.
        key: draws of the copies.
    """

    def score(seen: Tensor) -> Tensor:
        logits, features = target.inside(seen)
        value = IDENTITIES[name](logits, labels)
        if name == "logit":
            value = value + (features - facts[FEATURES]).square().mean(-1)
        return value

    return averaged(score, images, views, key).sum()


def flat(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (m, k, c, h, w) of k classes as (m k, c, h, w), and the class of each."""
    many, classes = images.shape[:2]
    return images.flatten(0, 1), torch.arange(classes, device=images.device).expand(many, -1).flatten()
