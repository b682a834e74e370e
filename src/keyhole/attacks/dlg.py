"""DLG: match gradients by L-BFGS over images and soft labels together."""

from __future__ import annotations

from keyhole.attacks.idlg import idlg
from keyhole.attacks.matching import OPTIMISED, GradientMatching
from keyhole.core.attack import Start
from keyhole.core.registry import ATTACKS


@ATTACKS.add(
    name="dlg",
    paper="Zhu, Liu and Han 2019, Deep Leakage from Gradients",
    arxiv="1906.08935",
)
def dlg(
    *,
    steps: int = 1000,
    restarts: int = 4,
    start: Start = "gray",
    tv: float = 0.0,
    tolerance: float = 1e-7,
    history: int = 100,
) -> GradientMatching:
    """Squared-distance matching by L-BFGS over the images and a soft label of each.

    Minimises ``|g(x, softmax(l)) - g|^2 / |g|^2 + tv * TV(x)`` over the images x and label logits l (equation 4 of the
    paper), where g is the observed update. A start can lock on a wrong label and never leave it, which is why there
    are several; `idlg` reads the label off the update instead and hardly needs them.

    Args:
        steps: most evaluations in one start, at least 1.
        restarts: number of starts; the next begins only when one has not converged.
        start: where the images begin; the labels begin as N(0, 1).
        tv: weight of the smoothed total variation, at least 0; with a weight above 0 the tolerance is not used.
        tolerance: a start has converged when the objective is at or below this.
        history: pairs that L-BFGS remembers.

    Differs from the authors' code: the objective is divided by the update's squared norm, the line search rejects
    steps that explode, the start is gray rather than noise, the best iterate is returned rather than the last.
    ``start="random", restarts=1, tolerance=0, steps=6000`` is the nearest to the original.
    """
    return idlg(
        steps=steps, restarts=restarts, start=start, tv=tv, tolerance=tolerance, history=history, labels=OPTIMISED
    )
