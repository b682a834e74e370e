"""One simulated client on public images, and what its update shows about how much could be recovered from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from keyhole.attacks.matching import GradientMatching
from keyhole.core.attack import Attack, SequentialAttack
from keyhole.core.keys import fold_in, new_key
from keyhole.core.registry import BELIEFS, RULES
from keyhole.core.rule import ClientRule, LocalSGD
from keyhole.core.task import Task, plain_gradient
from keyhole.core.tensors import dot, flatten, safe_norm
from keyhole.core.trial import Spec
from keyhole.core.types import Batch, GradFn, Key, Observation, Tensors, Weights
from keyhole.experiment.jacobian import pinned_share
from keyhole.experiment.sections import ClientSection, Experiment
from keyhole.experiment.setup import Setup
from keyhole.solve.lbfgs import LBFGS

BY_LBFGS, BY_OTHERS, BY_OTHERS_SMOOTHLY = 1e-3, 3e-2, 3e-3
"""How near to the update attacks come, as a share of its norm: by L-BFGS without a tolerance, by others, and by others
on networks without kinks: `inverting_gradients` came within 0.001 to 0.007 of updates of 1 to 4 digits in three steps
(`keyhole frontier sent`; its score is half the square of this)."""

ROUNDING = 1e-6
"""What single precision leaves of a tolerance that asks for more."""

ERROR = 0.1
"""Error of a pixel, in [0, 1], up to which it counts as pinned down."""

MOST_WORK = 2e9
"""Floating-point operations of a client's forward passes up to which the share of pinned directions is estimated."""

COLUMNS = 256
"""Random columns that a layer's gradient is multiplied by to find its rank; ranks above are not told apart."""


@dataclass(frozen=True)
class Facts:
    """What one simulated, undefended update of public images shows."""

    images: int
    unknowns: int
    """Pixels of all images behind the update."""
    equations: int
    """Entries of the update."""
    nonzero: int
    """Entries that are not exactly 0."""
    dead: float
    """Share of units (rows of weights, and biases) that got no gradient at all."""
    ranks: dict[str, int]
    """Rank of each linear layer's part of the update: it reveals at most so many directions."""
    norm: float
    steps: int
    """Local steps."""
    drift: float
    """1 - cosine between the update and one gradient of all images at the first weights; 0 for one step."""
    mismatch: float
    """Share of the update's norm that the attacker's belief leaves unexplained at the truth, at its best scale."""
    collisions: float
    """Expected pairs of equal labels in a batch."""
    kinks: tuple[str, ...]
    """Operations without a second derivative in the forward pass."""
    depth: int
    """Convolutions and matrix products in the forward pass."""
    precision: float
    """How near to the update the attacks are taken to come, as a share of its norm."""
    pinned: float | None
    """Share of directions in image space that an update known so precisely pins down; `None`: not estimated."""
    reads_image: bool
    """Whether a linear layer with bias reads the image itself: its gradient then holds images in closed form."""
    norms: bool
    """Whether the network has BatchNorm."""
    drops: bool
    """Whether dropout is active."""


def look(experiment: Experiment, setup: Setup, attacks: list[Attack]) -> Facts:
    """Simulate a client of a setting, undefended.

    Args:
        experiment: the setting.
        setup: its data and networks; only public images and the first network are used.
        attacks: what will be run, for their precision.
    """
    client, task = experiment.client, setup.task
    weights = setup.weights[experiment.run.seeds[0]][0]
    batch = public_batch(setup, client)
    gradient, key = plain_gradient(task), fold_in(new_key(experiment.run.seeds[0]), "dry run")
    rule: ClientRule = RULES.build(client.rule, **client.spec.asdict())
    update = rule(gradient, weights, batch, key).update
    one = gradient(weights, batch, key) if rule.steps(client.size) > 1 else update
    # With active dropout the masks are unknowns of the attack, not something that it believes.
    mismatch = 0.0 if task.drops else _mismatch(experiment.attacker.spec, rule, gradient, weights, batch, update, key)

    def send(pixels: Tensor) -> Tensor:
        inputs = task.bounds.from_pixels(pixels)
        return flatten(rule(gradient, weights, batch._replace(inputs=inputs), key).update)

    kinks, depth, work = operations(task, weights, batch.inputs)
    precision = math.hypot(min((precision_of(attack, kinks) for attack in attacks), default=BY_OTHERS), mismatch)
    flat = flatten(update)
    small = work * rule.steps(client.size) <= MOST_WORK
    return Facts(
        images=client.size,
        unknowns=batch.inputs.numel(),
        equations=flat.numel(),
        nonzero=int((flat != 0).sum()),
        dead=dead_units(update),
        ranks=linear_ranks(task, update),
        norm=float(flat.norm()),
        steps=rule.steps(client.size),
        drift=max(0.0, 1.0 - _cosine(update, one)),
        mismatch=mismatch,
        collisions=expected_collisions(setup.data.public.labels, client),
        kinks=kinks,
        depth=depth,
        precision=precision,
        pinned=estimate_pinned(send, task.bounds.to_pixels(batch.inputs), precision) if small else None,
        reads_image=reads_image(task, weights, batch.inputs),
        norms=bool(task.norms),
        drops=bool(task.drops),
    )


def public_batch(setup: Setup, client: ClientSection) -> Batch:
    """Public images behind one update, sorted by class; where the public pool has fewer, some repeat.

    Labels are made equal or distinct where the setting says so, whatever the images show.
    """
    public = setup.data.public
    rows = torch.arange(client.size) % len(public)
    labels = public.labels[rows]
    if client.labels == "equal":
        labels = labels[:1].expand(client.size)
    elif client.labels == "distinct":
        labels = (labels[0] + torch.arange(client.size)) % setup.task.num_classes
    order = labels.argsort(stable=True)
    inputs = setup.task.bounds.from_pixels(setup.images(public)[rows[order].to(setup.device)])
    targets = nn.functional.one_hot(labels[order].to(setup.device), setup.task.num_classes).to(setup.dtype)
    return Batch(inputs, targets, inputs.new_full((client.size,), 1.0 / client.size))


def precision_of(attack: Attack, kinks: tuple[str, ...]) -> float:
    """How near to the update an attack comes where nothing hinders it, as a share of the update's norm.

    L-BFGS comes down to its tolerance, which is a squared distance.
    """
    one = attack.inner if isinstance(attack, SequentialAttack) else attack
    if not isinstance(one, GradientMatching):
        return BY_OTHERS
    if isinstance(one.optimizer, LBFGS):
        return max(math.sqrt(one.tolerance), ROUNDING) if one.tolerance > 0 else BY_LBFGS
    return BY_OTHERS if kinks else BY_OTHERS_SMOOTHLY


def dead_units(update: Tensors) -> float:
    """Share of units (first index of each tensor) whose entries are all exactly 0."""
    rows = [(value.reshape(value.shape[0], -1) == 0).all(1) for value in update.values() if value.dim() > 0]
    return float(torch.cat(rows).double().mean())


def linear_ranks(task: Task, update: Tensors) -> dict[str, int]:
    """Numerical rank of each linear layer's part, by name; above `COLUMNS` they are not told apart."""
    draws = torch.Generator().manual_seed(0)
    ranks = {}
    for name, module in task.model.named_modules():
        matrix = update.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and matrix is not None:
            matrix = matrix.double().cpu()
            if matrix.shape[1] > COLUMNS:
                matrix = matrix @ torch.randn(matrix.shape[1], COLUMNS, dtype=torch.float64, generator=draws)
            # The update is single precision: singular values below this are its rounding.
            ranks[name] = int(torch.linalg.matrix_rank(matrix, rtol=1e-5))
    return ranks


def expected_collisions(labels: Tensor, client: ClientSection) -> float:
    """Expected pairs of equal labels among the images of an update, drawn without replacement like ``labels``."""
    pairs = math.comb(client.size, 2)
    if client.labels != "any":
        return float(pairs) if client.labels == "equal" else 0.0
    counts = labels.bincount().double()
    total = float(counts.sum())
    return pairs * float((counts * (counts - 1)).sum()) / (total * (total - 1)) if total > 1 else 0.0


_KINKS = {"ReluBackward": "ReLU", "LeakyReluBackward": "leaky ReLU", "MaxPool": "max pooling"}
_PRODUCTS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "BmmBackward")


def operations(task: Task, weights: Weights, inputs: Tensor) -> tuple[tuple[str, ...], int, int]:
    """Kinks, number of convolutions and matrix products, and floating-point operations of one forward pass."""
    params = {name: value.detach().requires_grad_(True) for name, value in weights.params.items()}
    with FlopCounterMode(display=False) as counter:
        waiting = [task.logits(Weights(params, weights.buffers), inputs).grad_fn]
    met, names = set(), []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in met:
            met.add(node)
            names.append(node.name())
            waiting += [parent for parent, _ in node.next_functions]
    kinks = {words for start, words in _KINKS.items() if any(name.startswith(start) for name in names)}
    return tuple(sorted(kinks)), sum(name.startswith(_PRODUCTS) for name in names), counter.get_total_flops()


def reads_image(task: Task, weights: Weights, inputs: Tensor) -> bool:
    """Whether the input of a linear layer with bias is the flattened image."""
    found: list[bool] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # By value: another layer may be as wide as an image is large.
        found.append(torch.equal(args[0].flatten(1), inputs.flatten(1)))

    layers = [one for one in task.model.modules() if isinstance(one, nn.Linear) and one.bias is not None]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        task.logits(weights, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return any(found)


def _mismatch(
    spec: Spec, rule: ClientRule, gradient: GradFn, weights: Weights, batch: Batch, update: Tensors, key: Key
) -> float:
    belief = BELIEFS.build(spec.name, rule=rule, **spec.asdict())
    if belief.copies > 1 and isinstance(rule, LocalSGD):
        # Guesses of their own for each epoch fit any order; the one they are in here must be the client's.
        update = replace(rule, order="fixed")(gradient, weights, batch, key).update
    inputs, targets = (part.repeat(belief.copies, *(1 for _ in part.shape[1:])) for part in batch[:2])
    guess = Batch(inputs, targets, batch.share.repeat(belief.copies) / belief.copies)
    unknowns = belief.unknowns(inputs, fold_in(key, "unknowns"))
    # Another key: of what the client draws at random the attacker knows nothing.
    believed = belief.simulate(gradient, Observation(weights, update), guess, unknowns, fold_in(key, "attacker"))
    return math.sqrt(max(0.0, 1.0 - _cosine(believed, update) ** 2))


def _cosine(a: Tensors, b: Tensors) -> float:
    return float(dot(a, b) / (safe_norm(a) * safe_norm(b)).clamp(min=1e-30))


def estimate_pinned(send: Callable[[Tensor], Tensor], pixels: Tensor, precision: float) -> float | None:
    """Share of directions in image space that an update pins down; `None` where it cannot be worked out."""
    try:
        return pinned_share(send, pixels, precision, ERROR)
    except (RuntimeError, NotImplementedError):  # some operation has no second derivative, or memory is short
        return None
