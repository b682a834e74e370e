"""Rules that read nothing themselves: labels that are given, labels that are drawn, and the rule that fits."""

from __future__ import annotations

from torch import Tensor

from keyhole.core.keys import fold_in, integers
from keyhole.core.registry import LABELS
from keyhole.core.task import Task
from keyhole.core.types import Field, Key, Observation
from keyhole.errors import Refused
from keyhole.parts.labels.counts import one_hot
from keyhole.parts.labels.head import BOTH, LabelRule, dtype_of, head_of, seen_update
from keyhole.parts.labels.predictions import geng, ilrg
from keyhole.parts.labels.single import idlg

_NONE: frozenset[Field] = frozenset()
_TARGETS: frozenset[Field] = frozenset({"targets"})


@LABELS.add(name="given", facts={"needs": _TARGETS})
def given(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """The labels that the threat model gives to the attacker, (b, k), soft where the client's are soft."""
    if observation.targets is None:
        raise Refused("label rule 'given' needs the targets, which the attacker does not see; use 'auto'.")
    return observation.targets.to(dtype_of(observation))


@LABELS.add(name="random", facts={"needs": _NONE})
def random(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """Uniform labels drawn from the key: what knowing nothing is worth."""
    drawn = integers(fold_in(key, "random labels"), task.num_classes, (batch_size,))
    return one_hot(drawn.sort(-1).values, task.num_classes, dtype_of(observation))


@LABELS.add(name="auto", facts={"needs": BOTH})
def auto(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """The rule that fits: `idlg` for one image, else `ilrg` if the head has a bias, else `geng`.

    The order is that of the overlaps measured on untrained networks, see `ilrg` and `geng`. Attacks on updates of
    several local steps take `geng` in its place (`keyhole.attacks.recovery.read_labels`).
    """
    rule: LabelRule
    if batch_size == 1:
        rule = idlg
    else:
        rule = geng if head_of(task, seen_update("auto", observation), "auto").bias is None else ilrg
    return rule(task, batch_size, observation, key)
