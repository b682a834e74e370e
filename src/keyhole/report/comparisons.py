"""Paired comparisons: of attackers who know a defense and who do not, of settings, and of variants of one attack.

Everything is compared on the same images and networks; what is compared with comes second, so that a difference above 0
means "more than ``against``".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from keyhole.report.groups import Group, UpdateKey, matrix
from keyhole.report.intervals import Estimate, Matrix, mean, overlap_difference, share_difference
from keyhole.report.records import LABELS_ONLY, Setting, is_attack

VARIANTS = 6
"""Most attacks of one name that are compared pair by pair."""
FEWEST_IMAGES = 6
"""Fewer cannot reach p < 0.05 in a two-sided signed-rank test."""
_SHARED = ("matched", "evaluations", "label_accuracy")


@dataclass(frozen=True)
class Comparison:
    """Two attackers on the same images."""

    defense: str
    attack: str
    attacker: str
    against: str
    """The other attacker, the other setting or the other attack, by ``kind``; the rest is the same."""
    n: int
    """Distinct images in the test; 0 where the two attacked different data, so that nothing can be paired."""
    difference: Estimate
    """Mean difference in SSIM."""
    p: float
    """Wilcoxon signed-rank test on each image's mean difference in SSIM over networks; NaN below 6 images. For attacks
    that recover labels only, on each batch's difference in label overlap."""
    kind: Literal["knowledge", "setting", "attack"] = "knowledge"
    setting: str = ""
    leaks: Estimate = Estimate()
    """Difference in leak rate, each side with its own controls."""
    success: Estimate = Estimate()
    """Difference in the share of updates that the attack itself counts as solved."""
    evaluations: Estimate = Estimate()
    """Mean difference in gradient evaluations spent on the update behind an image."""
    labels: Estimate = Estimate()
    """Mean difference in the overlap of recovered and true labels, of batches that both attacked."""
    solved: tuple[float, float] = (math.nan, math.nan)
    """Share of the compared updates that each side counts as solved."""
    spent: tuple[float, float] = (math.nan, math.nan)
    """Mean evaluations of each side for a compared update."""


def compare(groups: Sequence[Group], settings: Sequence[Setting]) -> tuple[Comparison, ...]:
    """All comparisons, those of one kind together."""
    return (*_knowledge(groups), *_settings(groups, settings), *_variants(groups))


def _knowledge(groups: Sequence[Group]) -> Iterator[Comparison]:
    """Adaptive attackers against the naive one of their cell."""
    naive = {group.cell: group for group in groups if group.attacker == "naive"}
    for group in groups:
        other = naive.get(group.cell)
        if other is not None and group.attacker.startswith("adaptive:"):
            yield _paired("knowledge", group, other, "naive")


def _settings(groups: Sequence[Group], settings: Sequence[Setting]) -> Iterator[Comparison]:
    """Each setting that names another one against it: the same defense, attack and attacker."""
    places = {(*group.cell, group.attacker): group for group in groups}
    for setting in settings:
        for group in groups if setting.against else ():
            if group.setting != setting.name or not is_attack(group.attacker):
                continue
            other = places.get((setting.against, group.defense, group.attack, group.attacker))
            if other is not None:
                yield _paired("setting", group, other, setting.against)


def _variants(groups: Sequence[Group]) -> Iterator[Comparison]:
    """Naive attacks of one cell that share a name but not their options: every pair, the earlier one first."""
    found: dict[tuple[str, str, str], list[Group]] = {}
    for group in groups:
        if group.attacker == "naive":
            found.setdefault((group.setting, group.defense, group.method), []).append(group)
    for own in found.values():
        for group, other in itertools.combinations(own[:VARIANTS], 2):
            yield _paired("attack", group, other, other.attack)


def _paired(kind: Literal["knowledge", "setting", "attack"], group: Group, other: Group, against: str) -> Comparison:
    """One comparison; rows of different data are different images, whatever their numbers."""
    same = group.sources == other.sources
    if kind == "attack" and same:
        group, other = _where_carried(group, other)
    pictured = same and group.method != LABELS_ONLY
    both = group.entries.keys() & other.entries.keys() if pictured else set()
    ssim = matrix({key: group.entries[key].ssim - other.entries[key].ssim for key in both})
    leaks = matrix({key: float(group.leaks(key)) - float(other.leaks(key)) for key in both})
    shared = {name: _by_update(name, group, other) if same else {} for name in _SHARED}
    labels = matrix(shared["label_accuracy"])
    each = _over_networks(ssim if pictured else labels)
    return Comparison(
        group.defense, group.attack, group.attacker, against,
        n=len({row for _, row in both} if pictured else {row for _, rows in shared["label_accuracy"] for row in rows}),
        difference=mean(ssim),
        p=_signed_rank(each),
        kind=kind,
        setting=group.setting,
        leaks=share_difference(leaks),
        success=share_difference(matrix(shared["matched"])),
        evaluations=mean(matrix(shared["evaluations"])),
        labels=overlap_difference(labels),
        solved=_means("matched", group, other) if same else (math.nan, math.nan),
        spent=_means("evaluations", group, other) if same else (math.nan, math.nan),
    )  # fmt: skip


def _where_carried(group: Group, other: Group) -> tuple[Group, Group]:
    """Only updates whose start one of the two carried over from earlier ones, where either does so at all.

    Before its warm-up an attack with feedback is the attack without: to count those updates would dilute what it adds.
    """
    carried = [key for one in (group, other) for key, value in one.by_update("carried").items() if value]
    if not carried:
        return group, other
    return group.only(set(carried)), other.only(set(carried))


def _by_update(metric: str, group: Group, other: Group) -> dict[UpdateKey, float]:
    """Differences of a metric that all images of an update share, once for each update."""
    mine, theirs = group.by_update(metric), other.by_update(metric)
    return {key: mine[key] - theirs[key] for key in mine.keys() & theirs.keys()}


def _means(metric: str, group: Group, other: Group) -> tuple[float, float]:
    """The mean of each side over the updates that both have."""
    mine, theirs = group.by_update(metric), other.by_update(metric)
    both = mine.keys() & theirs.keys()
    if not both:
        return math.nan, math.nan
    return math.fsum(mine[key] for key in both) / len(both), math.fsum(theirs[key] for key in both) / len(both)


def _over_networks(differences: Matrix) -> Matrix:
    return np.nanmean(differences, axis=0) if differences.size else np.empty(0)


def _signed_rank(differences: Matrix) -> float:
    if differences.size < FEWEST_IMAGES:
        return math.nan
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
