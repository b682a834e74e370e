"""iDLG: read the label off the last layer, then match gradients by L-BFGS."""

from __future__ import annotations

from keyhole.attacks.matching import GradientMatching
from keyhole.core.attack import Start
from keyhole.core.registry import ATTACKS
from keyhole.parts.distances import relative_l2
from keyhole.parts.penalties import smooth_total_variation
from keyhole.solve.lbfgs import LBFGS


@ATTACKS.add(
    name="idlg",
    paper="Zhao, Mopuri and Bilen 2020, iDLG: Improved Deep Leakage from Gradients",
    arxiv="2001.02610",
)
def idlg(
    *,
    steps: int = 1000,
    restarts: int = 1,
    start: Start = "gray",
    tv: float = 0.0,
    tolerance: float = 1e-7,
    history: int = 100,
    labels: str = "auto",
) -> GradientMatching:
    """Labels from the last layer's gradient, then squared-distance matching by L-BFGS.

    Minimises ``|g(x) - g|^2 / |g|^2 + tv * TV(x)`` over the images x, where g is the observed update.

    Args:
        steps: most evaluations in one start, at least 1.
        restarts: number of starts; the next begins only when one has not converged.
        start: where to begin; mid-gray needs fewer evaluations than noise.
        tv: weight of the smoothed total variation, at least 0; with a weight above 0 the tolerance is not used.
        tolerance: a start has converged when the objective is at or below this; 1e-7 gives near-exact images.
        history: pairs that L-BFGS remembers.
        labels: a label rule; ``auto`` reads one label from the bias gradient, more by iLRG; ``optimised`` is `dlg`.

    Differs from the authors' code: the objective is divided by the update's squared norm, the line search rejects
    steps that explode, the start is gray rather than noise, the best iterate is returned rather than the last, and
    batches of any size are accepted. ``start="random", tolerance=0, steps=6000`` is the nearest to the original.
    """
    return GradientMatching(
        distance=relative_l2,
        penalties=((tv, smooth_total_variation),),
        optimizer=LBFGS(history=history),
        steps=steps,
        restarts=restarts,
        initial=start,
        labels=labels,
        tolerance=0.0 if tv > 0 else tolerance,
        patience=100 if tv > 0 else 50,
        min_progress=0.005 if tv > 0 else 0.01,
    )
