"""Soteria: the units of a representation that give most of the image away are cut out of one layer's gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, normal
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.tensors import map_tensors
from keyhole.core.types import Batch, GradFn, Key, Observation, Tensors, Weights
from keyhole.errors import ModelError, UnknownName, check_range

CHUNK = 16
"""Units whose Jacobian rows are worked out at a time: the Jacobian of all units is never in memory."""

RIDGE = 1e-9
"""Added to the diagonal of J J^T, in units of the mean squared norm of its live rows, before it is inverted."""

ITERATIONS = 60
"""Of the power method, for the largest singular value."""

Body = Callable[[Tensor], Tensor]
"""From inputs (b, *shape) to the representation (b, d) that the defended layer reads."""

Linear = Callable[[Tensor], Tensor]
"""A linear map of one of these spaces to the other, image by image."""


@DEFENSES.add(
    name="soteria",
    paper="Sun, Li, Wang, Yang, Li and Chen 2021, Soteria (our reading of the abstract and the public code)",
    arxiv="2012.06043",
    known_breaks=(
        "one tensor is defended and the others give the image away: matching without it recovers images at 80 % "
        "(Balunovic et al. 2022, arXiv 2111.04706)",
        "the zero columns show the mask: masking the simulated gradient likewise undoes it "
        "(Li et al. 2022, arXiv 2203.15696)",
        "dead units are pruned first and carry nothing: below their share of the layer the defense changes nothing",
    ),
)
@dataclass(frozen=True)
class Soteria(Defense):
    """Zeroes columns of one linear layer's weight gradient: units that reveal much of the input for their size.

    With the layer's input r = f(x), its Jacobian J = dr/dx and one score a unit, summed over the images of a batch,

        approximate:  s_i = |dr_i/dx| / (|r_i| + constant)
        exact:        s_i = 1 / (sqrt(((J J^T + ridge I)^-1)_ii) (|r_i| + constant)), over live units, in float64

    the ``ceil(rate (d - 1))`` units of the smallest score are pruned: those columns of the weight gradient are zero.
    Everything else is sent as it is. A unit that is 0 for every image is dead: it scores 0 and is pruned first, and
    as its column is 0 anyway, a rate up to the share of dead units is no defense at all.

    Recorded for each image: the share of |r|^2 that was removed, and the certificate

        certified_mse = (|r - r'| / sigma_max(dr/dpixels))^2 / n,    r' = r with the pruned units at 0,

    which no reconstruction x' with f(x') = r' falls below: exact where f is linear, to first order elsewhere. It says
    nothing about attackers who leave the defended tensor out, or mask it.

    Args:
        rate: share of the layer's units to prune, in [0, 1).
        layer: name of the linear layer; empty for the head, the last one.
        score: ``approximate``, each unit by itself, or ``exact``, by the pseudo-inverse of the joint Jacobian.
        live_only: take the rate of the units that are live instead of all.
        constant: added to a unit's size, at least 0. The authors' code has 0 for L-BFGS and 0.1 for signed Adam.

    Source: Sun et al., CVPR 2021, https://arxiv.org/abs/2012.06043. The paper's text could not be read; formulas are
    those of the public code, and the certificate is our derivation of what the abstract calls provable.

    Differs from the authors' code: units are ranked, where it compares |s| with a percentile of s (equal for distinct
    positive scores); |r_i| stands for r_i, which may be negative elsewhere; Jacobian rows are computed in batches; the
    exact score and ``live_only`` are not in it; and it acts at every local step.
    """

    rate: float = 0.4
    layer: str = ""
    score: Literal["approximate", "exact"] = "approximate"
    live_only: bool = False
    constant: float = 0.0

    def __post_init__(self) -> None:
        check_range("rate", self.rate, 0, 1, open_high=True)
        check_range("constant", self.constant, 0)

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        """The gradient with the pruned columns of the defended layer at zero.

        Raises:
            UnknownName: the model has no linear layer of this name.
            ModelError: the layer does not read one vector an image.
        """
        layer = defended(ctx.task, self.layer)

        def pruned(weights: Weights, batch: Batch, key: Key) -> Tensors:
            clean = gradient(weights, batch, key)
            # The same key gives the dropout masks of the gradient itself.
            masks = ctx.task.masks(key, batch.inputs.shape[0])
            kept = self._kept(representation(ctx.task, layer, masks), weights, batch, ctx)
            name = f"{layer}.weight"
            return {**clean, name: clean[name] * kept.to(clean[name].dtype)}

        return pruned

    def _kept(self, body: Callable[[Weights], Body], weights: Weights, batch: Batch, ctx: Context) -> Tensor:
        """Which columns stay, (d,); puts on record what that does to the representation."""
        inputs, real = batch.inputs, batch.share > 0
        features = body(weights)(inputs)
        alive = (features != 0) & real[:, None]
        if self.score == "exact":
            precise = body(Weights(*(map_tensors(_double, part) for part in weights)))
            spread = 1.0 / joint_gain(precise, inputs.double(), alive)
        else:
            spread = row_norms(body(weights), inputs)
        # A unit that no pixel moves scores 0, also where it is 0 itself.
        size = features.abs().to(spread.dtype) + self.constant
        scores = torch.where(alive & (spread > 0), spread / torch.where(size > 0, size, 1.0), 0.0).sum(0)
        kept = ~smallest(scores, alive.any(0), self.rate, self.live_only)

        lost = torch.where(kept, 0.0, features).square().sum(1)
        ctx.note("representation_energy_removed", lost / features.square().sum(1).clamp(min=1e-30))
        ctx.note("dead_units", (~alive.any(0)).double().mean())
        if ctx.recorded:
            ctx.note("certified_mse", self._certified(body(weights), inputs, lost, ctx))
        return kept

    @staticmethod
    def _certified(body: Body, inputs: Tensor, lost: Tensor, ctx: Context) -> Tensor:
        """The least mean squared error of pixels for who reproduces what was sent, (b,); NaN where there is none."""
        bounds = ctx.task.bounds
        pixels = inputs * bounds.std + bounds.mean
        start = normal(fold_in(ctx.key, "soteria"), tuple(inputs.shape), inputs.dtype)
        stretch = largest_stretch(lambda p: body(bounds.from_pixels(p)), pixels, start)
        certified = lost / stretch.square().clamp(min=1e-30) / inputs[0].numel()
        # No picture in [0, 1] is further away than this: to first order none has these features, and nothing is said.
        furthest = torch.maximum(pixels, 1.0 - pixels).square().flatten(1).mean(1)
        return torch.where(certified <= furthest, certified, torch.nan)

    def counters(self) -> tuple[Counter, ...]:
        """Leaving the defended tensor out; masking the simulated one like the observed one."""
        return DropLayer(self.layer), MaskColumns(self.layer)

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Says so where nothing was removed."""
        removed = notes.get("representation_energy_removed")
        if removed and max(removed) == 0:
            return "Soteria removed nothing: only dead units were pruned, so the update is an undefended one."
        return ""


def defended(task: Task, layer: str) -> str:
    """The name of the defended layer: the head where none is given."""
    linear = [name for name, module in task.model.named_modules() if isinstance(module, nn.Linear)]
    if layer and layer not in linear:
        raise UnknownName("linear layer", layer, linear, "defense 'soteria'")
    return layer or task.head


def representation(task: Task, layer: str, masks: Tensors) -> Callable[[Weights], Body]:
    """The part of the network before the layer, as a function of the weights."""
    # A trace keeps what the head reads, so the layer stands in for it.
    cut = replace(task, head=layer)

    def body(weights: Weights) -> Body:
        def read(inputs: Tensor) -> Tensor:
            features = cut.trace(weights, inputs, masks=masks).features
            if features.dim() != 2:
                raise ModelError(
                    f"layer '{layer}' reads {tuple(features.shape[1:])} for each image; 'soteria' needs a vector."
                )
            return features

        return read

    return body


def row_norms(body: Body, inputs: Tensor) -> Tensor:
    """Norm of each Jacobian row, |dr_i/dx|, for each image: (b, d)."""
    features, pull, _ = linearised(body, inputs)
    return torch.cat([pull_rows(pull, rows, features).flatten(2).norm(dim=2) for rows in unit_rows(features)]).T


def linearised(body: Body, inputs: Tensor) -> tuple[Tensor, Linear, Linear]:
    """The representation, and J^T u and J v as functions of u (b, d) and v (b, *shape)."""
    features, back = vjp(body, inputs)  # type: ignore[misc]

    def pull(u: Tensor) -> Tensor:
        return back(u)[0]  # type: ignore[no-any-return]

    # The transpose of J^T: reverse mode twice, which every network has that a gradient can be matched on.
    _, forth = vjp(pull, torch.zeros_like(features))  # type: ignore[misc]
    return features, pull, lambda v: forth(v)[0]


def pull_rows(pull: Linear, rows: Tensor, features: Tensor) -> Tensor:
    """Jacobian rows of some units, (units, b, *shape): one batched backward pass, all images at once."""
    seeds = rows[:, None, :].expand(-1, features.shape[0], -1)
    return vmap(pull)(seeds)


def unit_rows(features: Tensor) -> tuple[Tensor, ...]:
    """Rows of the identity matrix, (units, d), in chunks."""
    return torch.split(torch.eye(features.shape[1], dtype=features.dtype, device=features.device), CHUNK)


def joint_gain(body: Body, inputs: Tensor, alive: Tensor) -> Tensor:
    """``sqrt(((J J^T + ridge I)^-1)_ii)`` over the live units of each image, (b, d); infinite for dead ones.

    It is the norm of column i of J's pseudo-inverse where J has full rank, and at least 1 / |row i|.
    """
    features, pull, push = linearised(body, inputs)
    columns = [vmap(push)(pull_rows(pull, rows, features)) for rows in unit_rows(features)]
    live = alive.to(features.dtype)
    gram = torch.cat(columns).movedim(0, 2) * live[:, :, None] * live[:, None, :]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.sum(1) / live.sum(1).clamp(min=1.0)
    # Dead rows get a 1 on the diagonal, which leaves the live block alone and keeps the matrix invertible.
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    filled = gram + torch.diag_embed(torch.where(alive, ridge[:, None], 1.0))
    factor, _ = torch.linalg.cholesky_ex((filled + filled.mT) / 2)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(gram), upper=False)
    return torch.where(alive & (diagonal > 0), inverse.norm(dim=1), torch.inf)


def smallest(scores: Tensor, alive: Tensor, rate: float, live_only: bool) -> Tensor:
    """Which units are pruned, (d,): ``ceil(rate (n - 1))`` of the smallest score among all n, or the n live, units."""
    ranked = torch.where(alive, scores, torch.inf) if live_only else scores
    candidates = alive.double().sum() if live_only else alive.new_full((), alive.shape[0], dtype=torch.float64)
    # Just below, as 0.07 x 100 is a little more than 7 in floats.
    count = (rate * (candidates - 1.0) - 1e-9).ceil()
    return ranked.argsort(stable=True).argsort(stable=True) < count


def largest_stretch(body: Body, inputs: Tensor, start: Tensor) -> Tensor:
    """The largest singular value of each image's Jacobian, (b,), by the power method, which nears it from below."""
    _, pull, push = linearised(body, inputs)
    direction, pushed = start, start
    for _ in range(ITERATIONS):
        length = direction.flatten(1).norm(dim=1).clamp(min=1e-30)
        direction = direction / length.reshape(-1, *(1 for _ in inputs.shape[1:]))
        pushed = push(direction)
        direction = pull(pushed)
    return pushed.norm(dim=1)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class OfLayer(Counter):
    """A counter that knows which layer is defended."""

    truth_loss = "zero"

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def truth_stays(self, rounds: int, series: int, steps: int = 1) -> bool:
        """For one gradient: each of several may be pruned otherwise, and later ones start from pruned weights."""
        return steps == 1


class DropLayer(OfLayer):
    """Compares everything but the defended tensor.

    Source: Balunovic, Dimitrov, Staab and Vechev, "Bayesian Framework for Gradient Leakage", ICLR 2022,
    https://arxiv.org/abs/2111.04706.
    """

    name = "drop_layer"

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """0 for the defended tensor and 1 for the others, by name."""
        dropped = f"{defended(task, self.layer)}.weight"
        return {name: value.new_tensor(float(name != dropped)) for name, value in (seen[0].update or {}).items()}

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """Both with zeros for the defended tensor."""
        return tuple(map_tensors(lambda value, keep: value * keep, side, facts) for side in (simulated, observed))  # type: ignore[return-value]


class MaskColumns(OfLayer):
    """Prunes the simulated gradient as the client did: the columns that are zero in what was seen.

    Columns of dead units are masked too, which costs nothing. Over several local steps only columns that were pruned in
    all of them are known.

    Source: Li, Zhang, Liu and Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient Leakage",
    CVPR 2022, https://arxiv.org/abs/2203.15696.
    """

    name = "mask_columns"

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """Which columns of the defended tensor were sent, (d,), by the tensor's name."""
        name = f"{defended(task, self.layer)}.weight"
        update = seen[0].update or {}
        return {name: (update[name] != 0).any(0).to(update[name].dtype)} if name in update else {}

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        """The plain gradient without the columns that were not sent."""

        def masked(weights: Weights, batch: Batch, key: Key) -> Tensors:
            clean = gradient(weights, batch, key)
            return {**clean, **{name: clean[name] * sent for name, sent in facts.items()}}

        return masked
