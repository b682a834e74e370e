"""One step of gradient matching as the literature's scripts write it: one image at a time, no functional transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def classic_step(
    model: nn.Module, image: Tensor, label: Tensor, target: Sequence[Tensor], scale: float = 1.0, lean: bool = True
) -> Tensor:
    """Put the gradient of ``scale * |g(image) - target|^2`` into ``image.grad`` and return the objective.

    Args:
        model: differentiated by its own parameters.
        image: the dummy image, (1, c, h, w), a leaf that requires a gradient.
        label: its class index, (1,).
        target: the observed gradient, in the order of the model's parameters.
        scale: 1 for the raw objective of DLG and iDLG, ``1 / |target|^2`` for the relative one.
        lean: stop at the image. The scripts call plain ``backward()``, which also computes, for nothing, gradients
            for every weight of the model.
    """
    image.grad = None
    loss = nn.functional.cross_entropy(model(image), label)
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    distance = torch.zeros(())
    for mine, theirs in zip(gradient, target, strict=True):
        distance = distance + (mine - theirs).pow(2).sum()
    objective = scale * distance
    if lean:
        objective.backward(inputs=[image])
    else:
        model.zero_grad()
        objective.backward()
    return objective.detach()
