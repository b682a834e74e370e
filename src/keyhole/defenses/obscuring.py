"""Learning to obscure data: clients train on other images that the network sees as it sees theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.keys import fold_in, uniform
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.types import Batch, Observation, Tensors
from keyhole.errors import check_range
from keyhole.parts.features import blank_features, feature_distance
from keyhole.parts.similarity import structural_similarity
from keyhole.solve.feature_inversion import FeatureInversion
from keyhole.solve.inner import minimise
from keyhole.solve.optimizers import StepDecay, adam

_SLACK = 0.1
"""Floor and ceiling are aimed at from a tenth inside: right at the kink half of the images would end a little off."""


@DEFENSES.add(
    name="obscuring",
    paper="Wan et al. 2022, Learning to obscure data (our reading of the abstract)",
    arxiv="2206.00769",
    known_breaks=(
        "it keeps the features of an image, so whoever inverts the features, or looks them up among candidates, is "
        "back at the image; the head's gradient alone gives them away",
    ),
)
@dataclass(frozen=True)
class Obscuring(Defense):
    """Trains on learned images x' in place of the client's x: far in pixels, near in features, of the same labels.

    For each image, from a public image of another class, by Adam in the box that pixels fill:
    ``|phi(x') - phi(x)|^2 / |phi(x) - phi(gray)|^2 + labels * CE(x', y)
    + push * (max(0, 1.1 floor - MSE(x', x)) + max(0, SSIM(x', x) - 0.9 ceiling))``, where phi is the input of the head
    of the received network, and MSE and SSIM are those of pixels. First order only; no gradient of a gradient.

    Our reading of the abstract: the paper's body could not be had, and no code was found. It says that samples are
    replaced by learned ones that are distinct from them and keep the predictive features; losses, network, settings and
    all numbers here are ours.

    Args:
        floor: least mean squared error between an image and what stands for it, in pixels, in [0, 1]; 0.05 is 13 dB.
        ceiling: most structural similarity between the two, in (0, 1]; 1 asks for nothing.
        steps: of the inner optimisation, at least 1.
        lr: its step size in the model's input units, above 0; a tenth after 3/8, 5/8 and 7/8 of the steps.
        labels: weight of the cross-entropy, at least 0.
        push: weight of floor and ceiling, at least 0.
        start: ``public`` image of another class, or ``noise``; noise as well where nothing is public.
        refresh: rounds between new images of a client that trains on the same ones, at least 1.

    Source: Wan et al., "Learning to Obscure Data", 2022, https://arxiv.org/abs/2206.00769, abstract only.
    """

    floor: float = 0.05
    ceiling: float = 0.2
    steps: int = 500
    lr: float = 0.05
    labels: float = 0.0
    push: float = 10.0
    start: Literal["public", "noise"] = "public"
    refresh: int = 1

    def __post_init__(self) -> None:
        check_range("floor", self.floor, 0, 1)
        check_range("ceiling", self.ceiling, 0, 1, open_low=True)
        check_range("steps", self.steps, 1)
        check_range("lr", self.lr, 0, open_low=True)
        check_range("labels", self.labels, 0)
        check_range("push", self.push, 0)
        check_range("refresh", self.refresh, 1)

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        """Other images under the same labels; those of the last round where it is not time for new ones."""
        cache = f"{ctx.link}obscuring"
        if ctx.again and ctx.round % self.refresh and cache in ctx.state:
            obscured = ctx.state[cache]["inputs"]
        else:
            obscured = self._obscure(batch, ctx)
            ctx.state[cache] = {"inputs": obscured}
        self._note(batch, obscured, ctx)
        return batch._replace(inputs=obscured)

    def _obscure(self, batch: Batch, ctx: Context) -> Tensor:
        task, originals = ctx.task, batch.inputs
        wanted, blank = task.trace(ctx.weights, originals).features, blank_features(task, ctx.weights, originals)

        def objective(inputs: Tensor) -> Tensor:
            trace = task.trace(ctx.weights, inputs)
            error, likeness = _apart(task, inputs, originals)
            near = ((1 + _SLACK) * self.floor - error).clamp(min=0.0)
            if self.ceiling < 1:
                near = near + (likeness - (1 - _SLACK) * self.ceiling).clamp(min=0.0)
            loss = feature_distance(trace.features, wanted, blank) + self.push * near
            if self.labels > 0:
                loss = loss + self.labels * task.loss(trace.logits, batch.targets)
            return loss.sum()

        def project(flat: Tensor) -> Tensor:
            return task.bounds.clamp(flat.reshape(originals.shape)).flatten()

        optimizer = adam(self.lr, StepDecay(self.steps))
        found, _ = minimise(objective, self._begin(batch, ctx), optimizer, self.steps, project=project)
        return found.detach()

    def _begin(self, batch: Batch, ctx: Context) -> Tensor:
        key, like = fold_in(ctx.key, "obscuring"), batch.inputs
        if ctx.public is None or self.start == "noise":
            return ctx.task.bounds.from_pixels(uniform(key, tuple(like.shape), like.dtype))
        # A random order of the public images for each private one, with those of its own class last.
        shape = (like.shape[0], ctx.public.inputs.shape[0])
        alike = (batch.targets @ ctx.public.targets.to(like.dtype).T).to(like.dtype)
        return ctx.public.inputs.to(like.dtype)[(uniform(key, shape, like.dtype) + alike).argmin(-1)]

    def _note(self, batch: Batch, obscured: Tensor, ctx: Context) -> None:
        moved, likeness = _apart(ctx.task, obscured, batch.inputs)
        met = (moved >= self.floor) & (likeness <= self.ceiling)
        seen, wanted = (ctx.task.trace(ctx.weights, inputs).features for inputs in (obscured, batch.inputs))
        blank = blank_features(ctx.task, ctx.weights, obscured)
        ctx.note("MSE to the original", moved)
        ctx.note("SSIM to the original", likeness)
        ctx.note("distinct", met.to(moved.dtype))
        ctx.note("feature distance", feature_distance(seen, wanted, blank))

    def counters(self) -> tuple[Counter, ...]:
        """Matching the head alone, and inverting the features of what plain matching finds."""
        return (HeadAlone(), InvertFeatures())

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Says where images stayed too near."""
        distinct = notes.get("distinct", [])
        missed = sum(value < 1 for value in distinct)
        return f"{missed} of {len(distinct)} images stayed nearer to the original than they should." if missed else ""


class HeadAlone(Counter):
    """Match the gradient of the head only, the one part that the original image causes as well.

    The head's gradient of one image is ``(p - y) phi^T``: a function of the features, which the defense keeps, and of
    nothing else of the image. What it does not fix is left to the attack's prior. Rounds are averaged, which averages
    the features' errors of one image's several replacements and keeps what they have in common.
    """

    name = "head_alone"
    truth_loss = "none"

    def facts(self, task: Task, seen: tuple[Observation, ...]) -> Tensors:
        """The head's tensors of the update, by name."""
        update = seen[0].update or {}
        return {name: value for name, value in update.items() if name.rpartition(".")[0] == task.head}

    def compare(self, simulated: Tensors, observed: Tensors, facts: Tensors) -> tuple[Tensors, Tensors]:
        """Both without what is not the head's."""
        return {name: simulated[name] for name in facts}, {name: observed[name] for name in facts}


class InvertFeatures(Counter):
    """Match the whole gradient, which gives the obscured images, and invert the features of what was found."""

    name = "feature_inversion"
    truth_loss = "none"
    then = FeatureInversion()


def _apart(task: Task, inputs: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and structural similarity of each image's pixels, (b,) each."""
    mine, theirs = (x * task.bounds.std + task.bounds.mean for x in (inputs, originals))
    return (mine - theirs).square().flatten(1).mean(1), structural_similarity(mine, theirs)
