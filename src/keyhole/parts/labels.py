"""Label recovery: rules that read labels off the gradient of the model's last linear layer, the head.

With cross-entropy and predictions ``p_i = softmax(W h_i + b)`` of images with labels ``y_i``, the head's
gradient is::

    dL/dW[c] = 1/B sum_i (p_ic - y_ic) h_i        dL/db[c] = 1/B sum_i (p_ic - y_ic)

so the true classes pull their rows down. Every rule here is ``rule(task, batch_size, observation, key)`` for
one trial and returns one-hot class probabilities (b, k), sorted by class, in the dtype of the update. Rules
lift with ``torch.func.vmap``: no shape and no branch depends on the values of a tensor.

Sign and scale: an update is what the server subtracts, so for one gradient it is the gradient itself. `idlg`
and `bias_corrected` do not mind a positive factor. `geng` and `ilrg` compare the update with probabilities:
an update that is a multiple of the gradient (local steps, clipping) must be divided by that factor before it
is handed to them.

A non-finite update never raises; the labels are then arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from keyhole.core.keys import fold_in, integers, new_key, uniform
from keyhole.core.registry import LABELS
from keyhole.core.task import Task
from keyhole.core.types import Field, Key, Observation, Tensors, Weights
from keyhole.errors import Refused

LabelRule = Callable[[Task, int, Observation, Key], Tensor]
"""Task, batch size, observation and key to class probabilities (b, k)."""

NOISE_IMAGES = 256
"""Uniform-noise images that stand in for the batch where a rule needs the model's mean prediction."""

_TIE = 1e-3
"""Weight of the row-sum in `true_row`: above rounding errors, below any real difference of the first term."""

_NONE: frozenset[Field] = frozenset()
_TARGETS: frozenset[Field] = frozenset({"targets"})
_UPDATE: frozenset[Field] = frozenset({"update"})
_BOTH: frozenset[Field] = frozenset({"weights", "update"})


class Head(NamedTuple):
    """The head's entries of a dictionary that is keyed by parameter name."""

    weight: Tensor
    """Shape (k, m)."""
    bias: Tensor | None
    """Shape (k,), or `None` where the head has no bias."""


@LABELS.add(name="given", facts={"needs": _TARGETS})
def given(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """The labels that the threat model gives to the attacker, (b, k), soft where the client's are soft."""
    if observation.targets is None:
        raise Refused("label rule 'given' needs the targets, which the attacker does not see; use 'auto'.")
    return observation.targets.to(_dtype(observation))


@LABELS.add(name="idlg", paper="Zhao, Mopuri and Bilen 2020", arxiv="2001.02610", facts={"needs": _UPDATE})
def idlg(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """The class of one image: the only one whose head gradient is negative.

    ``y = argmin_c dL/db[c]`` where some entry of the bias gradient is negative. Where none is (the head has
    no bias, or a defense zeroed the true entry), `true_row` finds the class by the directions of the weight
    gradient's rows.

    Right for every undamaged update of one image with a hard label, except when the features are all zero, or
    when the head has two classes, no bias and features of both signs: the two rows are then opposite, and
    either could be the true one.

    Source: Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020,
    https://arxiv.org/abs/2001.02610.

    Differences from the authors' code: they take the row with the smallest sum, which needs non-negative
    features (with tanh features the sign says little) and finds the layer by its position.

    Raises:
        Refused: for more than one image.
    """
    if batch_size != 1:
        raise Refused(f"label rule 'idlg' reads one image's label and the batch has {batch_size}; use 'ilrg'.")
    head = _head(task, _seen_update("idlg", observation), "idlg")
    label = true_row(head.weight, head.bias)
    if head.bias is not None:
        label = torch.where((head.bias < 0).any(-1), head.bias.argmin(-1), label)
    return _one_hot(label[None], task.num_classes, head.weight.dtype)


@LABELS.add(
    name="bias_corrected",
    paper="Geiping et al., breaching 2022; after Wainakh et al. 2022",
    arxiv="2105.09369",
    url="https://github.com/JonasGeiping/breaching",
    facts={"needs": _UPDATE},
)
def bias_corrected(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """Counts by paying for each example with the same share of the negative bias gradient.

    ``impact = 1/B sum_{c: g_c < 0} g_c`` with ``g = dL/db``. Every class with a negative entry is present
    once; the other labels go one by one to the most negative entry. Each label given raises its entry by
    ``-impact``.

    Source: the default of https://github.com/JonasGeiping/breaching (2022); the loop is that of LLG (Wainakh
    et al., "User-Level Label Leakage from Gradients in Federated Learning", PETS 2022,
    https://arxiv.org/abs/2105.09369), run on the bias gradient and without the factor 1 + 1/k.

    Differences from the authors' code: breaching's second stage corrects the class that its first stage
    looked at last; here the class that was chosen is corrected. With more than B negative entries, the B most
    negative count.

    Raises:
        Refused: the head has no bias.
    """
    head = _head(task, _seen_update("bias_corrected", observation), "bias_corrected")
    counts = bias_corrected_counts(_bias(head, "bias_corrected"), batch_size)
    return sorted_labels(counts, batch_size, head.weight.dtype)


@LABELS.add(name="geng", paper="Geng et al. 2021", arxiv="2110.09074", facts={"needs": _BOTH})
def geng(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """Counts from the bias gradient and the model's mean prediction, estimated on noise images.

    ``count_c = B (pbar_c - dL/db[c])``, which is exact for the batch's own mean prediction ``pbar``
    (`geng_counts`). Without a bias the row sums take its place, divided by the mean sum of the features
    (`geng_counts_without_bias`). Both means are estimated on 256 images of uniform noise.

    Source: Geng et al., "Towards General Deep Leakage in Federated Learning", 2021,
    https://arxiv.org/abs/2110.09074. The paper has the second form; the first follows from the same identity,
    with one estimate less.

    Differences from the authors' method: the noise images are the same for all trials, and the counts are
    made whole by `apportion`.
    """
    head = _head(task, _seen_update("geng", observation), "geng")
    weights = _seen_weights("geng", observation)
    # One fixed set for all trials, not one a trial: under vmap it then has no trial axis, and is drawn once.
    pixels = uniform(fold_in(new_key(0, key.device), "geng"), (NOISE_IMAGES, *task.input_shape), torch.float64)
    trace = task.trace(weights, task.bounds.from_pixels(pixels).to(next(iter(weights.params.values())).dtype))
    mean_prediction = torch.softmax(trace.logits, -1).mean(0)
    if head.bias is not None:
        counts = geng_counts(mean_prediction, head.bias, batch_size)
    else:
        feature_sum = trace.features.flatten(1).sum(-1).mean()
        counts = geng_counts_without_bias(mean_prediction, head.weight.sum(-1), feature_sum, batch_size)
    return sorted_labels(counts, batch_size, head.weight.dtype)


@LABELS.add(
    name="ilrg",
    paper="Ma et al. 2023",
    url="https://openreview.net/forum?id=FIrQfNSOoTr",
    facts={"needs": _BOTH},
)
def ilrg(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """Counts from a linear system in which every class has the features that its gradient row suggests.

    With ``h_j = dL/dW[j] / dL/db[j]`` and ``P_j = softmax(W h_j + b)``, least squares solves for the counts
    n::

        sum_j n_j = B        sum_j n_j P_j[c] - n_c = B dL/db[c]   for every class c

    Exact when all images share their features; good when those of a class are alike. A trained model, whose
    predictions differ from image to image, hides counts from it.

    Where predictions and labels of a class nearly cancel, its features are a quotient of two small numbers
    and two counts can be far off, though most batches come out exact.

    Source: Ma et al., "Instance-wise Batch Label Restoration via Gradients in Federated Learning", ICLR 2023,
    https://openreview.net/forum?id=FIrQfNSOoTr.

    Differences from the authors' code: rows whose bias gradient is zero or underflows count as features of
    zero instead of dividing by it; counts are made whole by `apportion` (their rounding indexes with a
    negative number in one branch); always the full system, never restricted to classes known to be present;
    solved in float64.

    Raises:
        Refused: the head has no bias.
    """
    head = _head(task, _seen_update("ilrg", observation), "ilrg")
    bias = _bias(head, "ilrg")
    own = _head(task, _seen_weights("ilrg", observation).params, "ilrg")
    counts = ilrg_counts(own.weight, _bias(own, "ilrg"), head.weight, bias, batch_size)
    return sorted_labels(counts, batch_size, head.weight.dtype)


@LABELS.add(name="random", facts={"needs": _NONE})
def random(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """Uniform labels drawn from the key: what knowing nothing is worth."""
    drawn = integers(fold_in(key, "random labels"), task.num_classes, (batch_size,))
    return _one_hot(drawn.sort(-1).values, task.num_classes, _dtype(observation))


@LABELS.add(name="auto", facts={"needs": _BOTH})
def auto(task: Task, batch_size: int, observation: Observation, key: Key) -> Tensor:
    """The rule that fits: `idlg` for one image, else `ilrg` if the head has a bias, else `geng`.

    The order is that of the overlaps measured on untrained networks, see `ilrg` and `geng`.
    """
    rule: LabelRule
    if batch_size == 1:
        rule = idlg
    else:
        rule = geng if _head(task, _seen_update("auto", observation), "auto").bias is None else ilrg
    return rule(task, batch_size, observation, key)


def true_row(rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """The class of one image from the directions of the head's weight gradient, whatever the features' signs.

    The rows are ``(p_c - y_c) h``: that of the true class points against all others, which agree with each
    other. So::

        y = argmin_c  sum_{d != c} cos(row_c, row_d) + 1e-3 sum(row_c) / sum|row_c|

    Zeroed entries change no sign, so the true row's first term stays ``-sum_d |cos(row_y, row_d)|``, and no
    other row can be below it: whatever is masked, only a tie can mislead. The second term breaks ties, as
    there are with two classes or when the model is sure of one wrong class, and is right for non-negative
    features. A class whose bias gradient is positive is never the answer.

    For an undamaged gradient the row of largest norm is the same one; under masks it is more easily mistaken, as it
    depends on how many of its entries survive.

    Args:
        rows: weight gradient of the head, (k, m).
        bias: bias gradient of the head, (k,), where there is one.

    Returns:
        The class, an int64 scalar.
    """
    units = _unit_rows(rows)
    agreement = (units * (units.sum(-2, keepdim=True) - units)).sum(-1)
    size = units.abs().sum(-1)
    score = agreement + _TIE * units.sum(-1) / torch.where(size > 0, size, torch.ones_like(size))
    if bias is not None:
        score = score + 2.0 * rows.shape[-2] * (bias > 0)
    return score.argmin(-1)


def bias_corrected_counts(bias: Tensor, batch_size: int) -> Tensor:
    """The counts of `bias_corrected`: whole numbers (k,) that sum to B, from the bias gradient (k,)."""
    classes = torch.arange(bias.shape[-1], device=bias.device)
    negative = bias < 0
    impact = torch.where(negative, bias, torch.zeros_like(bias)).sum(-1) / batch_size
    left = bias
    counts = torch.zeros_like(bias)
    for _ in range(batch_size):
        first = negative & (counts == 0)
        once = torch.where(first, left, torch.full_like(left, torch.inf)).argmin(-1)
        chosen = classes == torch.where(first.any(-1), once, left.argmin(-1))
        counts = counts + chosen
        left = torch.where(chosen, left - impact, left)
    return counts


def geng_counts(mean_prediction: Tensor, bias: Tensor, batch_size: int) -> Tensor:
    """``B (pbar - dL/db)``: counts (k,), exact where ``mean_prediction`` (k,) is the batch's own."""
    return batch_size * (mean_prediction - bias)


def geng_counts_without_bias(mean_prediction: Tensor, row_sums: Tensor, feature_sum: Tensor, batch_size: int) -> Tensor:
    """``B (pbar - G / O)``: counts (k,) from the row sums G (k,) of dL/dW and the mean feature sum O ().

    Exact where both means are the batch's own and all images have the same sum of features.
    """
    return batch_size * (mean_prediction - _divide(row_sums, feature_sum))


def ilrg_counts(weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor, batch_size: int) -> Tensor:
    """The counts of `ilrg` before rounding, float64 (k,).

    Args:
        weight: the head's weight, (k, m).
        bias: the head's bias, (k,).
        grad_weight: gradient of the weight, (k, m).
        grad_bias: gradient of the bias, (k,).
        batch_size: number of images.
    """
    weight, bias, grad_weight, grad_bias = (t.double() for t in (weight, bias, grad_weight, grad_bias))
    features = _divide(grad_weight, grad_bias[..., None])
    # Features that overflow give NaN here, and the pseudoinverse raises on NaN.
    predicted = _finite(torch.softmax(_finite(features @ weight.mT + bias), -1))
    classes = predicted.shape[-1]
    identity = torch.eye(classes, dtype=predicted.dtype, device=predicted.device)
    system = torch.cat([torch.ones_like(identity[:1]), predicted.mT - identity], -2)
    total = torch.full_like(grad_bias[:1], batch_size)
    known = torch.cat([total, batch_size * grad_bias], -1)
    counts: Tensor = torch.linalg.pinv(system) @ known[..., None]
    return counts.squeeze(-1)


def apportion(counts: Tensor, total: int) -> Tensor:
    """Whole counts near the given ones that sum to exactly ``total``.

    Negative counts become 0; then, ``total`` times, the class that is furthest below its count is given one.
    Where the floors sum to at most ``total`` this is the method of largest remainders: floor, and hand the
    rest to the largest fractions. Where they exceed it, the excess is taken from all large counts alike.

    Args:
        counts: estimates (k,), any finite or non-finite numbers.
        total: batch size, at least 1.

    Returns:
        Counts, int64 (k,).
    """
    wanted = torch.nan_to_num(counts, nan=0.0, posinf=float(total), neginf=0.0).clamp(min=0.0)
    classes = torch.arange(counts.shape[-1], device=counts.device)
    handed = torch.zeros_like(wanted)
    for _ in range(total):
        handed = handed + (classes == (wanted - handed).argmax(-1))
    return handed.round().long()


def sorted_labels(counts: Tensor, total: int, dtype: torch.dtype) -> Tensor:
    """Estimated counts (k,) as one-hot rows (total, k), sorted by class; made whole by `apportion`."""
    ends = apportion(counts, total).cumsum(-1)
    place = torch.arange(total, device=counts.device)
    labels = (ends[None, :] <= place[:, None]).sum(-1)
    return _one_hot(labels, counts.shape[-1], dtype)


def multiset_overlap(recovered: Tensor, truth: Tensor) -> Tensor:
    """The share of labels that were recovered, whatever their order: ``1 - 1/2 sum_c |r_c - t_c| / B``.

    Args:
        recovered: class probabilities (b, k); row by row the most probable class counts.
        truth: class probabilities (b, k).

    Returns:
        A scalar in [0, 1], in the dtype of ``truth``.

    Source: the score of https://github.com/JonasGeiping/breaching and of Wainakh et al., PETS 2022.
    """
    classes = truth.shape[-1]
    found, real = (_one_hot(rows.argmax(-1), classes, truth.dtype).sum(0) for rows in (recovered, truth))
    return 1.0 - 0.5 * (found - real).abs().sum() / truth.shape[0]


def _one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    # Not torch's own one_hot, which checks the values and so looks inside the tensor.
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))


def _divide(above: Tensor, below: Tensor) -> Tensor:
    """A quotient that is 0 where the divisor is zero or too small to have all its digits."""
    usable = below.abs() > torch.finfo(below.dtype).tiny
    return torch.where(usable, above / torch.where(usable, below, torch.ones_like(below)), torch.zeros_like(above))


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows (k, m) of length 1, or 0 where a row is zero."""
    # By the largest entry first: squares of the tiny rows of improbable classes would underflow.
    scaled = _divide(rows, rows.abs().amax(-1, keepdim=True))
    return _divide(scaled, scaled.square().sum(-1, keepdim=True).sqrt())


def _head(task: Task, tensors: Tensors, rule: str) -> Head:
    """The head's entries by name, made finite."""
    prefix = f"{task.head}." if task.head else ""
    if f"{prefix}weight" not in tensors:
        raise Refused(f"label rule '{rule}' needs '{prefix}weight' of the head, which is not there.")
    bias = tensors.get(f"{prefix}bias")
    return Head(_finite(tensors[f"{prefix}weight"]), None if bias is None else _finite(bias))


def _bias(head: Head, rule: str) -> Tensor:
    if head.bias is None:
        raise Refused(f"label rule '{rule}' needs a bias in the last linear layer, which has none; use 'geng'.")
    return head.bias


def _seen_update(rule: str, observation: Observation) -> Tensors:
    if observation.update is None:
        raise Refused(f"label rule '{rule}' needs the update, which the attacker does not see.")
    return observation.update


def _seen_weights(rule: str, observation: Observation) -> Weights:
    if observation.weights is None:
        raise Refused(f"label rule '{rule}' needs the weights, which the attacker does not see.")
    return observation.weights


def _dtype(observation: Observation) -> torch.dtype:
    """The dtype of the update, or of what else is seen."""
    if observation.update is not None:
        return next(iter(observation.update.values())).dtype
    if observation.weights is not None:
        return next(iter(observation.weights.params.values())).dtype
    return torch.get_default_dtype() if observation.targets is None else observation.targets.dtype
