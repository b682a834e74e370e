"""The threat model, and `observe`: the one door between a client's secret and an attacker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyhole.core.belief import Belief, Simulated, weights_seen
from keyhole.core.defense import Context, Counter, Defense, defended_gradient, objective_gradient, strip_prefix
from keyhole.core.keys import fold_in
from keyhole.core.rule import ClientRule, SingleGradient
from keyhole.core.task import Task, plain_gradient
from keyhole.core.types import Batch, Field, Key, Observation, Tensors, Weights


@dataclass(frozen=True)
class ThreatModel:
    """What is shared, and what the attacker knows about how it was made."""

    rule: ClientRule = field(default_factory=SingleGradient)
    """What the client does."""
    belief: Belief = field(default_factory=lambda: Simulated(SingleGradient()))
    """What the attacker thinks the client does."""
    batch_size: int = 1
    """Private images behind one update."""
    sees: frozenset[Field] = frozenset({"weights", "update"})
    counter: Counter = field(default_factory=Counter)
    """What the attacker does about the defense; the default does nothing."""
    repeated: bool = False
    """Whether all rounds of an episode are known to come from one batch and the same weights."""

    @property
    def guesses(self) -> int:
        """Images that an attack guesses for one update."""
        return self.belief.copies * self.batch_size

    def unknowns(self, task: Task, like: Tensor, key: Key) -> Tensors:
        """What the attack must find beside images: the belief's unknowns, and what layers drew and nobody told.

        Masks of active dropout start as if it were off; noise starts at 0 where the counter looks for it.
        """
        found = {f"belief.{name}": value for name, value in self.belief.unknowns(like, key).items()}
        if "masks" not in self.sees:
            for name, shape, _ in task.noises if self.counter.finds_noise else ():
                found[f"mask.{name}.noise"] = like.new_zeros(self.guesses, *shape)
            for name, rate, shape in task.drops:
                # A logit, so that what is optimised has no bounds; sigmoid(start) / (1 - rate) = 1.
                start = torch.logit(torch.tensor(1.0 - rate, dtype=like.dtype, device=like.device))
                found[f"mask.{name}.mask"] = start.expand(self.guesses, *shape).clone()
        return found

    def simulate(
        self, task: Task, observation: Observation, batch: Batch, facts: Tensors, unknowns: Tensors, key: Key
    ) -> Tensors:
        """The update that a guessed batch would have caused, as the attacker believes clients to work.

        Args:
            task: what clients train.
            observation: the round whose update is explained.
            batch: guessed images, `guesses` of them.
            facts: the counter's facts.
            unknowns: of the counter (``counter.``), the belief (``belief.``), masks and noise (``mask.``).
            key: randomness of the simulation.
        """
        masks = observation.masks
        if masks is None and task.draws:
            rates = {f"{name}.mask": rate for name, rate, _ in task.drops}
            masks = {
                name: torch.sigmoid(value) / (1.0 - rates[name]) if name in rates else value
                for name, value in strip_prefix(unknowns, "mask.").items()
            }
        masks = masks if task.draws else None
        objective = self.counter.objective
        if objective is None:
            gradient = plain_gradient(task, masks)
        else:
            ctx = Context(task, weights_seen(observation), key, recorded=False)
            gradient = objective_gradient(task, objective, ctx, masks)
        gradient = self.counter.believe(gradient, facts, strip_prefix(unknowns, "counter."))
        return self.belief.simulate(gradient, observation, batch, strip_prefix(unknowns, "belief."), key)


def observe(
    task: Task,
    threat: ThreatModel,
    defense: Defense,
    weights: Weights | Sequence[Weights],
    secret: tuple[Batch, ...],
    key: Key,
    public: Batch | None = None,
    notes: list[dict[str, list[Tensor]]] | None = None,
) -> tuple[Observation, ...]:
    """Everything an attacker sees of an episode: one observation for each private batch, in order.

    This is the only function that turns private batches into something an attack can read. Written for one trial;
    the runner lifts it.

    Args:
        task: what is trained, as the defense changed it.
        threat: says which fields are seen; the others stay `None`.
        defense: acts on the batch's gradient and on the update.
        weights: the global weights that the client received, the same for all rounds or one for each.
        secret: the private batches, one a round.
        key: the client's randomness, which the attacker never gets.
        public: public images with labels, which clients and attackers have.
        notes: one dictionary for each round, filled with what the defenses put on record about themselves, which is
            no part of what is seen.
    """
    state: dict[str, Tensors] = {}
    seen = []
    for number, batch in enumerate(secret):
        received = weights if isinstance(weights, Weights) else weights[number]
        own = fold_in(key, number)
        hints: Tensors = {}
        again = threat.repeated and number > 0
        ctx = Context(
            task,
            received,
            fold_in(own, "defense"),
            number,
            again,
            public=public,
            state=state,
            hints=hints,
            notes={} if notes is None else notes[number],
        )
        client = fold_in(own, "client")
        trained = defense.on_batch(batch, ctx)
        upload = threat.rule(defended_gradient(task, defense, ctx), received, trained, client)
        update = defense.on_update(upload.update, ctx)
        # Sorted, because the order of a batch leaves no trace in its gradient and must not reach the attacker.
        # Soft targets of one class are told apart by a weighted sum, so that no two keep the order they came in.
        weights_of_classes = torch.arange(1, task.num_classes + 1, device=batch.targets.device).double().sqrt()
        by_mixture = (batch.targets.double() @ weights_of_classes).argsort(dim=-1, stable=True)
        order = by_mixture[batch.targets.argmax(-1)[by_mixture].argsort(dim=-1, stable=True)]
        masks = task.masks(client, batch.inputs.shape[0])
        statistics = None
        if "statistics" in threat.sees:
            statistics = task.trace(received, trained.inputs, masks=masks).statistics
        seen.append(
            Observation(
                weights=received if "weights" in threat.sees else None,
                update=update if "update" in threat.sees else None,
                targets=batch.targets[order] if "targets" in threat.sees else None,
                statistics=statistics,
                masks={name: mask[order] for name, mask in masks.items()} if "masks" in threat.sees else None,
                hints=hints if "hints" in threat.sees else None,
            )
        )
    return tuple(seen)
