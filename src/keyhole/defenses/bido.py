"""BiDO: hidden layers that depend little on the image and much on the label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from keyhole.core.defense import Context, Counter, Defense
from keyhole.core.registry import DEFENSES
from keyhole.core.task import Task
from keyhole.core.types import Batch, Trace
from keyhole.defenses.knows_loss import KnowsLoss
from keyhole.errors import UnknownName, check_range
from keyhole.parts.dependence import MEASURES, gaussian, linear


@DEFENSES.add(
    name="bido",
    paper="Peng, Liu, Zhang, Lan, Ye, Liu and Han 2022, Bilateral Dependency Optimization (BiDO)",
    arxiv="2206.05483",
    known_breaks=(
        "gradients averaged over transformed copies of the image bring the success of model inversion on a face "
        "recogniser from 35 to 63 %, above the 58 % of the plain attack without any defense (AlignMI 2025, table 8)",
        "little dependence between image and features is neither needed nor enough for privacy: labels learned by "
        "heart defeat model inversion where dependence is largest (AT-AT, ICLR 2026, as others report it)",
        "one term for a whole batch: of updates of fewer images than its least batch it protects nothing, and whoever "
        "knows it matches its gradient exactly",
        "it slows attackers who know it more than it stops them: of batches of four faces, 300 steps of idlg on an "
        "untrained network found none and 3,000 steps 2 of 8 (undefended: all)",
    ),
)
@dataclass(frozen=True)
class BiDO(Defense):
    """Punishes dependence between hidden layers and images, and rewards that between hidden layers and labels.

    ``L + sum over layers j of [ inputs d(Z_j, X) - labels d(Z_j, Y) ]`` over the examples of a step's batch, with X
    the images in pixels, Z_j a layer's output, Y the labels as probabilities, and d a measure of `parts.dependence`:
    normalised HSIC or COCO with Gaussian kernels for X and Z and a linear one for Y. All examples of a batch count
    alike. A batch below ``smallest`` has no such term, which the record says.

    Weights (inputs, labels) in public code: 2, 20 for HSIC and 1, 50 for COCO on MNIST; 0.05, 0.5 for HSIC with VGG16
    on faces, with 0.1, 2 for a ResNet-34 and 0.05, 2 for a ResNet-152. COCO falls as 1 / m with the size of the batch.

    Args:
        inputs: weight of the dependence on images, at least 0. Alone it forbids learning.
        labels: weight of the dependence on labels, at least 0.
        measure: ``hsic``, normalised, or ``coco``.
        sigma: width of the Gaussian kernels for each entry of a row, above 0; 0 takes the median heuristic.
        layers: names of modules without children, with commas between them; empty for the outputs that convolutions
            and linear layers read, which are the ends of the blocks between them: in the order of the forward pass,
            the last module before each one but the first. Networks with branches should name their layers.
        smallest: examples of a batch from which on the term is added, at least 2.

    Source: Peng et al., KDD 2022, https://arxiv.org/abs/2206.05483. The paper's tables could not be read; formula and
    weights are those of its public code. Differs from it: linear systems are solved in float64 in place of an inverse
    in float32, and X are pixels in [0, 1] whatever the model reads.
    """

    inputs: float = 2.0
    labels: float = 20.0
    measure: Literal["hsic", "coco"] = "hsic"
    sigma: float = 5.0
    layers: str = ""
    smallest: int = 4

    def __post_init__(self) -> None:
        check_range("inputs", self.inputs, 0, math.inf, open_high=True)
        check_range("labels", self.labels, 0, math.inf, open_high=True)
        check_range("sigma", self.sigma, 0, math.inf, open_high=True)
        check_range("smallest", self.smallest, 2)

    def on_loss(self, loss: Tensor, trace: Trace, batch: Batch, ctx: Context) -> Tensor:
        """The loss with its dependence terms.

        Raises:
            UnknownName: the model has no such layer; the message lists its layers.
        """
        if self.inputs == 0 and self.labels == 0:
            return loss
        names = self._layers(ctx.task, trace)
        if batch.inputs.shape[0] < self.smallest:
            ctx.note("no dependence term", loss.new_ones(()))
            return loss
        dependence, kernel = MEASURES[self.measure], gaussian(self.sigma)
        pixels = batch.inputs * ctx.task.bounds.std + ctx.task.bounds.mean
        for name in names:
            hidden = trace.activations[name]
            if self.inputs > 0:
                on_inputs = dependence(hidden, pixels, kernel, kernel)
                ctx.note("dependence on images", on_inputs)
                loss = loss + self.inputs * on_inputs
            if self.labels > 0:
                on_labels = dependence(hidden, batch.targets, kernel, linear)
                ctx.note("dependence on labels", on_labels)
                loss = loss - self.labels * on_labels
        return loss

    def _layers(self, task: Task, trace: Trace) -> tuple[str, ...]:
        known = tuple(trace.activations)
        given = tuple(name.strip() for name in self.layers.split(",") if name.strip())
        for name in given:
            if name not in known:
                raise UnknownName("layer", name, known, "defense 'bido'")
        return given or block_ends(task, known)

    def counters(self) -> tuple[Counter, ...]:
        """Matching the gradient of the whole objective."""
        return (KnowsLoss(self),)

    def remark(self, notes: dict[str, list[float]]) -> str:
        """Says so where no batch was large enough."""
        if notes.get("no dependence term"):
            return f"BiDO added nothing: a step had fewer than {self.smallest} images."
        return ""


def block_ends(task: Task, ran: tuple[str, ...]) -> tuple[str, ...]:
    """Of modules in the order in which they ran, the last one before each convolution or linear layer but the first."""
    weighted = [isinstance(task.model.get_submodule(name), _ConvNd | nn.Linear) for name in ran]
    first = weighted.index(True)
    return tuple(ran[i - 1] for i in range(first + 1, len(ran)) if weighted[i])
