"""The threat model, and `observe`: the one door between a client's secret and an attacker."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from keyhole.core.defense import Context, Counter, Defense, defended_gradient
from keyhole.core.keys import fold_in
from keyhole.core.rule import ClientRule, SingleGradient
from keyhole.core.task import Task, plain_gradient
from keyhole.core.types import Batch, Field, Key, Observation, Tensors, Weights


@dataclass(frozen=True)
class ThreatModel:
    """What is shared, and what the attacker knows about how it was made."""

    rule: ClientRule = field(default_factory=SingleGradient)
    """What the client does."""
    belief: ClientRule = field(default_factory=SingleGradient)
    """What the attacker thinks the client does."""
    batch_size: int = 1
    sees: frozenset[Field] = frozenset({"weights", "update"})
    counter: Counter = field(default_factory=Counter)
    """What the attacker does about the defense; the default does nothing."""

    def simulate(
        self, task: Task, weights: Weights, batch: Batch, facts: Tensors, unknowns: Tensors, key: Key
    ) -> Tensors:
        """The update that a guessed batch would have caused, as the attacker believes clients to work."""
        gradient = self.counter.believe(plain_gradient(task), facts, unknowns)
        return self.belief(gradient, weights, batch, key).update


def observe(
    task: Task, threat: ThreatModel, defense: Defense, weights: Weights, secret: tuple[Batch, ...], key: Key
) -> tuple[Observation, ...]:
    """Everything an attacker sees of an episode: one observation for each private batch, in order.

    This is the only function that turns private batches into something an attack can read. Written for one trial;
    the runner lifts it.

    Args:
        task: what is trained, as the defense changed it.
        threat: says which fields are seen; the others stay `None`.
        defense: acts on the batch's gradient and on the update.
        weights: the global weights that the client received.
        secret: the private batches, one a round.
        key: the client's randomness, which the attacker never gets.
    """
    state: dict[str, Tensors] = {}
    seen = []
    for number, batch in enumerate(secret):
        own = fold_in(key, number)
        ctx = Context(task, weights, fold_in(own, "defense"), round=number, state=state)
        upload = threat.rule(defended_gradient(task, defense, ctx), weights, batch, fold_in(own, "client"))
        update = defense.on_update(upload.update, ctx)
        # Sorted, because the order of a batch leaves no trace in its gradient and must not reach the attacker.
        # Soft targets of one class are told apart by a weighted sum, so that no two keep the order they came in.
        weights_of_classes = torch.arange(1, task.num_classes + 1, device=batch.targets.device).double().sqrt()
        by_mixture = (batch.targets.double() @ weights_of_classes).argsort(dim=-1, stable=True)
        order = by_mixture[batch.targets.argmax(-1)[by_mixture].argsort(dim=-1, stable=True)]
        seen.append(
            Observation(
                weights=weights if "weights" in threat.sees else None,
                update=update if "update" in threat.sees else None,
                targets=batch.targets[order] if "targets" in threat.sees else None,
            )
        )
    return tuple(seen)
