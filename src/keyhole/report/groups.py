"""Outcomes as groups: one attacker against one defense, with the best control of each image."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keyhole.core.registry import DEFENSES
from keyhole.core.trial import Outcome, Spec, Trial
from keyhole.errors import StoreError
from keyhole.report.intervals import Matrix

Key = tuple[int, int]
"""One image on one network: (seed, row of the target pool)."""

LEAK_SSIM = 0.7
LEAK_MARGIN = 0.1
PSNR_CAP = 100.0
"""dB; where a perfect copy's infinite PSNR is cut."""


@dataclass(frozen=True)
class Entry:
    """The scores of one image, and where its reconstruction is."""

    ssim: float
    mse: float
    psnr: float
    label_accuracy: float
    identified: float
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

    @property
    def cell(self) -> tuple[str, str]:
        """Defense and attack."""
        return self.defense, self.attack

    def leaks(self, key: Key) -> bool:
        """Whether an image leaked: similar enough, and more so than the best guess without the update."""
        ssim = self.entries[key].ssim
        control = self.controls.get(key)
        # The slack is for decimals such as 0.1 that have no exact binary form.
        return ssim >= LEAK_SSIM - 1e-9 and (control is None or ssim >= control.ssim + LEAK_MARGIN - 1e-9)

    def matrix(self, values: dict[Key, float]) -> Matrix:
        """Values as networks x images."""
        seeds = sorted({seed for seed, _ in values})
        rows = sorted({row for _, row in values})
        return np.array([[values.get((s, r), math.nan) for r in rows] for s in seeds]).reshape(len(seeds), len(rows))


def is_attack(attacker: str) -> bool:
    """Whether an attacker is one, rather than a control or a self-test."""
    return not attacker.startswith(("control:", "check:"))


def collect(planned: Sequence[str], outcomes: Sequence[Outcome]) -> list[Group]:
    """The planned outcomes on the target pool, grouped by defense, attack and attacker, in plan order."""
    place = {name: i for i, name in enumerate(planned)}
    targets = [o for name, o in unique(outcomes).items() if o.trial.pool == "target" and name in place]
    targets.sort(key=lambda o: place[o.trial.hash])
    attacks = _attack_names([o.trial for o in targets])
    members: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in targets:
        trial = outcome.trial
        members[_defense_name(trial.defense), attacks[trial.attack], trial.attacker].append(outcome)
    entries = {name: _entries(group) for name, group in members.items()}
    controls = _best_controls(entries)
    return [
        Group(*name, tuple(group), entries[name], controls[name[:2]] if is_attack(name[2]) else {})
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
            if "ssim" not in outcome.metrics:
                continue
            entry = _entry(outcome, position)
            # An image that is met twice on one network counts once, with its better guess; controls likewise.
            if (key := (trial.seed, row)) not in found or entry.ssim > found[key].ssim:
                found[key] = entry
    return found


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
        hash=outcome.trial.hash,
        position=position,
        broken=not (math.isfinite(ssim) and math.isfinite(mse)),
    )


def _best_controls(entries: dict[tuple[str, str, str], dict[Key, Entry]]) -> dict[tuple[str, str], dict[Key, Entry]]:
    best: dict[tuple[str, str], dict[Key, Entry]] = {}
    for cell in {name[:2] for name in entries}:
        found: dict[Key, Entry] = {}
        for (defense, attack, attacker), scored in entries.items():
            # The class mean needs no update, so that it is run once and stands beside every defense and attack.
            own = attacker.startswith("control:") and (defense, attack) == cell
            if not own and attacker != "control:class_mean":
                continue
            for key, entry in scored.items():
                if key not in found or entry.ssim > found[key].ssim:
                    found[key] = entry
        best[cell] = found
    return best


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "[" + ", ".join(_show(v) for v in value) + "]" if isinstance(value, tuple) else str(value)


def _name(spec: Spec, options: Iterable[str]) -> str:
    given = spec.asdict()
    inside = ", ".join(f"{k}={_show(given[k])}" for k in options if given.get(k) is not None)
    return f"{spec.name}({inside})" if inside else spec.name


def _varying(specs: Iterable[Spec]) -> list[str]:
    """Options whose values differ between specs."""
    given = [spec.asdict() for spec in specs]
    names = sorted({name for options in given for name in options})
    return [name for name in names if len({repr(options.get(name)) for options in given}) > 1]


def _defense_name(links: tuple[Spec, ...]) -> str:
    """A chain as text: of each link its first option, which is its strength, and what is not at its default."""
    return " -> ".join(_name(link, _worth_showing(link)) for link in links) or "none"


def _worth_showing(link: Spec) -> list[str]:
    if link.name not in DEFENSES:
        return list(link.asdict())
    knobs = DEFENSES.card(link.name).signature().parameters
    given = link.asdict()
    known = [n for i, n in enumerate(knobs) if n in given and (i == 0 or given[n] != knobs[n].default)]
    return known + [n for n in given if n not in knobs]


def _attack_names(trials: Sequence[Trial]) -> dict[Spec, str]:
    """Each attack as text: its name, and options only where two of that name attack the same thing.

    Options that tuning chose for each defense also differ, but never within one cell: they do not split a row.
    """
    rivals: dict[tuple[Any, ...], set[Spec]] = defaultdict(set)
    for t in trials:
        rivals[t.attack.name, t.defense, t.attacker, t.seed, t.episode].add(t.attack)
    clashes: dict[str, list[set[Spec]]] = defaultdict(list)
    for (name, *_), specs in rivals.items():
        if len(specs) > 1:
            clashes[name].append(specs)
    shown = {name: _telling(groups) for name, groups in clashes.items()}
    return {t.attack: _name(t.attack, shown.get(t.attack.name, ())) for t in trials}


def _telling(groups: list[set[Spec]]) -> list[str]:
    """The options that tell rivals apart: those the user listed have the same values in every group."""
    largest = max(len(group) for group in groups)
    groups = [group for group in groups if len(group) == largest]
    varying = sorted({option for group in groups for option in _varying(group)})
    listed = [
        option
        for option in varying
        if len({frozenset(repr(spec.asdict().get(option)) for spec in group) for group in groups}) == 1
    ]
    told = all(len({_name(spec, listed) for spec in group}) == len(group) for group in groups)
    return listed if told else varying
