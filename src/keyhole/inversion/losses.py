"""What generators and discriminators are trained on, and what an inversion is told by a discriminator: pure functions.

For a discriminator of k logits D_1, ..., D_k, S = log(sum_k exp D_k) is the log-odds of an image being real, as
"generated" is one more class whose logit is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def gradient_penalty(critic: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Mean of (||d critic(x) / dx|| - 1)^2 over points x (b, ...), a scalar, without the penalty's weight.

    Args:
        critic: images to one number each, (b,), where no image has a say in another's number.
        points: where to look, usually on straight lines between real and generated images.

    Reference: Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, equation 3,
    https://arxiv.org/abs/1704.00028.
    """
    points = points.detach().requires_grad_(True)
    (slopes,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return (torch.linalg.vector_norm(slopes.flatten(1), dim=1) - 1.0).square().mean()


def log_odds_of_real(logits: Tensor) -> Tensor:
    """S (b,) of logits (b, k)."""
    return torch.logsumexp(logits, dim=1)


def surprise_of_real(logits: Tensor) -> Tensor:
    """-log P(real) = softplus(S) - S, the mean over logits (b, k): an inversion's prior, log 1.2 for five zeros."""
    # softplus(-S) is the same without the difference of two large numbers.
    return F.softplus(-log_odds_of_real(logits)).mean()


def soft_cross_entropy(wanted: Tensor, logits: Tensor) -> Tensor:
    """Mean over the batch of -sum_k p_k log softmax(logits)_k, for probabilities p (b, k) and logits (b, k)."""
    return -(wanted * torch.log_softmax(logits, dim=1)).sum(1).mean()


def soft_label_loss(wanted: Tensor, labelled: Tensor, unlabelled: Tensor, generated: Tensor) -> Tensor:
    """What a discriminator that knows the target's labels is trained on.

    CE(p, softmax D(x)) + (E[softplus(S(u)) - S(u)] + E[softplus(S(G(z)))]) / 2.

    Args:
        wanted: what the target thinks of public images x, probabilities (b, k).
        labelled: logits D(x), (b, k).
        unlabelled: logits of other public images u, (b, k).
        generated: logits of generated images G(z), (b, k).

    Reference: Chen et al., "Knowledge-Enriched Distributional Model Inversion Attacks", ICCV 2021, equations 2 to 4,
    https://arxiv.org/abs/2010.04092, with the weights of its code.
    """
    fooled = F.softplus(log_odds_of_real(generated)).mean()
    return soft_cross_entropy(wanted, labelled) + (surprise_of_real(unlabelled) + fooled) / 2


def total_entropy(logits: Tensor) -> Tensor:
    """Sum over the batch, not the mean, of the entropy of softmax(logits), logits (b, k)."""
    spread = torch.log_softmax(logits, dim=1)
    return -(spread.exp() * spread).sum()


def feature_gap(generated: Tensor, real: Tensor) -> Tensor:
    """Mean over features of |mean over the batch of generated - mean over the batch of real|, both (b, f).

    Reference: Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, section 3.1,
    https://arxiv.org/abs/1606.03498, there squared; absolute as in the code of Chen et al. 2021.
    """
    return (generated.mean(0) - real.mean(0)).abs().mean()


def real_or_not(log_odds: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of log-odds (b,) with all images real, or none: mean over the batch."""
    return F.softplus(-log_odds if real else log_odds).mean()
