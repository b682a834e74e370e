"""What the attacks read off an update before they look for images: the update as sent, and the labels behind it."""

from __future__ import annotations

from torch import Tensor

import keyhole.parts.labels  # noqa: F401  (fills the registry of label rules)
from keyhole.core.defense import strip_prefix
from keyhole.core.keys import fold_in
from keyhole.core.registry import LABELS
from keyhole.core.task import Task
from keyhole.core.tensors import map_tensors
from keyhole.core.threat import ThreatModel
from keyhole.core.types import Key, Observation, Seen, Tensors


def compared_update(threat: ThreatModel, seen: Seen) -> Tensors:
    """What the attacker makes of the update, not the update as the defense left it; empty where it is hidden."""
    update = seen.observations[0].update
    return threat.counter.compare(update, update, strip_prefix(seen.facts, "counter."))[1] if update else {}


def read_labels(labels: str, task: Task, threat: ThreatModel, seen: Seen, key: Key) -> Tensor:
    """Labels of the batch by a label rule, probabilities (b, k).

    Rules read a gradient, so that an update of local steps is divided by what it is believed to be a multiple of. The
    gradients in it were taken all along the way, on which predictions come closer to the labels; several steps are
    read at its middle, as `keyhole.core.belief.StraightLine` has it, and ``auto`` is `geng` then.

    Overlap with the true labels of ten clients of some 140 digits after 18 steps, from an untrained and two trained
    networks (`benchmarks/sent_labels.py`): 0.84, 0.90 and 0.73, that of `ilrg` at the first weights 0.34, 0.38 and
    0.12, but naming all classes equally often gives 0.90 there. With uneven shares of classes, where that gives 0.45:
    0.83, 0.68 and 0.60, `ilrg` 0.45, 0.55 and 0.34, and `llg` 0.78, 0.76 and 0.74.
    """
    size, steps, scale = (
        threat.batch_size,
        threat.belief.steps(threat.batch_size),
        threat.belief.scale(threat.batch_size),
    )
    observation, update = seen.observations[0], compared_update(threat, seen)
    if labels == "auto" and size > 1:
        # A counter that had to give up the scale leaves the rules that count by it with nothing to go by.
        labels = "bias_corrected" if threat.counter.scale_free else "geng" if steps > 1 else labels
    if steps > 1:
        observation = _halfway(observation)
    as_gradient = map_tensors(lambda u: u / scale, update) if scale != 1.0 and update else update
    hidden = observation.update is None
    rule = LABELS.card(labels).factory
    found: Tensor = rule(task, size, observation._replace(update=None if hidden else as_gradient), fold_in(key, 0))
    return found


def _halfway(observation: Observation) -> Observation:
    """Weights in the middle of where the client began and ended, where the attacker sees both."""
    weights, update = observation.weights, observation.update
    if weights is None or update is None:
        return observation
    middle = map_tensors(lambda w, u: w - 0.5 * u, weights.params, update)
    return observation._replace(weights=weights._replace(params=middle))
