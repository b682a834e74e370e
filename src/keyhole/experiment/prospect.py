"""What a dry run has to say: plain values, and the same in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from keyhole.experiment.cost import Cost
from keyhole.experiment.feasibility import Feasibility

WIDTH = 110
"""Characters of a line of text."""

NOTICE = (
    "Predictions rest on one simulated update of public images, undefended. They are not measured leak rates, and "
    '"unlikely" is about these attacks only: it never means safe. Rules and record: docs/calibration.md.'
)


@dataclass(frozen=True)
class Outlook:
    """One setting of a study."""

    setting: str
    cells: tuple[tuple[str, str, str], ...]
    """Defense, attack and attacker of every combination, controls and self-tests among them."""
    trials: int
    """Updates that would be attacked, each once for every cell; tuning included."""
    tuning: int
    """Those of them on the tune pool."""
    groups: int
    core_seconds: float
    problems: tuple[str, ...]
    """What would not run, and why."""
    training: str
    """What would be trained first, and is not here."""
    feasibility: Feasibility


@dataclass(frozen=True)
class Prospect:
    """A study before it runs."""

    title: str
    settings: tuple[Outlook, ...]
    cost: Cost
    """Of all settings; what two of them have in common counts once."""
    memory: float
    """Bytes of all processes together, at the peak."""
    took: float
    """Seconds that the dry run took."""

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        settings = [{**asdict(one), "feasibility": one.feasibility.asdict()} for one in self.settings]
        return {**asdict(self), "settings": settings, "upper_bound": True, "notice": NOTICE}


def in_words(prospect: Prospect) -> str:
    """Plan, cost and prediction as lines of text."""
    lines = [f"{prospect.title}: nothing has been run or written.", ""]
    for outlook in prospect.settings:
        lines += [*_plan(outlook), *_prediction(outlook), ""]
    cost, jobs = prospect.cost, prospect.cost.jobs
    lines += [
        f"Cost, at most: {in_hours(cost.wall_seconds)} with {jobs} job{'s' * (jobs != 1)} on this machine "
        f"({in_hours(cost.core_seconds)} of core time), about {prospect.memory / 1e9:.1f} GB of memory.",
        "An upper bound, from a few timed steps on public images with half as much again in reserve: it counts every "
        "step that every attack may take, and many end before.",
        NOTICE,
    ]
    return "\n".join(_wrapped(line) for line in lines)


def _plan(outlook: Outlook) -> Iterator[str]:
    yield f"Setting: {outlook.setting}" if outlook.setting else "Plan"
    yield (
        f"  {outlook.trials - outlook.tuning} trials"
        + (f" and {outlook.tuning} to tune" * (outlook.tuning > 0))
        + f", in {outlook.groups} groups; at most {in_hours(outlook.core_seconds)} of core time"
    )
    attacks = dict.fromkeys(attack for _, attack, attacker in outlook.cells if attacker == "naive")
    yield f"  Attacks: {'; '.join(attacks)}"
    # Strengths of one defense share a line.
    defenses: dict[str, set[str]] = {}
    attackers: dict[str, dict[str, None]] = {}
    for defense, _, attacker in outlook.cells:
        kind = " -> ".join(link.partition("(")[0] for link in defense.split(" -> "))
        defenses.setdefault(kind, set()).add(defense)
        attackers.setdefault(kind, {})[attacker] = None
    for kind, met in attackers.items():
        several = f" ({len(defenses[kind])} strengths)" if len(defenses[kind]) > 1 else ""
        yield f"  {'Undefended' if kind == 'none' else kind}{several}: {', '.join(met)}"
    for problem in outlook.problems:
        yield f"  Would not run: {problem}"
    if outlook.training:
        yield f"  {outlook.training}"


def _prediction(outlook: Outlook) -> Iterator[str]:
    facts = outlook.feasibility.facts
    yield f"  Prediction without a defense: {outlook.feasibility.verdict}."
    pinned = "" if facts.pinned is None else f"; near the truth it pins down {100 * facts.pinned:.0f} % of them"
    yield (
        f"    {facts.unknowns:,} pixels ({facts.images} image{'s' * (facts.images != 1)}) against {facts.nonzero:,} "
        f"entries of the update that are not 0{pinned}."
    )
    signs = {"stops": "Against it", "hinders": "Against it", "note": "Note"}
    for effect, text in outlook.feasibility.reasons:
        yield f"    {signs[effect]}: {text}"


def _wrapped(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line, WIDTH, initial_indent="", subsequent_indent=indent and indent + "  ")


def in_hours(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
