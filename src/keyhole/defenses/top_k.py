"""Top-k sparsification with error feedback: small entries wait until they have grown large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Tensors
from keyhole.defenses.prune import largest
from keyhole.defenses.survivors import Survivors
from keyhole.errors import ConfigError, check_range


class Accumulated(Survivors):
    """Compare only the entries that were sent; over several rounds, undo the waiting as well.

    With the same batch and weights in every round each gradient is the same g, and an entry that waited for t rounds
    is sent as t g, or as another known multiple with momentum. The zeros tell how long each waited, so that every entry
    that was ever sent gives g exactly. Rounds must be counted from the first, when nothing had waited yet. A later
    round taken by itself holds sums of several rounds' gradients, which this counter takes for one.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum

    def combine(self, updates: Tensors) -> Tensors:
        """The gradient behind all rounds; zero where nothing was ever sent."""
        return map_tensors(self._undo, updates)

    def truth_stays(self, rounds: int, series: int, steps: int = 1) -> bool:
        """Not on different batches: later updates hold what waited from earlier ones."""
        return series == 1

    def _undo(self, values: torch.Tensor) -> torch.Tensor:
        # The client's own recursion, run on a gradient of 1.
        velocity, grown, total = (torch.zeros_like(values[0]) for _ in range(3))
        for value in values:
            velocity = self.momentum * velocity + 1.0
            grown = grown + velocity
            sent = value != 0
            total = total + torch.where(sent, grown, 0.0)
            velocity, grown = torch.where(sent, 0.0, velocity), torch.where(sent, 0.0, grown)
        return values.sum(0) / torch.where(total > 0, total, 1.0)


@DEFENSES.add(
    name="top_k",
    paper="Lin, Han, Mao, Wang and Dally 2018, Deep Gradient Compression",
    arxiv="1712.01887",
    known_breaks=(
        "made to save traffic, not to hide anything: a first round is magnitude pruning, whose survivors recover faces "
        "at a rate of nine tenths, and over more rounds of one batch feedback sends the rest",
    ),
)
@dataclass(frozen=True)
class TopK(Defense):
    """Sends the entries of largest magnitude and keeps the others for later rounds.

    ``u <- m u + g; v <- v + u``; v is sent where it is among the largest, and there both are set to zero
    (the paper's momentum correction and momentum factor masking, section 3).

    Args:
        rate: share of entries not sent, in [0, 1). Entries equal to the smallest one sent are sent as well, so ties
            send more.
        momentum: m, in [0, 1); needs ``feedback``.
        granularity: one threshold for each ``tensor``, or one for the whole update (``global``).
        feedback: keep what is not sent; without it every round is pruned by itself.

    Differs from the paper: no local clipping of gradients, no warm-up of the rate, and thresholds are exact where the
    authors estimate them from a sample.
    """

    rate: float = 0.9
    momentum: float = 0.0
    granularity: Literal["tensor", "global"] = "tensor"
    feedback: bool = True

    def __post_init__(self) -> None:
        check_range("rate", self.rate, 0, 1, open_high=True)
        check_range("momentum", self.momentum, 0, 1, open_high=True)
        if self.momentum > 0 and not self.feedback:
            raise ConfigError(f"momentum is {self.momentum!r} without feedback; momentum needs feedback = true.")

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """What is sent in this round; the rest waits in ``ctx.state``."""
        nothing = map_tensors(torch.zeros_like, update)
        name = f"top_k.{ctx.link}"
        past = ctx.state if self.feedback else {}
        velocity = map_tensors(lambda u, g: self.momentum * u + g, past.get(f"{name}.velocity", nothing), update)
        grown = map_tensors(torch.add, past.get(f"{name}.residual", nothing), velocity)
        sent = largest(grown, self.rate, self.granularity)
        past[f"{name}.velocity"] = map_tensors(lambda u, k: torch.where(k, 0.0, u), velocity, sent)
        past[f"{name}.residual"] = map_tensors(lambda v, k: torch.where(k, 0.0, v), grown, sent)
        return map_tensors(lambda v, k: torch.where(k, v, 0.0), grown, sent)

    def counters(self) -> tuple[Counter, ...]:
        """Matching what was sent."""
        return (Accumulated(self.momentum) if self.feedback else Survivors(),)
