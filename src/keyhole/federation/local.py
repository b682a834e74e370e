"""Local training of many clients: SGD is written for one client and lifted over clients."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils import _pytree as pytree

from keyhole.core.defense import Context, Defense, defended_gradient
from keyhole.core.keys import advance, fold_in, permutation
from keyhole.core.task import Task
from keyhole.core.tensors import map_tensors, squared_norm
from keyhole.core.types import Batch, Key, Tensors, Weights
from keyhole.errors import ConfigError, check_range
from keyhole.federation.norms import recording
from keyhole.solve.lift import Shared, lift, stack

State = dict[str, Tensors]
"""What a defense keeps of one client between rounds (`keyhole.core.defense.Context`)."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains: minibatch SGD as in `torch.optim.SGD`, from zero momentum in each round.

    Args:
        epochs: passes over the client's images in a round, at least 1.
        lr: learning rate, above 0.
        batch_size: images in a batch, at least 1.
        momentum: heavy-ball momentum, 0 to below 1.
        weight_decay: factor of the weights that joins the gradient, at least 0.
        clip: largest Euclidean norm of a step's gradient, above 0; `None` does not clip.
        proximal: factor of ``w - w0`` that joins the gradient, ``w0`` the weights that the server sent, at least 0
            (`keyhole.federation.strategies.FedProx`).
    """

    epochs: int = 1
    lr: float = 0.1
    batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 1.0
    proximal: float = 0.0

    def __post_init__(self) -> None:
        check_range("epochs", self.epochs, 1)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("batch_size", self.batch_size, 1)
        check_range("momentum", self.momentum, 0, 1, open_high=True)
        check_range("weight_decay", self.weight_decay, 0)
        check_range("clip", 1.0 if self.clip is None else self.clip, 0, open_low=True)
        check_range("proximal", self.proximal, 0)


class Round(NamedTuple):
    """What a round's clients send; every tensor has a leading axis of clients."""

    weights: Weights
    examples: Tensor
    """Number of images of each client, int64 of shape (clients,)."""
    loss: Tensor
    """Mean training loss over each client's steps, before each step, of shape (clients,)."""
    states: tuple[State, ...]
    """What the defense keeps of each client for the next round; empty where clients keep it themselves."""


Spread = Callable[[Any, Sequence[Any]], Iterable[Any]]
"""Like `map` of a callable dataclass over a sequence; calls may be made at the same time and in other processes."""


def train_round(
    task: Task,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    parts: Sequence[Tensor],
    local: LocalTraining,
    key: Key,
    *,
    number: int = 0,
    together: int | None = None,
    defense: Defense | None = None,
    states: Sequence[State] | None = None,
    public: Batch | None = None,
    clients: Sequence[int] | None = None,
    spread: Spread = map,
    spent: Callable[[float], object] = lambda seconds: None,
) -> Round:
    """Train every client from the same weights for one round.

    Each epoch goes through a client's images in a fresh random order, in ``ceil(n / batch_size)`` full batches: the
    last one is filled up with images from the beginning of the same order. Nothing is left out and nothing is padded,
    since padding would enter BatchNorm's statistics; a client with fewer images than a batch sees some of them
    repeatedly.

    Clients lifted together take their steps together, and one that has done its steps leaves. The result is the same
    for any ``together``, up to rounding.

    A defense acts once on all images of a client, then on the gradient of every step, and once on how far the client
    moved, ``weights - trained``. It gets a `Context` whose key differs by client and round; ``ctx.client`` stays 0
    during steps and updates, as one call serves all clients. What it writes into ``ctx.state`` in `on_batch` and
    `on_update` is kept; what it writes there during a step is not. Under a defense running statistics and the reported
    loss are those of the images that it trains on, which costs another forward pass.

    Args:
        task: with ``batchnorm="train_shared"`` and ``dropout="active"`` where the model has such layers, and changed by
            the defense's `on_task`. BatchNorm in eval mode keeps its running statistics.
        weights: what the server sent.
        inputs: all clients' images in the model's input space, (n, *shape).
        targets: their labels as probabilities, (n, k).
        parts: row indices of each client, see `keyhole.federation.partition`.
        local: how clients train.
        key: this round's randomness.
        number: which round, for the defense.
        together: clients in one lifted step; by default as `default_together` says.
        defense: what clients do to protect their images.
        states: what the last round returned for the defense, of the same clients with the same images.
        public: public images with labels, for the defense.
        clients: the number of each client, which its randomness follows from; by default its place in ``parts``.
        spread: where groups of clients are trained; by default here, one after the other.
        spent: told the wall time of each call there.
    """
    clients = range(len(parts)) if clients is None else clients
    for client, part in zip(clients, parts, strict=True):
        if len(part) == 0:
            raise ConfigError(f"client {client} has no images; every client of a round needs at least one.")
    together = default_together(inputs.device) if together is None else together
    check_range("together", together, 1)
    keys = [fold_in(key, f"client {client}") for client in clients]
    before = [dict(state) for state in states] if states else [{} for _ in parts]
    ctx = Context(task, weights, key, round=number, again=states is not None, training=True, public=public)
    defended: list[_Defended] = []
    if defense is not None:
        images = _Images(ctx, defense, inputs, targets)
        defended = list(spread(images, list(zip(clients, parts, keys, before, strict=True))))
        inputs, targets, parts = _joined(inputs, targets, parts, [one.batch for one in defended])
        before = [one.state for one in defended]
    plans = [_plan(part.to(inputs.device), local, own) for part, own in zip(parts, keys, strict=True)]
    # Longest first: whoever has finished is then always at the end of a group.
    order = sorted(range(len(parts)), key=lambda client: -len(plans[client].rows))
    chosen = list(_groups(order, together, before))
    training = _Training(ctx, defense, inputs, targets, local)
    groups: list[_Group] = list(
        spread(training, [([plans[c] for c in some], stack([before[c] for c in some], Shared())) for some in chosen])
    )
    kept = {
        client: _at(group.states, place)
        for some, group in zip(chosen, groups, strict=True)
        for place, client in enumerate(some)
    }
    back = torch.tensor(order).argsort().to(inputs.device)
    trained, loss = pytree.tree_map(lambda *leaves: torch.cat(leaves)[back], *[(g.weights, g.loss) for g in groups])
    examples = torch.tensor([len(part) for part in parts])
    for seconds in (*(one.seconds for one in defended), *(group.seconds for group in groups)):
        spent(seconds)
    return Round(trained, examples, loss, tuple(kept[client] for client in range(len(parts))))


def _groups(order: Sequence[int], together: int, states: Sequence[State]) -> list[list[int]]:
    """Clients in their order, at most ``together`` in a group, whose states can be stacked."""
    groups: list[list[int]] = []
    for client in order:
        last = groups[-1] if groups else []
        if last and len(last) < together and _shapes(states[last[0]]) == _shapes(states[client]):
            last.append(client)
        else:
            groups.append([client])
    return groups


def _shapes(state: State) -> dict[str, dict[str, torch.Size]]:
    return {place: {name: value.shape for name, value in tensors.items()} for place, tensors in state.items()}


def default_together(device: torch.device) -> int:
    """Clients in one lifted step: 1 on a CPU, else 16.

    Lifted over weights a convolution is a grouped one, which on a CPU is slower than a loop where it is the main cost;
    networks so small that calls cost more than arithmetic gain from being lifted on a CPU, too.
    """
    return 1 if device.type == "cpu" else 16


# One client


class _Step(NamedTuple):
    gradient: Tensors
    buffers: Tensors
    loss: Tensor


_StepFn = Callable[[Weights, Batch, Key, Key, State, int], _Step]
"""Weights, batch, the step's key, the defense's key, the defense's state, and the step's number."""


def _plain_step(recorder: Task) -> _StepFn:
    """Gradient, running statistics and loss of a batch from one forward pass."""

    def step(weights: Weights, batch: Batch, key: Key, own: Key, state: State, number: int) -> _Step:
        masks = recorder.masks(key, batch.inputs.shape[0])

        def objective(params: Tensors) -> tuple[Tensor, Tensors]:
            return _loss(recorder, Weights(params, weights.buffers), batch, masks)

        gradient, (loss, buffers) = grad_and_value(objective, has_aux=True)(weights.params)
        return _Step(gradient, buffers, loss)

    return step


def _defended_step(defense: Defense, round_ctx: Context) -> _StepFn:
    task, recorder = round_ctx.task, recording(round_ctx.task)

    def step(weights: Weights, batch: Batch, key: Key, own: Key, state: State, number: int) -> _Step:
        ctx = _context(round_ctx, own, state, step=number)
        gradient = defended_gradient(task, defense, ctx)(weights, batch, key)
        loss, buffers = _loss(recorder, weights, batch, recorder.masks(key, batch.inputs.shape[0]))
        return _Step(gradient, buffers, loss)

    return step


def _loss(recorder: Task, weights: Weights, batch: Batch, masks: Tensors) -> tuple[Tensor, Tensors]:
    """The share-weighted mean loss, and the buffers after the forward pass."""
    # The model writes in place, which `torch.func` allows on what was made inside the function only.
    buffers = map_tensors(torch.clone, weights.buffers)
    logits = recorder.logits(Weights(weights.params, buffers), batch.inputs, masks)
    return (batch.share * recorder.loss(logits, batch.targets)).sum(), buffers


# A group of clients


class _Plan(NamedTuple):
    rows: Tensor
    """Image indices, int64 of shape (steps, batch_size)."""
    key: Key


class _Group(NamedTuple):
    weights: Weights
    loss: Tensor
    states: State
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class _Training:
    """What the clients of a round share; called with the plans and stacked states of some, it trains these together."""

    ctx: Context
    defense: Defense | None
    inputs: Tensor
    targets: Tensor
    local: LocalTraining

    @cached_property
    def _step(self) -> _StepFn:
        return _plain_step(recording(self.ctx.task)) if self.defense is None else _defended_step(self.defense, self.ctx)

    def __call__(self, some: tuple[Sequence[_Plan], State]) -> _Group:
        began = time.perf_counter()
        plans, states = some
        group = _train_group(self._step, self.ctx.weights, self.inputs, self.targets, plans, states, self.local)
        if self.defense is not None:
            group = _defend_updates(group, self.defense, self.ctx, [plan.key for plan in plans])
        return group._replace(seconds=time.perf_counter() - began)


def _plan(rows: Tensor, local: LocalTraining, key: Key) -> _Plan:
    count, size = len(rows), local.batch_size
    steps = -(-count // size)
    epochs = []
    for epoch in range(local.epochs):
        order = permutation(fold_in(key, f"epoch {epoch}"), count).to(rows.device)
        around = torch.arange(steps * size, device=rows.device) % count
        epochs.append(rows[order[around]].reshape(steps, size))
    return _Plan(torch.cat(epochs), key)


def _train_group(
    step: _StepFn,
    weights: Weights,
    inputs: Tensor,
    targets: Tensor,
    plans: Sequence[_Plan],
    states: State,
    local: LocalTraining,
) -> _Group:
    count, device = len(plans), inputs.device
    here = Weights(*(map_tensors(lambda t: t.detach().expand(count, *t.shape).clone(), part) for part in weights))
    velocity = map_tensors(torch.zeros_like, here.params)
    losses = torch.zeros(count, dtype=targets.dtype, device=device)
    keys = torch.stack([fold_in(plan.key, "steps") for plan in plans]).to(device)
    own = torch.stack([fold_in(plan.key, "defense") for plan in plans]).to(device)
    share = torch.full((local.batch_size,), 1.0 / local.batch_size, dtype=targets.dtype, device=device)
    for number in range(len(plans[0].rows)):
        active = sum(len(plan.rows) > number for plan in plans)
        rows = torch.stack([plan.rows[number] for plan in plans[:active]])
        batch = Batch(inputs[rows], targets[rows], share.expand(active, -1))
        now, kept = _first(active, here), _first(active, states)
        arguments = (now, batch, advance(keys[:active], number), own[:active], kept, number)
        gradient, buffers, loss = _over_clients(step, active)(*arguments)
        # The rest is the same for a stack of clients as for one, and in place.
        losses[:active] += loss
        for name, buffer in buffers.items():
            now.buffers[name].copy_(buffer)
        _descend(now.params, weights.params, _first(active, velocity), _clipped(gradient, local.clip, active), local)
    return _Group(here, losses / torch.tensor([len(plan.rows) for plan in plans], device=device), states)


def _descend(params: Tensors, start: Tensors, velocity: Tensors, gradient: Tensors, local: LocalTraining) -> None:
    """One step in place: ``v <- momentum v + g + weight_decay w + proximal (w - w0)`` and ``w <- w - lr v``."""
    for name, slope in gradient.items():
        if local.weight_decay:
            slope = slope + local.weight_decay * params[name]
        if local.proximal:
            slope = slope + local.proximal * (params[name] - start[name])
        velocity[name].mul_(local.momentum).add_(slope)
        params[name].sub_(velocity[name], alpha=local.lr)


def _clipped(gradient: Tensors, clip: float | None, count: int) -> Tensors:
    if clip is None:
        return gradient

    def one(own: Tensors) -> Tensors:
        # As in torch.nn.utils.clip_grad_norm_.
        factor = (clip / (squared_norm(own).sqrt() + 1e-6)).clamp(max=1.0)
        return map_tensors(lambda slope: slope * factor, own)

    clipped: Tensors = _over_clients(one, count)(gradient)
    return clipped


def _context(round_ctx: Context, own: Key, state: State, *, client: int = 0, step: int = 0) -> Context:
    """A client's context in a round; notes and hints go nowhere."""
    return replace(round_ctx, key=own, state=dict(state), client=client, step=step, recorded=False, notes={}, hints={})


class _Defended(NamedTuple):
    """One client's images as the defense wants them trained on, `None` where it leaves them as they are."""

    batch: Batch | None
    state: State
    seconds: float


@dataclass(frozen=True, eq=False)
class _Images:
    """Called with a client's number, rows, key and state, it lets the defense act on the client's images."""

    ctx: Context
    defense: Defense
    inputs: Tensor
    targets: Tensor

    def __call__(self, one: tuple[int, Tensor, Key, State]) -> _Defended:
        began = time.perf_counter()
        client, part, key, state = one
        rows = part.to(self.inputs.device)
        ctx = _context(self.ctx, fold_in(key, "defense").to(rows.device), state, client=client)
        changed = self.defense.on_batch(_batch(self.inputs, self.targets, rows), ctx)
        same = torch.equal(changed.inputs, self.inputs[rows]) and torch.equal(changed.targets, self.targets[rows])
        return _Defended(None if same else changed, ctx.state, time.perf_counter() - began)


def _batch(inputs: Tensor, targets: Tensor, rows: Tensor) -> Batch:
    share = torch.full((len(rows),), 1.0 / len(rows), dtype=targets.dtype, device=inputs.device)
    return Batch(inputs[rows], targets[rows], share)


def _joined(
    inputs: Tensor, targets: Tensor, parts: Sequence[Tensor], changed: Sequence[Batch | None]
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Images, labels and whose they are, with what a defense made of them."""
    if all(batch is None for batch in changed):
        return inputs, targets, parts
    # Client by client, as an image that two clients have is no longer one image.
    batches = [
        _batch(inputs, targets, part.to(inputs.device)) if batch is None else batch
        for part, batch in zip(parts, changed, strict=True)
    ]
    images, labels = torch.cat([batch.inputs for batch in batches]), torch.cat([batch.targets for batch in batches])
    ends = torch.tensor([0, *(len(batch.inputs) for batch in batches)]).cumsum(0).tolist()
    return images, labels, tuple(torch.arange(a, b) for a, b in itertools.pairwise(ends))


def _defend_updates(group: _Group, defense: Defense, round_ctx: Context, keys: Sequence[Key]) -> _Group:
    start = round_ctx.weights

    def defend(params: Tensors, own: Key, state: State) -> tuple[Tensors, State]:
        ctx = _context(round_ctx, own, state)
        update = defense.on_update(map_tensors(torch.sub, start.params, params), ctx)
        return map_tensors(torch.sub, start.params, update), ctx.state

    trained = group.weights
    own = torch.stack([fold_in(key, "defense") for key in keys]).to(group.loss.device)
    params, states = _over_clients(defend, len(keys))(trained.params, own, group.states)
    return _Group(Weights(params, trained.buffers), group.loss, states)


def _over_clients(fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``fn`` lifted over a leading axis of clients; for one client without `vmap`, where a convolution stays one."""
    if count > 1:
        return lift(fn, Shared())

    def single(*args: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda leaf: leaf[None], fn(*_at(args, 0)))

    return single


def _first(count: int, tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf[:count], tree)


def _at(tree: Any, client: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf[client], tree)
