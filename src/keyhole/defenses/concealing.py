"""DCS: proxies whose gradient looks like that of the sensitive images are trained on beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, integers, normal, permutation, threefry2x32
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.tensors import dot, map_tensors, safe_norm, squared_norm
from keyhole.core.types import Batch, Field, GradFn, Key, Observation, Tensors, Weights
from keyhole.errors import Refused, check_range
from keyhole.solve.inner import minimise
from keyhole.solve.optimizers import adam

LEAST = 0.5
"""Least multiple of the honest gradient that the projection adds (kappa)."""

DAMPING = 1e-3
"""Added to the honest gradient's squared norm in the projection (delta)."""

START = 0.1
"""Deviation of the counters' first dummies. Proxies far from 0 saturate a network: from 1 the attack ends earlier."""


@dataclass(frozen=True)
class Decay:
    """A tenth of the rate at each of the released code's milestones: 374, 624 and 875 of 1,000 steps."""

    steps: int

    def __call__(self, step: Tensor) -> Tensor:
        """1, 0.1, 0.01 or 0.001."""
        # Floor division by these floats, as released: 1000 // 1.6 is 624, for 1.6 is a little more than 8/5.
        milestones = [self.steps // part for part in (2.667, 1.6, 1.142)]
        return torch.pow(0.1, torch.stack([step >= milestone for milestone in milestones]).sum(0).double())


def project(mixed: Tensors, honest: Tensors) -> tuple[Tensors, Tensor]:
    """The update that does not oppose the honest gradient, and whether it had to be changed.

    With ``<mixed, honest> < 0``: ``mixed + v honest``, v the minimiser of ``v^2 (|honest|^2 + delta) / 2 +
    v <mixed, honest>`` subject to ``v >= kappa``, which is ``max(kappa, -<mixed, honest> / (|honest|^2 + delta))``.
    """
    product = dot(mixed, honest)
    fired = product < 0
    multiple = (-product / (squared_norm(honest) + DAMPING)).clamp(min=LEAST)
    multiple = torch.where(fired, multiple, torch.zeros_like(multiple))
    return map_tensors(lambda m, h: m + multiple * h, mixed, honest), fired


@dataclass(frozen=True)
class Mixing:
    """How concealed and private images share one loss.

    ``[ l CE(X_c, y_c) + (1 - l) CE(X_c, y_s) + CE(X, y) ] / n``, as one batch with soft labels.

    Args:
        sensitive: how many of the last images have proxies; 0 for all.
        proxies: proxies of each, m.
        own: weight l of a proxy's own label.
        parts: the divisor n.
        projected: whether the projection follows.
    """

    sensitive: int
    proxies: int
    own: float
    parts: int
    projected: bool

    def count(self, batch: int) -> int:
        """Sensitive images of a batch."""
        if self.sensitive > batch:
            raise Refused(f"concealing.sensitive is {self.sensitive}, but a batch has {batch} image(s).")
        return self.sensitive or batch

    def enlarge(self, batch: Batch, concealed: Tensor, labels: Tensor) -> Batch:
        """The proxies before the private images; proxy i belongs to sensitive image ``i // m``."""
        theirs = batch.targets[-self.count(batch.inputs.shape[0]) :].repeat_interleave(self.proxies, 0)
        targets = self.own * labels + (1.0 - self.own) * theirs
        weight = torch.full_like(targets[:, 0], 1.0 / (concealed.shape[0] * self.parts))
        return Batch(
            torch.cat([concealed, batch.inputs]),
            torch.cat([targets, batch.targets]),
            torch.cat([weight, batch.share / self.parts]),
        )

    def send(
        self, gradient: GradFn, weights: Weights, batch: Batch, enlarged: Batch, key: Key
    ) -> tuple[Tensors, Tensors, Tensor]:
        """What is sent for an enlarged batch, the honest gradient, and whether the projection fired."""
        honest, mixed = gradient(weights, batch, key), gradient(weights, enlarged, key)
        if not self.projected:
            return mixed, honest, torch.zeros((), dtype=torch.bool, device=batch.inputs.device)
        sent, fired = project(mixed, honest)
        return sent, honest, fired


class Matched(Counter):
    """Knows how the update was mixed and finds the proxies beside the images; the proxies' labels are given.

    The update is taken for that of one enlarged batch, of which only the private images are reported. The dummies for
    proxies have no box, as released proxies leave the range of pixels. Of several rounds of the same images the first
    counts: each has proxies of its own.
    """

    name = "matched"
    needs: frozenset[Field] = frozenset({"hints"})
    truth_loss = "none"
    one_step = True

    def __init__(self, mixing: Mixing, batch_size: int = 1) -> None:
        self.mixing, self.batch_size = mixing, batch_size

    def told(self, batch_size: int) -> Counter:
        """For batches of another size."""
        return type(self)(self.mixing, batch_size)

    def combine(self, updates: Tensors) -> Tensors:
        """The first round's update."""
        return map_tensors(lambda update: update[0], updates)

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """The proxies' labels, (p, k)."""
        return {"labels": (seen[0].hints or {})["labels"]}

    def unknowns(self, task: Task, seen: tuple[Observation, ...], key: Key) -> Tensors:
        """Dummies for the proxies, faint noise."""
        return {"proxies": self._dummies(task, seen, key, self.facts(task, seen)["labels"].shape[0])}

    @staticmethod
    def _dummies(task: Task, seen: tuple[Observation, ...], key: Key, count: int) -> Tensor:
        dtype = (seen[0].update or {})[f"{task.head}.weight"].dtype
        return START * normal(fold_in(key, "proxies"), (count, *task.input_shape), dtype)

    def believe(self, gradient: GradFn, facts: Tensors, unknowns: Tensors) -> GradFn:
        """What is sent for the guessed images and proxies."""
        labels = self._labels(facts, unknowns)

        def simulated(weights: Weights, batch: Batch, key: Key) -> Tensors:
            enlarged = self.mixing.enlarge(batch, unknowns["proxies"], labels)
            return self.mixing.send(gradient, weights, batch, enlarged, key)[0]

        return simulated

    def _labels(self, facts: Tensors, unknowns: Tensors) -> Tensor:
        return facts["labels"]


class LabelsFound(Matched):
    """As `Matched`, but nobody tells the proxies' labels: a soft label of each joins the unknowns."""

    name = "labels_found"
    needs: frozenset[Field] = frozenset()

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """None."""
        return {}

    def unknowns(self, task: Task, seen: tuple[Observation, ...], key: Key) -> Tensors:
        """Dummies for the proxies, and the logits of their labels."""
        count = self.mixing.count(self.batch_size) * self.mixing.proxies
        dummies = self._dummies(task, seen, key, count)
        return {"proxies": dummies, "labels": normal(fold_in(key, "labels"), (count, task.num_classes), dummies.dtype)}

    def _labels(self, facts: Tensors, unknowns: Tensors) -> Tensor:
        return torch.softmax(unknowns["labels"], -1)


@DEFENSES.add(
    name="concealing",
    paper="Wu et al. 2024, Concealing Sensitive Samples against Gradient Leakage in Federated Learning",
    arxiv="2209.05724",
    known_breaks=(
        "an attacker who knows the mixing and finds the proxies beside the images gets closer than one who takes the "
        "update for that of the images alone",
    ),
)
@dataclass(frozen=True)
class Concealing(Defense):
    """Trains on proxies beside the sensitive images: far from them as pictures, near to them in gradient (DCS).

    From public images X_c with labels y_c, Adam takes ``steps`` steps on

        1 - cos(g(X_s, y_s), g(X_c, y_c)) + exp(-distance |X_c - X_s|) + features (|z_c - z_s| / |z_s| - slack),

    g the joint gradient, z the logits, norms averaged over pairs; it stays where ``|X_c - X_s| > far``. Sent is the
    gradient of ``[l CE(X_c, y_c) + (1 - l) CE(X_c, y_s) + CE(X, y)] / n``, plus a multiple of the honest gradient of X
    where the two oppose each other. Each local step draws and optimises proxies of its own; the counters take the
    update for one gradient.

    Args:
        variant: ``released`` is the authors' code: n = 3 for 0 < l < 1, else 2; ``slack`` only shifts the loss and
            proxies leave the range of pixels. ``strict``: n = 2 always, so that weights sum to 1, ``max(0, .)`` around
            the term with ``slack``, proxies clamped to [0, 1]. ``inserted`` is the control: proxies as drawn, their
            own labels (l = 1), n = 2, no projection.
        start: proxies begin as public images (``natural``), mixed with the sensitive ones by l (``mixup``), or as
            N(0, 1) with random labels (``noise``).
        sensitive: how many images of a batch are protected, its last ones (in an audit batches are sorted by class);
            0 for all. The report scores protected images only.
        proxies: proxies of each sensitive image, m, at least 1.
        steps: inner steps, at least 1; a tenth of the rate after 3/8, 5/8 and 7/8 of them.
        lr: inner step size in input units, above 0.
        own_label: l, the weight of a proxy's own label, in [0, 1].
        distance: weight of the distance in the exponent, at least 0.
        features: weight of the distance in logits, at least 0.
        slack: distance in logits that is allowed, at least 0.
        far: distance in input units at which a proxy is far enough, above 0.

    Source: Wu, Hayat, Zhou and Harandi, "Concealing Sensitive Samples against Gradient Leakage in Federated Learning",
    AAAI 2024, https://arxiv.org/abs/2209.05724. The paper's body could not be read; this follows its code.

    Differs from the authors' code: with m > 1 labels are repeated image by image, as images are, where theirs repeats
    the block; the model runs in the mode that the audit sets, where theirs is always in eval mode; public images are
    drawn without replacement from the audit's public pool; the projection's quadratic program is solved in closed form.
    """

    variant: Literal["released", "strict", "inserted"] = "released"
    start: Literal["natural", "mixup", "noise"] = "natural"
    sensitive: int = 0
    proxies: int = 1
    steps: int = 1000
    lr: float = 0.1
    own_label: float = 0.7
    distance: float = 0.01
    features: float = 0.01
    slack: float = 0.01
    far: float = 300.0

    def __post_init__(self) -> None:
        check_range("sensitive", self.sensitive, 0)
        check_range("proxies", self.proxies, 1)
        check_range("steps", self.steps, 1)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("own_label", self.own_label, 0, 1)
        for name in ("distance", "features", "slack"):
            check_range(name, getattr(self, name), 0)
        check_range("far", self.far, 0, open_low=True)

    @property
    def mixing(self) -> Mixing:
        """How this variant mixes."""
        if self.variant == "inserted":
            return Mixing(self.sensitive, self.proxies, own=1.0, parts=2, projected=False)
        parts = 3 if self.variant == "released" and 0.0 < self.own_label < 1.0 else 2
        return Mixing(self.sensitive, self.proxies, self.own_label, parts, projected=True)

    def on_gradient(self, gradient: GradFn, ctx: Context) -> GradFn:
        """The gradient of the batch with its proxies."""
        if ctx.task.noises:
            raise Refused("concealing knows no noise inside the model: proxies would need their own; leave out mid.")
        if ctx.task.drops:
            raise Refused('concealing knows no dropout: the proxies would need masks; set model.dropout = "off".')
        mixing = self.mixing

        def concealed(weights: Weights, batch: Batch, key: Key) -> Tensors:
            own = threefry2x32(ctx.key, key)
            count = mixing.count(batch.inputs.shape[0])
            private = Batch(*(part[-count:].repeat_interleave(self.proxies, 0) for part in batch))
            proxies, labels = self.begin(ctx, private, own)
            if self.variant != "inserted":
                proxies, taken = self.conceal(ctx.task, weights, proxies, labels, private)
                ctx.note("stop_step", taken.to(proxies.dtype))
            enlarged = mixing.enlarge(batch, proxies, labels)
            sent, honest, fired = mixing.send(gradient, weights, batch, enlarged, key)
            ctx.hint("labels", labels)
            if count < batch.inputs.shape[0]:
                ctx.note("protected", (torch.arange(batch.inputs.shape[0]) >= batch.inputs.shape[0] - count).double())
            ctx.note("distance", apart(proxies, private.inputs))
            ctx.note("gradient_cosine", dot(sent, honest) / (safe_norm(sent) * safe_norm(honest) + 1e-12))
            ctx.note("projection_fired", fired.to(proxies.dtype))
            return sent

        return concealed

    def begin(self, ctx: Context, private: Batch, key: Key) -> tuple[Tensor, Tensor]:
        """Proxies before they are optimised, one for each row of ``private``, and their labels."""
        rows, dtype = private.inputs.shape[0], private.inputs.dtype
        if self.start == "noise":
            classes = torch.arange(ctx.task.num_classes, device=private.inputs.device)
            drawn = integers(fold_in(key, "labels"), ctx.task.num_classes, (rows,))
            return normal(fold_in(key, "noise"), tuple(private.inputs.shape), dtype), (drawn[:, None] == classes).to(
                dtype
            )
        if ctx.public is None or ctx.public.inputs.shape[0] < rows:
            raise Refused(f"concealing needs {rows} public image(s) to begin with; raise data.public.")
        chosen = permutation(fold_in(key, "proxies"), ctx.public.inputs.shape[0])[:rows]
        images, labels = ctx.public.inputs.index_select(0, chosen), ctx.public.targets.index_select(0, chosen)
        if self.start == "mixup":
            images = self.own_label * images + (1.0 - self.own_label) * private.inputs
        return images, labels

    def conceal(
        self, task: Task, weights: Weights, start: Tensor, labels: Tensor, private: Batch
    ) -> tuple[Tensor, Tensor]:
        """The optimised proxies, and after how many steps they stopped; rows of ``private`` are their partners."""
        strict = self.variant == "strict"
        objective = self.objective(task, weights, labels, private)

        def clamp(flat: Tensor) -> Tensor:
            return task.bounds.clamp(flat.reshape(start.shape)).flatten()

        return minimise(
            objective,
            start,
            adam(self.lr, Decay(self.steps)),
            self.steps,
            project=clamp if strict else lambda flat: flat,
            stop=lambda proxies: apart(proxies, private.inputs) > self.far,
        )

    def objective(self, task: Task, weights: Weights, labels: Tensor, private: Batch) -> Callable[[Tensor], Tensor]:
        """What the proxies minimise."""

        def joint(inputs: Tensor, targets: Tensor) -> Tensors:
            def loss(params: Tensors) -> Tensor:
                return task.loss(task.logits(Weights(params, weights.buffers), inputs), targets).mean()

            return grad(loss)(weights.params)

        goal, logits = joint(private.inputs, private.targets), task.logits(weights, private.inputs)
        goal_norm, sizes = safe_norm(goal), logits.norm(dim=1)

        def value(proxies: Tensor) -> Tensor:
            theirs = joint(proxies, labels)
            unlike = 1.0 - dot(goal, theirs) / (goal_norm * safe_norm(theirs) + 1e-12)
            near = (-self.distance * apart(proxies, private.inputs)).exp()
            excess = ((task.logits(weights, proxies) - logits).norm(dim=1) / sizes).mean() - self.slack
            return unlike + near + self.features * (excess.relu() if self.variant == "strict" else excess)

        return value

    def counters(self) -> tuple[Counter, ...]:
        """Knowing the mixing, with the proxies' labels given or found."""
        return Matched(self.mixing), LabelsFound(self.mixing)

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Whether the projection gave some of the honest gradient away."""
        fired = notes.get("projection_fired", [0.0])
        return "the projection added the honest gradient." if max(fired) > 0 else ""


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Mean Euclidean distance of pairs of images."""
    return (a - b).flatten(1).norm(dim=1).mean()
