"""The verdict: one sentence that promises no more than was tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from keyhole.report.groups import Group
from keyhole.report.records import Row, is_attack

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
"""Defenses that the verdict names in each of its groups, and settings; it counts the others."""
NAMED_OF_SEVERAL = 2
"""The same for defenses where there are several settings, whose names take room too."""


def percent(share: float) -> str:
    """A share in whole percent, such as ``81``; ``<1`` for what would round to 0 but is not."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def level(rows: Iterable[Row]) -> str:
    """How a defense did against its worst attacker: a key of `WORDS`."""
    scored = [row for row in rows if row.is_scored and not row.statuses.keys() <= {"diverged", "failed", "refused"}]
    if not scored:
        return "unscored"
    if any(row.attacker == "naive" and row.leak_rate.value >= FELL_FROM for row in scored):
        return "fell to naive"
    worst = max(row.leak_rate.value for row in scored)
    return "fell" if worst >= FELL_FROM else "partly" if worst > NOT_BROKEN_UP_TO else "not broken"


def worst_row(rows: Iterable[Row]) -> Row | None:
    """The attacker with the highest leak rate, the first of equals; `None` where no attack on images was scored."""
    return max((row for row in rows if row.is_scored), key=lambda row: row.leak_rate.value, default=None)


def by_defense(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of attackers on images (not controls) by defense, in plan order."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.is_attack and not row.labels_only:
            found[row.defense].append(row)
    return dict(found)


def beyond_controls(row: Row) -> bool:
    """Whether guesses resemble the secrets clearly more than controls do, leak or no leak."""
    return row.lift.low >= CLEARLY_BEYOND


def trouble(groups: Sequence[Group]) -> list[str]:
    """What would make the rest of the verdict misleading: attacks that did not run well, a self-test that failed."""
    said = []
    attacked = {o.trial.hash: o for group in groups if is_attack(group.attacker) for o in group.outcomes}
    broken = sum(o.status in ("diverged", "failed", "refused") for o in attacked.values())
    if broken:
        said.append(f"{broken} of {len(attacked)} attack trials diverged, failed or were refused")
    checks = {o.trial.hash: o for group in groups if group.attacker == "check:truth" for o in group.outcomes}
    astray = sum(
        o.status in ("diverged", "failed", "refused")
        or min(o.metrics.get("ssim", [0.0])) < TRUTH_STAYS
        or o.facts.get("truth_loss", 0.0) > TRUTH_LOSS
        for o in checks.values()
    )
    if astray:
        said.append(
            f"the self-test that starts at the truth failed in {astray} of {len(checks)} trials, so that this audit "
            "may be faulty"
        )
    return said


def updates_in_words(groups: Iterable[Group]) -> str:
    """From what an attacker computes a reconstruction, such as ``one update``."""
    trials = [outcome.trial for group in groups for outcome in group.outcomes]
    series = max((len(trial.episode) // trial.batch_size for trial in trials), default=1)
    rounds = max((trial.rounds for trial in trials), default=1)
    if rounds > 1:
        repeated = f"{rounds} updates of the same images"
        return repeated if series == 1 else f"{series} batches in a row, {repeated} each"
    return "one update" if series == 1 else f"{series} updates in a row"


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def beyond_in_words(row: Row) -> str:
    """For rates near zero: a threshold may hide that much is visible."""
    if row.leak_rate.value > NOT_BROKEN_UP_TO or not beyond_controls(row):
        return ""
    return f", yet with SSIM {row.lift.value:.2f} above the best control: below the threshold, but not nothing"


def defended(defenses: dict[str, list[Row]], settings: int = 1) -> str:
    """How the defenses fared, each by its worst attacker, and in its worst setting where there are several.

    Args:
        defenses: rows of all settings by defense.
        settings: how many there are.
    """
    worst = (worst_row(rows) for rows in defenses.values())
    places = {row.setting for row in worst if row is not None and row.leaks}
    everywhere = all(places <= {row.setting for row in rows if row.is_scored} for rows in defenses.values())
    one_place = settings > 1 and len(places) == 1 and len(defenses) > 1 and everywhere
    at_most = NAMED_OF_SEVERAL if settings > 1 else NAMED_AT_MOST
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for name, rows in defenses.items():
        found[level(rows)].append(f"{name}{_counted(rows, settings, say_where=not one_place)}")
    said = []
    for word, names in found.items():
        if names:
            forms = {"them": "it", "was": "was"} if len(names) == 1 else {"them": "them", "was": "were"}
            more = f", and {len(names) - at_most} more" if len(names) > at_most else ""
            count = "" if len(defenses) == 1 else f"{len(names)} "
            said.append(f"{count}{WORDS[word].format(**forms)} ({', '.join(names[:at_most])}{more})")
    by = ", by its worst setting," if settings > 1 else ""
    if len(defenses) == 1:
        return f"the one defense tried{by} {listed(said)}"
    by = f", each{by[1:]}" if by else ","
    return f"of {len(defenses)} defenses{by}{f' which is “{places.pop()}”,' if one_place else ''} {listed(said)}"


def _counted(rows: Sequence[Row], settings: int, say_where: bool) -> str:
    worst = worst_row(rows)
    if worst is None:
        return ""
    scored = [row for row in rows if row.is_scored]
    places = {row.setting for row in scored}
    # Withstanding only those who do not know the defense is weak evidence; the reader must see that it is all.
    known = {row.setting for row in scored if row.attacker.startswith("adaptive:")}
    named = say_where and (worst.leaks or len(places) < settings)  # none leaked: then so it was in all of them
    where = f" in “{worst.setting}”" if settings > 1 and named else ""
    where += f", scored in {len(places)} of {settings} settings" if len(places) < settings else ""
    blind = "" if known == places else ", attackers who do not know it only"
    blind += f" in {len(places - known)} of them" if known and blind else ""
    most = max(scored, key=lambda row: row.lift.low)
    beyond = beyond_in_words(most) if worst.leak_rate.value <= NOT_BROKEN_UP_TO else ""
    count = f"{worst.leaks} of {worst.n}"
    if level(rows) == "fell to naive" and worst.attacker != "naive":
        naive = worst_row(row for row in scored if row.attacker == "naive")
        if naive is not None and naive.leaks != worst.leaks:
            count = f"{naive.leaks} of {naive.n}, and {worst.leaks} of {worst.n} to one who does"
    return f": {count}{where}{blind}{beyond}"
