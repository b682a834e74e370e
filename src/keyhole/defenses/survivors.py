"""The counter that pruning and masking share: zeros in an update say where not to look."""

from __future__ import annotations

from keyhole.core.defense import Counter
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Tensors


class Survivors(Counter):
    """Compare only the entries that were sent: where the observed update is not zero.

    Entries that are truly zero are dropped as well, which costs nothing: they were matched by everything.

    Args:
        rescale: factor that the client is known to have put on the survivors, undone before comparing.
    """

    name = "survivors"
    truth_loss = "zero"

    def __init__(self, rescale: float = 1.0) -> None:
        self.rescale = rescale

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """Both without the entries that were not sent, and the observed one at the scale it had before."""
        sent = map_tensors(lambda o: (o != 0).to(o.dtype), observed)
        return map_tensors(lambda s, m: s * m, simulated, sent), map_tensors(lambda o: o / self.rescale, observed)
