"""The counter that defenses of the training objective share: who knows the objective simulates it."""

from __future__ import annotations

from keyhole.core.defense import Counter, Defense


class KnowsLoss(Counter):
    """Match the gradient of what the client really minimises, in place of that of the plain loss.

    Exact, as long as the defense's objective draws nothing and depends on nothing but the batch, the weights and the
    task.

    Args:
        defense: what the client does, for its `on_loss`.
    """

    name = "knows_loss"
    truth_loss = "zero"

    def __init__(self, defense: Defense) -> None:
        self.objective = defense.on_loss
