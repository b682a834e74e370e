"""Inverting Gradients: match the gradient's direction by signed Adam, with a total-variation prior."""

from __future__ import annotations

from typing import Literal

from keyhole.attacks.matching import GradientMatching
from keyhole.core.attack import Start
from keyhole.core.registry import ATTACKS
from keyhole.errors import check_range
from keyhole.parts.distances import cosine
from keyhole.parts.penalties import total_variation
from keyhole.solve.optimizers import Constant, Cosine, Schedule, StepDecay, adam, signed


@ATTACKS.add(
    name="inverting_gradients",
    paper="Geiping, Bauermeister, Droege and Moeller 2020, Inverting Gradients",
    arxiv="2003.14053",
)
def inverting_gradients(
    *,
    steps: int = 4800,
    lr: float = 0.1,
    tv: float = 1e-4,
    restarts: int = 4,
    start: Start = "random",
    schedule: Literal["step", "cosine", "constant"] = "step",
    box: bool = True,
    sign: bool = True,
    statistics: float = 1e-3,
    labels: str = "auto",
) -> GradientMatching:
    """Cosine gradient matching with signed Adam and total variation.

    Minimises ``1 - cos(g(x), g) + tv * TV(x)`` over the images x in the model's normalised input space (equation 4).

    Args:
        steps: evaluations in one start, at least 1; the paper uses 4,800 for small and 24,000 for large cases.
        lr: step size in input units, above 0.
        tv: weight of the total variation, at least 0. Not transferable between models: tune it on other images.
        restarts: number of starts, all of them run; the one with the least distance is kept.
        start: where to begin.
        schedule: ``step`` takes a tenth after 3/8, 5/8 and 7/8 of the steps; ``cosine`` decays after 50 warm-up steps.
        box: keep pixels in [0, 1].
        sign: give Adam only the gradient's sign.
        statistics: weight of BatchNorm statistics, at least 0; plays no part where the threat model hides them.
        labels: a label rule.

    Differs from the authors' code: the best iterate of a start is returned rather than the last, and restarts are
    compared by the distance alone. Their optional median filter is left out.
    """
    check_range("lr", lr, 0, open_low=True)
    schedules: dict[str, Schedule] = {
        "step": StepDecay(steps),
        "cosine": Cosine(steps, warmup=50),
        "constant": Constant(),
    }
    optimizer = adam(lr, schedules[schedule])
    return GradientMatching(
        distance=cosine,
        penalties=((tv, total_variation),),
        optimizer=signed(optimizer) if sign else optimizer,
        steps=steps,
        restarts=restarts,
        initial=start,
        labels=labels,
        box=box,
        statistics=statistics,
        always_restart=True,
    )
