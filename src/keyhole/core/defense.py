"""Defenses, and the counters of attackers who know them.

A defense has five hooks, all "unchanged" by default, so that one small class says all that is special about it. Its
counters live in the same file: a defense that comes without the attacker who knows it has not been evaluated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad

from keyhole.core.keys import fold_in
from keyhole.core.task import Task
from keyhole.core.types import Batch, Distance, Field, GradFn, Key, Observation, Tensors, Trace, Weights


@dataclass(frozen=True, eq=False)
class Context:
    """What a defense may use, made anew for each round by whoever runs the client."""

    task: Task
    weights: Weights
    key: Key
    """Fresh for each round; the attacker never gets it."""
    round: int = 0
    again: bool = False
    """Whether the client's own images are those of its round before."""
    training: bool = False
    """Whether this is a round of a federation that trains, which ``round`` counts from its beginning; where updates are
    audited, ``round`` counts those of one episode, and nobody knows how many went before."""
    step: int = 0
    client: int = 0
    public: Batch | None = None
    """Public images with their labels, which the attacker has too."""
    state: dict[str, Tensors] = field(default_factory=dict)
    """Kept between the rounds of one client, such as error-feedback residuals."""
    link: str = ""
    """Which place in a chain, so that two of one kind keep two states."""
    recorded: bool = True
    """Whether anybody reads the notes; where nobody does, as in training, what is costly need not be worked out."""
    notes: dict[str, list[Tensor]] = field(default_factory=dict)
    hints: dict[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, value: Tensor) -> None:
        """Put on record what the defense did: a scalar, or a number for each image (b,) in the batch's order.

        For the report only; no attacker ever gets it. Notes of several local steps are averaged.
        """
        self.notes.setdefault(name, []).append(value.detach())

    def tally(self, name: str) -> None:
        """Count one more of something; unlike notes, this adds up over local steps and rounds."""
        before = self.notes.get(name, [torch.zeros(())])[0]
        self.notes[name] = [before + 1]

    def hint(self, name: str, value: Tensor) -> None:
        """Give away a choice of the defense to attackers who are declared to see ``hints``; the last call counts."""
        self.hints[name] = value.detach()


Objective = Callable[[Tensor, Trace, Batch, Context], Tensor]
"""As `Defense.on_loss`: the training objective so far, to another one."""


class Counter:
    """What an attacker who knows a defense does about it. The base class does nothing: the naive attacker.

    ``truth_loss`` says what the matching loss is at the true batch: ``"zero"``, ``"law"`` (what `expected_truth_loss`
    predicts) or ``"none"`` (unknown).
    """

    name: str = "naive"
    needs: frozenset[Field] = frozenset()
    truth_loss: Literal["zero", "law", "none"] = "none"
    scale_free: bool = False
    """Compares directions only. In a chain such a counter compares last, whichever defense it belongs to: a norm means
    the same on both sides only once they have the same entries."""
    one_step: bool = False
    """Whether it can only explain an update of one gradient; trials with local steps are refused."""
    last: bool = False
    """Whether it can only undo what nothing acted on afterwards, as the rounding of a quantiser."""
    distance: Distance | None = None
    """Replaces the attack's distance where the defense's noise has another likelihood."""
    free_distance: Distance | None = None
    """Stands in for ``distance`` beside a scale-free counter, which takes away the scale that it is stated in."""
    objective: Objective | None = None
    """What clients are thought to minimise beside the plain loss; `None` where that is all. The context is the
    attacker's own: its key is not the client's."""
    finds_noise: bool = False
    """Whether noise inside the model (`Task.noises`) that is not seen joins the optimisation; it is 0 otherwise."""
    then: Any = None
    """A second attack on what the first one found, where the defense calls for it. The images found are its fact
    ``found.inputs``, (r, *shape)."""

    def combine(self, updates: Tensors) -> Tensors:
        """One update out of those of several rounds of the same batch and weights: their mean.

        Args:
            updates: by name, with a leading axis of rounds.
        """
        return {name: value.mean(0) for name, value in updates.items()}

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """Worked out once from the observations: a mask, a norm, a noise scale."""
        return {}

    def unknowns(self, task: Task, seen: tuple[Observation, ...], key: Key) -> Tensors:
        """Start values of what joins the optimisation: concealed dummies, latents."""
        return {}

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        """How this client is thought to compute its gradient."""
        return gradient

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """What of the simulated and of the observed update is compared, before the distance."""
        return simulated, observed

    def told(self, batch_size: int) -> Counter:
        """The same counter, for updates of so many images."""
        return self

    def truth_stays(self, rounds: int, series: int, steps: int = 1) -> bool:
        """Whether the loss is zero at the truth.

        Args:
            rounds: updates of one batch.
            series: updates of different batches.
            steps: gradients behind one update.
        """
        return self.truth_loss == "zero"

    def expected_truth_loss(self, observed: Tensors) -> tuple[float, float]:
        """Mean and deviation of the distance at the truth in one round, where ``truth_loss`` is "law"."""
        raise NotImplementedError(f"counter '{self.name}' has no noise law")


class Defense:
    """What a client does to protect a batch. Override the hooks that the defense acts on."""

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        """Replace the images that a round is trained on; as many, in the same order. Called once a round."""
        return batch

    def on_task(self, task: Task) -> Task:
        """Change the model itself; the attacker sees the result.

        Parameters that it adds carry their initial values (`keyhole.core.task.fit_weights`), the same in every
        process. A task that was changed already, as that of a network trained under this defense, stays as it is.
        """
        return task

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """Change the training objective, a scalar."""
        return loss

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        """Wrap the gradient computation of every local step."""
        return gradient

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """Change what leaves the client."""
        return update

    def counters(self) -> tuple[Counter, ...]:
        """What attackers who know this defense do about it."""
        return ()

    def remark(self, notes: dict[str, list[float]]) -> str:
        """A sentence for the report on what was noted in one trial, such as that nothing was changed; mostly empty."""
        return ""

    def success_bound(self, prior: float, rounds: int) -> float | None:
        """What no attack can exceed: an upper bound on the probability of a reconstruction; `None` where there is none.

        Args:
            prior: the success of the best guess without any update, in [0, 1].
            rounds: gradients behind what the attacker sees of the same images: updates times local steps.
        """
        return None


@dataclass(frozen=True)
class Chain(Defense):
    """Defenses one after another: the first acts first on the update."""

    links: tuple[Defense, ...] = ()

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        """Each link's change to the images, in order."""
        for i, link in enumerate(self.links):
            batch = link.on_batch(batch, self._own(ctx, i))
        return batch

    def on_task(self, task: Task) -> Task:
        """Each link's change to the model, in order."""
        for link in self.links:
            task = link.on_task(task)
        return task

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """Each link's change to the objective, in order."""
        for link in self.links:
            loss = link.on_loss(loss, trace, batch, ctx)
        return loss

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        """Each link's wrapper; the first is innermost."""
        for i, link in enumerate(self.links):
            gradient = link.on_gradient(gradient, self._own(ctx, i))
        return gradient

    def on_update(self, update: Tensors, ctx: Context) -> Tensors:
        """Each link's change to the update, in order."""
        for i, link in enumerate(self.links):
            update = link.on_update(update, self._own(ctx, i))
        return update

    def counters(self) -> tuple[Counter, ...]:
        """Every combination of one counter from each link that has any."""
        known = [link.counters() for link in self.links if link.counters()]
        return tuple(CounterChain(parts) for parts in itertools.product(*known)) if known else ()

    def remark(self, notes: dict[str, list[float]]) -> str:
        """The links' remarks."""
        return " ".join(filter(None, (link.remark(notes) for link in self.links)))

    def success_bound(self, prior: float, rounds: int) -> float | None:
        """That of the one link that has any, if all others only work on what it sends.

        What changes images, model, loss or gradients may let one record into the update by more than the bounding link
        allows for, and so no bound is left. Updates are worked on after all gradients, wherever a link stands.
        """
        known = [(link, link.success_bound(prior, rounds)) for link in self.links]
        bounds = [bound for _, bound in known if bound is not None]
        others = [link for link, bound in known if bound is None]
        return bounds[0] if len(bounds) == 1 and all(_works_on_updates_only(link) for link in others) else None

    @staticmethod
    def _own(ctx: Context, position: int) -> Context:
        """The context of one link: two noises in a chain must not be the same noise."""
        key = fold_in(ctx.key, f"link {position}")
        return replace(ctx, key=key, link=f"{ctx.link}{position}.")


def _works_on_updates_only(link: Defense) -> bool:
    hooks = ("on_batch", "on_task", "on_loss", "on_gradient")
    return all(getattr(type(link), hook) is getattr(Defense, hook) for hook in hooks)


def chain(*defenses: Defense) -> Defense:
    """Several defenses as one; ``chain(a)`` is ``a`` and ``chain()`` leaves everything unchanged."""
    return defenses[0] if len(defenses) == 1 else Chain(tuple(defenses))


class CounterChain(Counter):
    """Counters of a chain of defenses as one; they compare in reverse, undoing what the client did last first."""

    def __init__(self, parts: tuple[Counter, ...]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.needs = frozenset[Field]().union(*(part.needs for part in parts))
        laws = {part.truth_loss for part in parts}
        self.last = any(part.last for part in parts)
        self.one_step = any(part.one_step for part in parts)
        undone = not any(part.last for part in parts[:-1])
        self.truth_loss = "zero" if laws == {"zero"} and undone else "none"
        self.scale_free = all(part.scale_free for part in parts)
        noisy = next((part for part in reversed(parts) if part.distance is not None), None)
        free = noisy is not None and any(part.scale_free for part in parts) and noisy.free_distance is not None
        self.distance = None if noisy is None else noisy.free_distance if free else noisy.distance
        self.finds_noise = any(part.finds_noise for part in parts)
        self.objective = _one_after_another([part.objective for part in parts if part.objective is not None])
        self.then = next((part.then for part in parts if part.then is not None), None)

    def combine(self, updates: Tensors) -> Tensors:
        """As the part says that acts on what the client did last, among those that do not just average."""
        special = [part for part in self.parts if type(part).combine is not Counter.combine]
        return special[-1].combine(updates) if special else super().combine(updates)

    def told(self, batch_size: int) -> CounterChain:
        """Each part told."""
        return CounterChain(tuple(part.told(batch_size) for part in self.parts))

    def truth_stays(self, rounds: int, series: int, steps: int = 1) -> bool:
        """Over several rounds of one batch only where no part acts on what another one drew afresh in each."""
        special = any(type(part).combine is not Counter.combine for part in self.parts)
        alone = rounds == 1 or not special or len(self.parts) == 1
        return (
            self.truth_loss == "zero" and alone and all(part.truth_stays(rounds, series, steps) for part in self.parts)
        )

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """Facts of all parts, prefixed with their position."""
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.facts(task, seen).items()}

    def unknowns(self, task: Task, seen: tuple[Observation, ...], key: Key) -> Tensors:
        """Unknowns of all parts, prefixed with their position."""
        parts = enumerate(self.parts)
        return {f"{i}.{k}": v for i, part in parts for k, v in part.unknowns(task, seen, fold_in(key, i)).items()}

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        """Each part's belief, in the client's order."""
        for i, part in enumerate(self.parts):
            gradient = part.believe(gradient, strip_prefix(facts, f"{i}."), strip_prefix(unknowns, f"{i}."))
        return gradient

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """Each part's comparison, last defense first, but those that are scale-free at the end."""
        for i, part in sorted(enumerate(self.parts), key=lambda p: (p[1].scale_free, -p[0])):
            simulated, observed = part.compare(simulated, observed, strip_prefix(facts, f"{i}."))
        return simulated, observed


def _one_after_another(objectives: list[Objective]) -> Objective | None:
    def together(loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        for objective in objectives:
            loss = objective(loss, trace, batch, ctx)
        return loss

    return together if objectives else None


def strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The entries whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def defended_gradient(task: Task, defense: Defense, ctx: Context) -> GradFn:
    """How a client under ``defense`` turns a batch into a gradient."""
    return defense.on_gradient(objective_gradient(task, defense.on_loss, ctx), ctx)


def objective_gradient(task: Task, objective: Objective, ctx: Context, masks: Tensors | None = None) -> GradFn:
    """The gradient of an objective that is more than the share-weighted mean loss.

    Args:
        task: what is trained.
        objective: from that loss to another one.
        ctx: for the objective.
        masks: as of `keyhole.core.task.plain_gradient`.
    """

    def gradient(weights: Weights, batch: Batch, key: Key) -> Tensors:
        own = task.masks(key, batch.inputs.shape[0]) if masks is None else masks

        def whole(params: Tensors) -> Tensor:
            trace = task.trace(Weights(params, weights.buffers), batch.inputs, masks=own)
            loss = (batch.share * task.loss(trace.logits, batch.targets)).sum()
            return objective(loss, trace, batch, ctx)

        return grad(whole)(weights.params)

    return gradient
