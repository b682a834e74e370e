"""Negative label smoothing: training that moves other classes further away than the labels ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.types import Batch, Trace
from keyhole.defenses.knows_loss import KnowsLoss
from keyhole.errors import ConfigError, check_range


@DEFENSES.add(
    name="neg_label_smoothing",
    paper="Struppek, Hintersdorf and Kersting 2024, Be Careful What You Smooth For",
    arxiv="2310.06549",
    facts={"stronger": "down"},
    known_breaks=(
        "it acts on what the trained network tells of its classes, not on updates: whoever knows the objective matches "
        "its gradient exactly",
        "model inversion with transformation-averaged gradients still gains, if little: 8.4 to 10.6 % of the attacks "
        "on a face recogniser succeed (AlignMI 2025, table 8)",
    ),
)
@dataclass(frozen=True)
class NegLabelSmoothing(Defense):
    """Adds the mean loss over all classes with a negative weight.

    ``(1 - a) L + a mean over examples and classes k of -log p_k``, L the loss without it. For cross-entropy that is
    label smoothing with a. Positive a, which pulls logits together, helps model inversion; negative a hinders it.

    Below 0 the loss has no lower bound: every logit of a wrong class is pushed down for ever, by a / K at least. Long
    training therefore wants a schedule, or clipped gradients, as `keyhole train` has by default.

    In training a is 0 in the first ``start`` rounds, grows by equal steps, and is whole from round ``full`` on. An
    audited update is one under the whole of a whatever the schedule, as an audit does not know of a training's rounds.
    In Flower rounds are those that the client took part in, unless `keyhole.fl.defended_training` is told the server's.

    Args:
        smoothing: a, from -1 to 0; the paper's is -0.05.
        start: rounds of training without it, at least 0. The paper: half of the training.
        full: the number of the first round with the whole of it, the first of all being 1; at least ``start``. The
            paper: three quarters of the training.

    Source: Struppek et al., ICLR 2024, https://arxiv.org/abs/2310.06549. The paper's text could not be read; the
    formula, -0.05 and the schedule are those of public code that follows it. Differs from it: rounds of a federation
    stand for epochs, and the learning rate is not lowered on the way.
    """

    smoothing: float = -0.05
    start: int = 0
    full: int = 0

    def __post_init__(self) -> None:
        check_range("smoothing", self.smoothing, -1, 0)
        check_range("start", self.start, 0)
        if self.full < self.start:
            raise ConfigError(f"full is {self.full}, below start, which is {self.start}; give at least {self.start}.")

    def at(self, number: int) -> float:
        """A in a round of training, counted from 1."""
        if number <= self.start:
            return 0.0
        return self.smoothing * min(1.0, (number - self.start) / max(self.full - self.start, 1))

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """The smoothed loss."""
        a = self.at(ctx.round + 1) if ctx.training else self.smoothing
        if a == 0:
            return loss
        each = -torch.log_softmax(trace.logits, dim=-1).mean(-1)
        return (1.0 - a) * loss + a * (batch.share * each).sum()

    def counters(self) -> tuple[Counter, ...]:
        """Matching the gradient of the smoothed loss."""
        return (KnowsLoss(self),)
