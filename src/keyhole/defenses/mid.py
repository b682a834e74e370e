"""MID: a variational bottleneck before the head, which lets little of the image through."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, new_key, uniform
from keyhole.core.modes import NoisyLayer, one_mask_shape
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.types import Batch, Trace
from keyhole.defenses.knows_loss import KnowsLoss
from keyhole.errors import ModelError, check_range

SHIFT = 5.0
"""Subtracted before the softplus, so that deviations begin near 0.007."""

GUARD = 1e-7
"""Added to a deviation before its logarithm."""


class MeanNoise(KnowsLoss):
    """Match the whole objective's gradient with the bottleneck at its mean, as if nothing had been drawn.

    Where the attacker is told what was drawn (``masks``), it uses that.
    """

    name = "mean_noise"

    def truth_stays(self, rounds: int, series: int, steps: int = 1) -> bool:
        """For one gradient of known noise: what one step drew says nothing of the next."""
        return rounds == 1 and steps == 1


class FoundNoise(MeanNoise):
    """Match the whole objective's gradient; the noise of each example joins what is optimised, from 0 on."""

    name = "found_noise"
    finds_noise = True


@DEFENSES.add(
    name="mid",
    paper="Wang, Zhang and Jia 2021, Mutual Information Regularization against Model Inversion (MID)",
    arxiv="2009.05241",
    known_breaks=(
        "an upper bound on the information in a layer is no bound on what inversion finds: that the theory behind it "
        "neither needs nor gives privacy is the critique of AT-AT (ICLR 2026, as others report it)",
        "it acts on what the head reads: the gradients of all layers before it are those of an ordinary network, and "
        "whoever knows the objective matches them",
    ),
)
@dataclass(frozen=True)
class MID(Defense):
    """Puts a stochastic bottleneck of k units in place of the head, and punishes what it lets through.

    With r what the head reads, d numbers: ``(mu, s) = A r + a`` of k numbers each, ``sigma = softplus(s - 5)``,
    ``h = mu + sigma e`` with e ~ N(0, I) drawn anew for each example and step, and logits ``B h + b``. The objective is

        L + beta mean over examples of KL(N(mu, sigma^2) || N(0, I)),
        KL = -1/2 sum over units of (1 + 2 log sigma - mu^2 - sigma^2).

    The head's own weights are dropped; A, a, B and b begin uniform in +-1 / sqrt(what they read), the same for every
    seed. A network that was trained so keeps its bottleneck, also for clients who add nothing to the objective.

    What the attacker of updates takes e for: 0, if it does not know of the defense or is the counter ``mean_noise``;
    unknowns beside the images, if it is ``found_noise``; the truth, if it sees ``masks``.

    Args:
        beta: weight of the divergence, at least 0. Public code has 0.003 to 0.02 for VGG16 on faces and 0.1 to 0.25,
            of which 0.2 was kept, on MNIST; both networks have BatchNorm. Without it as much as 0.2 empties the
            bottleneck before there is anything in it: lenet_zhu then stays at chance on digits.
        width: k, at least 1; 0 for half of d.
        eval_mean: after training h is mu. The authors' code has no such mode and draws at test time too: with
            ``false`` accuracy is that of one draw, and the network stays random for whoever uses it.

    Source: Wang et al., AAAI 2021, https://arxiv.org/abs/2009.05241. The paper's tables could not be read; formula and
    settings are those of its public code. Differs from it: tests use the mean by default.

    Refused: heads that do not read one vector an image. Not for Flower's `defended_training`, whose model keeps the
    server's parameters, nor together with dp_sgd or concealing.
    """

    beta: float = 0.01
    width: int = 0
    eval_mean: bool = True

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, math.inf, open_high=True)
        check_range("width", self.width, 0)

    def on_task(self, task: Task) -> Task:
        """The task with the bottleneck; one that has it already stays as it is.

        Raises:
            ModelError: the head does not read one vector an image.
        """
        if _sampler(task) is not None:
            return task
        model = copy.deepcopy(task.model)
        bottleneck = Bottleneck(model.get_submodule(task.head), self.width)
        if not task.head:
            raise ModelError("'mid' puts a bottleneck before the head, and this model is nothing but a head.")
        model.set_submodule(task.head, bottleneck)
        sampler = f"{task.head}.sample"
        if one_mask_shape(model, sampler, task.input_shape) != (2 * bottleneck.width,):
            raise ModelError(f"the head '{task.head}' does not read one vector an image, which 'mid' needs.")
        noise = (sampler, (bottleneck.width,), not self.eval_mean)
        return replace(task, model=model, head=f"{task.head}.head", noises=(*task.noises, noise))

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """The loss with the weighted divergence."""
        sampler = _sampler(ctx.task)
        if sampler is None:
            raise ModelError("'mid' found no bottleneck in the model; apply its on_task to the task first.")
        encoded = trace.activations[sampler.removesuffix("sample") + "encode"]
        lost = divergence(*moments(encoded))
        ctx.note("divergence of the bottleneck", lost)
        return loss + self.beta * (batch.share * lost).sum()

    def counters(self) -> tuple[Counter, ...]:
        """Knowing the objective, with the noise at 0 or found."""
        return MeanNoise(self), FoundNoise(self)


class Sample(NoisyLayer):
    """Mean and spread, (b, 2 k), to one draw, (b, k)."""

    def forward(self, encoded: Tensor) -> Tensor:
        """The mean plus the deviation times the noise."""
        mean, deviation = moments(encoded)
        return mean + deviation * self.noise.to(encoded.dtype)


class Bottleneck(nn.Module):
    """In place of a linear head: encode, sample, decide."""

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{type(head).__name__} is no linear layer")
        self.width = width or max(1, head.in_features // 2)
        self.encode = _linear(head, head.in_features, 2 * self.width, "encode")
        self.sample = Sample()
        self.head = _linear(head, self.width, head.out_features, "head")

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features (b, d)."""
        logits: Tensor = self.head(self.sample(self.encode(features)))
        return logits


def moments(encoded: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (b, k) each, of what the encoder gives."""
    mean, spread = encoded.chunk(2, dim=-1)
    return mean, softplus(spread - SHIFT)


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL divergence of each example's Gaussian from the standard one, (b,)."""
    return -0.5 * (1.0 + 2.0 * (deviation + GUARD).log() - mean.square() - deviation.square()).sum(-1)


def _linear(like: nn.Linear, reads: int, gives: int, purpose: str) -> nn.Linear:
    """A layer with PyTorch's usual initial law, from a key, where ``like`` lies."""
    key, bound = fold_in(new_key(0), f"mid {purpose}"), 1.0 / math.sqrt(reads)
    layer = nn.Linear(reads, gives, device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            drawn = uniform(fold_in(key, name), tuple(parameter.shape), torch.float64)
            parameter.copy_(bound * (2.0 * drawn - 1.0))
    return layer


def _sampler(task: Task) -> str | None:
    return next((name for name, module in task.model.named_modules() if isinstance(module, Sample)), None)
