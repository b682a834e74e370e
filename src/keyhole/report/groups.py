"""Outcomes as groups: one attacker against one defense in one setting, with the best control of each image."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keyhole.core.trial import Outcome, Spec
from keyhole.errors import StoreError
from keyhole.experiment.prior import LEAK_SSIM as LEAK_SSIM
from keyhole.metrics.image import PSNR_CAP
from keyhole.report.intervals import Matrix
from keyhole.report.names import attack_names, defense_name
from keyhole.report.records import Setting, is_attack

Key = tuple[int, int]
"""One image on one network: (seed, row of the target pool)."""
UpdateKey = tuple[int, tuple[int, ...]]
"""One update of one network: (seed, rows of its images)."""
Name = tuple[str, str, str, str]
"""Setting, defense, attack, attacker."""

LEAK_MARGIN = 0.1
SLACK = 1e-9
"""For decimals such as 0.1 that have no exact binary form."""


@dataclass(frozen=True)
class Entry:
    """The scores of one image, and where its reconstruction is."""

    ssim: float
    mse: float
    psnr: float
    label_accuracy: float
    identified: float
    identified_by_features: float
    hash: str
    position: int
    broken: bool
    """Whether SSIM or MSE is not a number."""


@dataclass(frozen=True)
class Group:
    """One attacker against one defense: the outcomes in plan order, and the scored images."""

    defense: str
    attack: str
    attacker: str
    outcomes: tuple[Outcome, ...]
    entries: dict[Key, Entry]
    controls: dict[Key, Entry]
    """The best control of each image; empty for controls themselves."""
    setting: str = ""
    updates: frozenset[UpdateKey] | None = None
    """The updates that count; `None` for all."""

    @property
    def cell(self) -> tuple[str, str, str]:
        """Setting, defense and attack."""
        return self.setting, self.defense, self.attack

    @property
    def links(self) -> tuple[Spec, ...]:
        """The chain of defenses, resolved."""
        return self.outcomes[0].trial.defense

    @property
    def method(self) -> str:
        """The attack's registered name, without options."""
        return self.outcomes[0].trial.attack.name

    @property
    def sources(self) -> set[str]:
        """The data that the rows count in."""
        return {outcome.trial.source for outcome in self.outcomes}

    def leaks(self, key: Key) -> bool:
        """Whether an image leaked: similar enough, and more so than the best guess without the update."""
        ssim = self.entries[key].ssim
        control = self.controls.get(key)
        return ssim >= LEAK_SSIM - SLACK and (control is None or ssim >= control.ssim + LEAK_MARGIN - SLACK)

    def only(self, updates: set[UpdateKey]) -> Group:
        """The same group with these updates alone."""
        images = {(seed, row) for seed, rows in updates for row in rows}
        kept = {key: entry for key, entry in self.entries.items() if key in images}
        return replace(self, entries=kept, updates=frozenset(updates))

    def by_update(self, metric: str) -> dict[UpdateKey, float]:
        """A metric that all images of an update share, such as its evaluations: once for each update that has it."""
        found: dict[UpdateKey, float] = {}
        for outcome in self.outcomes:
            trial, values = outcome.trial, outcome.metrics.get(metric, [])
            for i in range(0, len(values), trial.batch_size):
                own = values[i : i + trial.batch_size]
                value, key = math.fsum(own) / len(own), (trial.seed, trial.episode[i : i + trial.batch_size])
                if math.isfinite(value) and (self.updates is None or key in self.updates):
                    found.setdefault(key, value)
        return found


def matrix(values: Mapping[tuple[int, Any], float]) -> Matrix:
    """Values by (seed, image or update) as networks x images, NaN for holes."""
    seeds = sorted({seed for seed, _ in values})
    rows = sorted({row for _, row in values})
    found = [[values.get((s, r), math.nan) for r in rows] for s in seeds]
    return np.array(found, dtype=np.float64).reshape(len(seeds), len(rows))


def collect(settings: Sequence[Setting], outcomes: Sequence[Outcome]) -> list[Group]:
    """The planned outcomes on the target pool by setting, defense, attack and attacker, in plan order.

    An outcome that two settings planned, such as a shared control, is in groups of both.
    """
    known = unique(outcomes)
    planned = [
        (setting.name, known[name])
        for setting in settings
        for name in dict.fromkeys(setting.planned)
        if name in known and known[name].trial.pool == "target"
    ]
    attacks = attack_names((setting, outcome.trial) for setting, outcome in planned)
    members: dict[Name, list[Outcome]] = defaultdict(list)
    for setting, outcome in planned:
        trial = outcome.trial
        members[setting, defense_name(trial.defense), attacks[trial.attack], trial.attacker].append(outcome)
    entries = {name: _entries(group) for name, group in members.items()}
    controls = _best_controls(entries)
    return [
        Group(*name[1:], tuple(group), entries[name], controls[name[:3]] if is_attack(name[3]) else {}, name[0])
        for name, group in members.items()
    ]


def unique(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """One outcome for each trial; of two, the choice does not depend on their order."""
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        name = outcome.trial.hash
        found[name] = max(found[name], outcome, key=Outcome.to_json) if name in found else outcome
    return found


def _entries(outcomes: Iterable[Outcome]) -> dict[Key, Entry]:
    found: dict[Key, Entry] = {}
    for outcome in outcomes:
        trial = outcome.trial
        for name, values in outcome.metrics.items():
            if len(values) != len(trial.episode):
                raise StoreError(
                    f"trial {trial.hash} has {len(values)} values of '{name}' for {len(trial.episode)} images; "
                    "its line in outcomes.jsonl was changed or comes from another version: remove it and run again."
                )
        for position, row in enumerate(trial.episode):
            if "ssim" not in outcome.metrics or not _counts(outcome, position):
                continue
            entry = _entry(outcome, position)
            # An image that is met twice on one network counts once, with its better guess; controls likewise.
            if (key := (trial.seed, row)) not in found or entry.ssim > found[key].ssim:
                found[key] = entry
    return found


def _counts(outcome: Outcome, position: int) -> bool:
    """Whether an image counts: where a defense protects some of a batch, only those."""
    protected = outcome.notes.get("protected", [])
    return len(protected) != len(outcome.trial.episode) or protected[position] > 0


def _entry(outcome: Outcome, position: int) -> Entry:
    def read(name: str) -> float:
        values = outcome.metrics.get(name)
        return float(values[position]) if values else math.nan

    ssim, mse, psnr = read("ssim"), read("mse"), read("psnr")
    return Entry(
        ssim=ssim if math.isfinite(ssim) else 0.0,
        mse=mse if math.isfinite(mse) else math.nan,
        psnr=min(psnr, PSNR_CAP) if psnr > -math.inf else math.nan,
        label_accuracy=read("label_accuracy"),
        identified=read("identified"),
        identified_by_features=read("identified_by_features"),
        hash=outcome.trial.hash,
        position=position,
        broken=not (math.isfinite(ssim) and math.isfinite(mse)),
    )


def _best_controls(entries: dict[Name, dict[Key, Entry]]) -> dict[tuple[str, str, str], dict[Key, Entry]]:
    best: dict[tuple[str, str, str], dict[Key, Entry]] = {}
    for cell in {name[:3] for name in entries}:
        found: dict[Key, Entry] = {}
        for (*own_cell, attacker), scored in entries.items():
            # The class mean needs no update: run once in a setting, it stands beside each of its defenses and attacks.
            shared = attacker == "control:class_mean" and own_cell[0] == cell[0]
            if not shared and not (attacker.startswith("control:") and tuple(own_cell) == cell):
                continue
            for key, entry in scored.items():
                if key not in found or entry.ssim > found[key].ssim:
                    found[key] = entry
        best[cell] = found
    return best
