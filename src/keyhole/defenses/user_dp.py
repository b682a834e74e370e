"""User-level DP in federated learning: the client clips its whole update, and the server adds the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.types import Tensors
from keyhole.defenses.clip import Clip, NormMatched
from keyhole.errors import check_range


@DEFENSES.add(
    name="user_dp",
    paper="McMahan et al. 2018, Learning Differentially Private Recurrent Language Models",
    arxiv="1710.06963",
    known_breaks=(
        "the server sees the clipped update before any noise: against it there is no protection but the clip, which "
        "norm matching and cosine objectives undo",
    ),
    facts={"stronger": "down"},
)
@dataclass(frozen=True)
class UserDP(Defense):
    """The client's part of user-level DP: ``u min(1, C / (|u| + 1e-6))`` over all parameters.

    The noise that makes it differential privacy, of one client as the unit, is the server's: `server_noise`. It
    protects clients from whoever sees the new weights, not from the server, which is the attacker of an audit. In a
    training `keyhole train` adds it, in Flower `keyhole.fl.ServerNoise`.

    Args:
        clip: the norm C of the whole update, above 0.
        noise_multiplier: z, at least 0: the server's noise on the sum over clients in units of C.

    Source: McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963, algorithm 1 with flat clipping. Differs: all
    clients weigh the same, and the server divides by the number of them that it expects.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        check_range("clip", self.clip, 0, math.inf, open_low=True, open_high=True)
        check_range("noise_multiplier", self.noise_multiplier, 0, math.inf, open_high=True)

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """The update, no longer than C."""
        return Clip(self.clip).on_update(update, ctx)

    def counters(self) -> tuple[Counter, ...]:
        """Norm matching, as against clipping."""
        return (NormMatched(),)

    def server_noise(self, clients: float) -> float:
        """Standard deviation z C / m of the noise that the server adds to each entry of the mean over clients.

        Args:
            clients: the expected number m of clients in a round, above 0.
        """
        check_range("clients", clients, 0, open_low=True)
        return self.noise_multiplier * self.clip / clients

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Who adds the noise."""
        return "Only clipped: the noise of user-level DP is the server's, and it saw the update before."
