"""The verdict: one sentence that promises no more than was tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from keyhole.report.groups import Group, is_attack

if TYPE_CHECKING:
    from keyhole.report.summarize import Row

NOT_BROKEN_UP_TO = 0.05
FELL_FROM = 0.5
CLEARLY_BEYOND = 0.1
"""Lower end of the interval of the mean SSIM above the best control from which the verdict mentions it."""
TRUTH_STAYS = 0.95
"""SSIM that the self-test must keep."""
TRUTH_LOSS = 1e-5
"""Matching loss that the self-test may end with, above rounding errors of float32."""

WORDS = {
    "fell to naive": "fell even to an attacker who does not know {them}",
    "fell": "fell to an attacker who knows {them}",
    "partly": "gave way in part",
    "not broken": "{was} not broken by the attacks tried",
    "unscored": "could not be scored",
}
"""How the verdict speaks of a defense, from worst to best. Nothing here may promise more than was tried."""
NAMED_AT_MOST = 4
"""Defenses that the verdict names in each of its groups; it counts the others."""


def percent(share: float) -> str:
    """A share in whole percent, such as ``81``; ``<1`` for what would round to 0 but is not."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def level(rows: Iterable[Row]) -> str:
    """How a defense did against its worst attacker: a key of `WORDS`."""
    scored = [row for row in rows if row.is_attack and row.n]
    if not scored:
        return "unscored"
    if any(row.attacker == "naive" and row.leak_rate.value >= FELL_FROM for row in scored):
        return "fell to naive"
    worst = max(row.leak_rate.value for row in scored)
    return "fell" if worst >= FELL_FROM else "partly" if worst > NOT_BROKEN_UP_TO else "not broken"


def worst_row(rows: Iterable[Row]) -> Row | None:
    """The attacker with the highest leak rate, the first of equals; `None` where nothing was scored."""
    return max((row for row in rows if row.is_attack and row.n), key=lambda row: row.leak_rate.value, default=None)


def by_defense(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of attackers (not controls) by defense, in plan order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.is_attack:
            found[row.defense].append(row)
    return dict(found)


def verdict(rows: Sequence[Row], groups: Sequence[Group], done: int, planned: int) -> str:
    """The sentence a reader takes away: undefended, then each defense under its worst attacker."""
    prefix = "" if done == planned else f"Incomplete ({done} of {planned} trials): "
    defenses = by_defense(rows)
    undefended = worst_row(defenses.pop("none", []))
    if undefended is None and not any(worst_row(found) for found in defenses.values()):
        text = "no attack has produced a score yet, so that nothing can be said about leaks."
        return prefix + (text if prefix else text.capitalize())
    parts = [_undefended(undefended, groups)]
    if defenses:
        parts.append(_defended(defenses))
        if undefended and undefended.leak_rate.value <= NOT_BROKEN_UP_TO:
            parts.append("as there was next to nothing to stop, this says little about the defenses")
    parts += trouble(groups)
    return prefix + "; ".join(parts) + "."


def beyond_controls(row: Row) -> bool:
    """Whether guesses resemble the secrets clearly more than controls do, leak or no leak."""
    return row.lift.low >= CLEARLY_BEYOND


def trouble(groups: Sequence[Group]) -> list[str]:
    """What would make the rest of the verdict misleading: attacks that did not run well, a self-test that failed."""
    said = []
    attacked = [o for group in groups if is_attack(group.attacker) for o in group.outcomes]
    broken = sum(o.status in ("diverged", "failed", "refused") for o in attacked)
    if broken:
        said.append(f"{broken} of {len(attacked)} attack trials diverged, failed or were refused")
    checks = [o for group in groups if group.attacker == "check:truth" for o in group.outcomes]
    astray = sum(
        o.status in ("diverged", "failed", "refused")
        or min(o.metrics.get("ssim", [0.0])) < TRUTH_STAYS
        or o.facts.get("truth_loss", 0.0) > TRUTH_LOSS
        for o in checks
    )
    if astray:
        said.append(
            f"the self-test that starts at the truth failed in {astray} of {len(checks)} trials, so that this audit "
            "may be faulty"
        )
    return said


def _undefended(row: Row | None, groups: Sequence[Group]) -> str:
    if row is None:
        return "The undefended case could not be scored"
    rounds = max(len(o.trial.episode) // o.trial.batch_size for group in groups for o in group.outcomes)
    rate_ = row.leak_rate
    several = row.networks > 1
    over = f"{row.n} cases" if several else f"{row.n} image{'s' * (row.n != 1)}"
    made_of = f"{row.images} image{'s' * (row.images != 1)} on {row.networks} networks; " if several else ""
    return (
        f"Undefended, the attacks tried recovered {row.leaks} of {over} "
        f"({made_of}{percent(rate_.value)} %, 95 % interval {percent(rate_.low)}-{percent(rate_.high)} %) "
        f"from {'one update' if rounds == 1 else f'{rounds} updates in a row'}"
        + (_beyond(row) if rate_.value <= NOT_BROKEN_UP_TO else "")
    )


def _defended(defenses: dict[str, list[Row]]) -> str:
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for name, rows in defenses.items():
        found[level(rows)].append(f"{name}{_counted(rows)}")
    said = []
    for word, names in found.items():
        if names:
            forms = {"them": "it", "was": "was"} if len(names) == 1 else {"them": "them", "was": "were"}
            more = f", and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
            count = "" if len(defenses) == 1 else f"{len(names)} "
            said.append(f"{count}{WORDS[word].format(**forms)} ({', '.join(names[:NAMED_AT_MOST])}{more})")
    text = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return f"the one defense tried {text}" if len(defenses) == 1 else f"of {len(defenses)} defenses, {text}"


def _counted(rows: Sequence[Row]) -> str:
    worst = worst_row(rows)
    if worst is None:
        return ""
    # Withstanding only those who do not know the defense is weak evidence; the reader must see that it is all.
    known = any(row.attacker.startswith("adaptive:") and row.n for row in rows)
    most = max((row for row in rows if row.is_attack and row.n), key=lambda row: row.lift.low)
    beyond = _beyond(most) if worst.leak_rate.value <= NOT_BROKEN_UP_TO else ""
    return f": {worst.leaks} of {worst.n}" + ("" if known else ", attackers who do not know it only") + beyond


def _beyond(row: Row) -> str:
    """For rates near zero: a threshold may hide that much is visible."""
    if not beyond_controls(row):
        return ""
    return f", yet with SSIM {row.lift.value:.2f} above the best control: below the threshold, but not nothing"
