"""What an attacker thinks a client does: exactly what it does, a wrong guess, or something it can only approximate.

A belief turns a guessed batch into the update that it would have caused. It may ask for more than one guessed image for
each private one, and for unknowns of its own that the attack optimises beside the images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from keyhole.core.keys import normal
from keyhole.core.registry import BELIEFS
from keyhole.core.rule import ClientRule, LocalSGD, SingleGradient, descend, minibatches
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Batch, GradFn, Key, Observation, Tensors, Weights
from keyhole.errors import ConfigError, Refused, check_range


class Belief(Protocol):
    """How the attacker simulates a client."""

    @property
    def copies(self) -> int:
        """Guessed images for each private one."""
        ...

    def scale(self, examples: int) -> float:
        """What the upload is thought to be a multiple of, for label rules that need a gradient."""
        ...

    def steps(self, examples: int) -> int:
        """Local steps that the upload is thought to be made of."""
        ...

    def unknowns(self, like: Tensor, key: Key) -> Tensors:
        """Start values of what the belief leaves open, in dtype and device of ``like``, the (copies x b) guesses."""
        ...

    def relabel(self, targets: Tensor, unknowns: Tensors) -> Tensor:
        """Labels (copies x b, k) of the guessed images, from those known of each copy, in an order that may be open."""
        ...

    def simulate(
        self, gradient: GradFn, observation: Observation, batch: Batch, unknowns: Tensors, key: Key
    ) -> Tensors:
        """The update that ``batch`` (copies x b images) would have caused."""
        ...

    def penalty(self, inputs: Tensor) -> Tensor:
        """What is asked of the copies beyond explaining the update; a scalar, 0 where there is one copy."""
        ...

    def merge(self, inputs: Tensor) -> Tensor:
        """One image (b, *shape) for each private one out of copies x b."""
        ...

    def describe(self) -> str:
        """A few words for the report."""
        ...


def weights_seen(observation: Observation) -> Weights:
    """The weights of a round; raises `Refused` where they are hidden."""
    if observation.weights is None:
        raise Refused("simulating a client needs its weights, which this attacker does not see.")
    return observation.weights


@dataclass(frozen=True)
class Simulated:
    """The attacker runs a client rule, the right one or a wrong one, on the images it guesses."""

    rule: ClientRule
    words: str = ""
    copies: int = 1

    def scale(self, examples: int) -> float:
        """That of the rule."""
        return self.rule.scale(examples)

    def steps(self, examples: int) -> int:
        """That of the rule."""
        return self.rule.steps(examples)

    def unknowns(self, like: Tensor, key: Key) -> Tensors:
        """None."""
        return {}

    def relabel(self, targets: Tensor, unknowns: Tensors) -> Tensor:
        """As they are."""
        return targets

    def simulate(
        self, gradient: GradFn, observation: Observation, batch: Batch, unknowns: Tensors, key: Key
    ) -> Tensors:
        """What the rule sends for this batch."""
        return self.rule(gradient, weights_seen(observation), batch, key).update

    def penalty(self, inputs: Tensor) -> Tensor:
        """Nothing."""
        return inputs.new_zeros(())

    def merge(self, inputs: Tensor) -> Tensor:
        """The images themselves."""
        return inputs

    def describe(self) -> str:
        """A few words for the report."""
        return self.words or self.rule.describe()


@dataclass(frozen=True)
class OrderUnknown(Simulated):
    """The client's order in each epoch is unknown: every epoch gets its own guesses, which are averaged in the end.

    Epoch e runs through guesses ``x_(e,1..b)`` in an order of their own; as sets they must agree between epochs, which
    ``agreement`` asks of their means. Guesses of later epochs are paired with those of the first, closest pair first,
    and averaged. Which label belongs to which guess of an epoch is open too: a doubly stochastic matrix for each epoch,
    drawn anew for each start, is optimised beside the images.

    Source: Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022, https://arxiv.org/abs/2206.12395,
    sections 4.2 and 4.3. Differences: their order-invariant prior averages features of a random convolution too, and
    they match epochs by an optimal assignment; here the prior averages pixels and the pairing is greedy, which lifts.
    The matrices of labels are ours; they take labels in one order for all epochs.
    """

    SHARPNESS = 3.0
    """How far one unit of the optimised unknown moves the logarithm of a matrix entry."""

    agreement: float = 0.1

    def unknowns(self, like: Tensor, key: Key) -> Tensors:
        """Logits (copies, b, b) of which label each guess of each epoch carries."""
        size = like.shape[0] // self.copies
        return {"order": normal(key, (self.copies, size, size), like.dtype) / self.SHARPNESS}

    def relabel(self, targets: Tensor, unknowns: Tensors) -> Tensor:
        """Each epoch's labels, mixed by its matrix."""
        logits = self.SHARPNESS * unknowns["order"]
        for _ in range(20):  # Sinkhorn's iteration
            logits = logits.log_softmax(-1).log_softmax(-2)
        mixed = torch.einsum("eij,ejk->eik", logits.log_softmax(-1).exp(), self._by_epoch(targets))
        return mixed.reshape(targets.shape)

    def simulate(
        self, gradient: GradFn, observation: Observation, batch: Batch, unknowns: Tensors, key: Key
    ) -> Tensors:
        """As local SGD, each epoch on its own images."""
        rule = self._sgd()
        epochs = [Batch(*parts) for parts in zip(*(part.chunk(self.copies) for part in batch), strict=True)]
        steps = (step for epoch in epochs for step in minibatches(epoch, rule.batch_size))
        return descend(gradient, weights_seen(observation), steps, rule.lr, key)

    def _sgd(self) -> LocalSGD:
        if not isinstance(self.rule, LocalSGD):
            raise ConfigError('it is about local SGD; set client.rule = "sgd".')
        return self.rule

    def _by_epoch(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(self.copies, -1, *inputs.shape[1:])

    def penalty(self, inputs: Tensor) -> Tensor:
        """Weighted mean squared deviation of each epoch's mean image from the mean of all."""
        means = self._by_epoch(inputs).mean(1)
        return self.agreement * (means - means.mean(0)).square().mean()

    def merge(self, inputs: Tensor) -> Tensor:
        """Averages over epochs, paired greedily with the first epoch's images."""
        epochs = self._by_epoch(inputs)
        first = epochs[0]
        paired = [first, *(other.index_select(0, _pair(first, other)) for other in epochs[1:])]
        return torch.stack(paired).mean(0)


def _pair(first: Tensor, other: Tensor) -> Tensor:
    """For each image of ``first`` the index of its partner in ``other``: the closest pair first, each used once."""
    a, b = first.flatten(1), other.flatten(1)
    cost = (a[:, None] - b[None, :]).square().sum(-1)
    count = cost.shape[0]
    places = torch.arange(count, device=cost.device)
    partner = torch.zeros(count, dtype=torch.int64, device=cost.device)
    for _ in range(count):
        best = cost.flatten().argmin()
        row, column = best // count, best % count
        partner = torch.where(places == row, column, partner)
        cost = torch.where((places[:, None] == row) | (places[None, :] == column), torch.inf, cost)
    return partner


@dataclass(frozen=True)
class StraightLine(Simulated):
    """Many local steps as one: the gradient of all images at a point between the first and the last weights.

    ``update = scale x g(w_0 - a update)`` with the share a of the way, in [0, 1], found beside the images; the attacker
    sees both ends of the line, as the update is their difference. One gradient costs the same for any number of steps.

    Source: Zhu, Yao and Blaschko, "Surrogate Model Extension (SME)", ICML 2023, https://arxiv.org/abs/2306.00127,
    section 4. Differences: they learn a with an optimizer of its own; here it shares the attack's, slowed down.
    """

    SLOWED = 0.05
    """One unit of the optimised unknown moves the point by this share of the line."""

    def unknowns(self, like: Tensor, key: Key) -> Tensors:
        """The offset from the middle of the line, one number."""
        return {"place": like.new_zeros(1)}

    def simulate(
        self, gradient: GradFn, observation: Observation, batch: Batch, unknowns: Tensors, key: Key
    ) -> Tensors:
        """The gradient on the line, at the scale of the whole update."""
        weights, update = weights_seen(observation), observation.update
        if update is None:
            raise Refused("attacker.belief 'straight_line' needs the update, which this attacker does not see.")
        place = (0.5 + self.SLOWED * unknowns["place"]).clamp(0.0, 1.0)[0]
        middle = map_tensors(lambda w, u: w - place * u, weights.params, update)
        slope = gradient(Weights(middle, weights.buffers), batch, key)
        scale = self.rule.scale(batch.inputs.shape[0])
        return map_tensors(lambda g: scale * g, slope)


@BELIEFS.add(name="exact")
def exact(rule: ClientRule) -> Belief:
    """The attacker knows the rule and its settings; an order that the client shuffles it can only guess."""
    return Simulated(rule)


@BELIEFS.add(name="sgd", version=2)
def sgd(
    rule: ClientRule, *, epochs: int | None = None, lr: float | None = None, batch_size: int | None = None
) -> Belief:
    """The attacker thinks of local SGD with settings of its own; what is left out it knows.

    Args:
        rule: what the client does.
        epochs: believed number of epochs, at least 1.
        lr: believed learning rate, above 0.
        batch_size: believed batch size of a step, at least 1.
    """
    known = rule if isinstance(rule, LocalSGD) else LocalSGD(1, 1.0, 2**31)
    given = {name: v for name, v in (("epochs", epochs), ("lr", lr), ("batch_size", batch_size)) if v is not None}
    guessed = replace(known, **given)  # type: ignore[arg-type]
    return Simulated(guessed, f"{guessed.describe()} (a guess)")


@BELIEFS.add(name="gradient")
def one_gradient(rule: ClientRule) -> Belief:
    """The attacker takes the update for one gradient of all images, whatever the client did."""
    return Simulated(SingleGradient(), "one gradient of all images")


@BELIEFS.add(name="order_unknown", paper="Dimitrov et al. 2022", arxiv="2206.12395", version=2)
def order_unknown(rule: ClientRule, *, agreement: float = 0.1) -> Belief:
    """The attacker knows the settings but no order: one guess for each image and epoch, averaged in the end.

    Args:
        rule: what the client does; local SGD.
        agreement: weight of the epochs' agreement, at least 0.
    """
    check_range("agreement", agreement, 0)
    belief = OrderUnknown(rule, "local SGD in an unknown order: one guess for each image and epoch, averaged")
    belief = replace(belief, agreement=agreement)
    return replace(belief, copies=belief._sgd().epochs)


@BELIEFS.add(name="straight_line", paper="Zhu, Yao and Blaschko 2023", arxiv="2306.00127")
def straight_line(rule: ClientRule) -> Belief:
    """The attacker replaces all steps by one gradient on the straight line from the first to the last weights."""
    if isinstance(rule, SingleGradient):
        raise ConfigError('it replaces local steps; set client.rule = "sgd".')
    return StraightLine(rule, "one gradient on the straight line between the first and the last weights")
