"""Tables of model inversions as rows of strings, head first, for the terminal, Markdown and the page alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keyhole.report.intervals import Estimate, student
from keyhole.report.inversion_summary import Cell, floor, lift
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING, fixed, number, points, share, signed
from keyhole.report.training import accuracy_in_words

HEAD = (
    "defense", "attack", "attacker", "round", "test accuracy", "recognised (95 %)", "in the top 5", "KNN distance",
    "feature distance", "FID", "diversity", "by the target", "networks", "seconds",
)  # fmt: skip


def table(found: Sequence[Cell]) -> list[Line]:
    """A row for each cell."""
    lines: list[Line] = [HEAD]
    for c in found:
        lines.append(
            (
                c.defense, c.attack, c.attacker, str(c.round), share(c.accuracy),
                _recognised(c), share(c.top5), number(c.knn_distance),
                number(c.feature_distance), number(c.fid), fixed(c.diversity, 2), share(c.target_accuracy),
                str(len(c.by_seed)), number(c.seconds),
            )
        )  # fmt: skip
    return lines


def _recognised(cell: Cell) -> str:
    """The share, or why there is none."""
    return accuracy_in_words(cell.attack_accuracy) if cell.by_seed else cell.failed


def overview(found: Sequence[Cell]) -> list[Line]:
    """A row for each attack, beside the best of the controls that know nothing of the network."""
    lines: list[Line] = [
        (
            "defense", "attack", "round", "test accuracy", "recognised (95 %)", "best control", "above it",
            "diversity", "networks",
        )
    ]  # fmt: skip
    for c in found:
        if not c.is_attack:
            continue
        control = floor(found, c)
        lines.append(
            (
                c.defense, c.attack, str(c.round), share(c.accuracy), _recognised(c),
                NOTHING if control is None else share(control.attack_accuracy.value), points(lift(found, c)),
                fixed(c.diversity, 2), str(len(c.by_seed)),
            )
        )  # fmt: skip
    return lines


def compared(found: Sequence[Cell]) -> list[Line]:
    """Variants of an attack against the first attack of the file, on the same networks: accuracy and diversity."""
    lines: list[Line] = [("defense", "round", "attack", "against", "recognised", "diversity", "networks")]
    attacks = [c for c in found if c.is_attack]
    for base in attacks:
        if base.attack != attacks[0].attack:
            continue
        for other in attacks:
            if (other.defense, other.round) != (base.defense, base.round) or other.attack == base.attack:
                continue
            seeds = sorted(other.by_seed.keys() & base.by_seed.keys())
            if not seeds:
                continue
            lines.append(
                (
                    base.defense, str(base.round), other.attack, base.attack,
                    points(student([other.by_seed[s] - base.by_seed[s] for s in seeds])),
                    signed(student([other.diversity_by_seed[s] - base.diversity_by_seed[s] for s in seeds])),
                    str(len(seeds)),
                )
            )  # fmt: skip
    return lines


def matched(found: Sequence[Cell]) -> list[Line]:
    """Each defense against the undefended network of the round whose test accuracy is nearest, network by network."""
    lines: list[Line] = [
        ("defense", "attack", "round", "test accuracy", "undefended, nearest", "recognised against it", "networks")
    ]
    attacks = [c for c in found if c.is_attack]
    bare = [c for c in attacks if c.defense == "none"]
    for cell in attacks:
        rivals = [c for c in bare if c.attack == cell.attack]
        if cell.defense == "none" or not rivals:
            continue
        if cell.round != max(c.round for c in attacks if c.defense == cell.defense):
            continue
        gaps, differences = [], []
        for seed, value in cell.by_seed.items():
            own = [c for c in rivals if seed in c.by_seed]
            if not own:
                continue
            nearest = min(own, key=lambda c: abs(c.right_by_seed[seed] - cell.right_by_seed[seed]))
            gaps.append(nearest.right_by_seed[seed])
            differences.append(value - nearest.by_seed[seed])
        if differences:
            lines.append(
                (
                    cell.defense, cell.attack, str(cell.round), share(cell.accuracy),
                    share(math.fsum(gaps) / len(gaps)), points(student(differences)), str(len(differences)),
                )
            )  # fmt: skip
    return lines


def joined(lines: Sequence[Cell], updates: dict[tuple[str, int], Estimate]) -> list[Line]:
    """What an update and what the network itself reveal, round by round; empty where no update was attacked."""
    attacks = [c for c in lines if c.is_attack and c.by_seed]
    places = sorted({(c.defense, c.round) for c in attacks} | set(updates), key=lambda p: (p[0] != "none", *p))
    if not updates:
        return []
    rows: list[Line] = [
        ("defense", "round", "test accuracy", "images leaked by an update", "classes recognised from the network")
    ]
    for defense, when in places:
        own = [c for c in attacks if (c.defense, c.round) == (defense, when)]
        worst = max(own, key=lambda c: c.attack_accuracy.value, default=None)
        leak = updates.get((defense, when))
        rows.append(
            (
                defense, str(when), NOTHING if worst is None else share(worst.accuracy),
                NOTHING if leak is None else accuracy_in_words(leak),
                NOTHING if worst is None else f"{accuracy_in_words(worst.attack_accuracy)}, {worst.attack}",
            )
        )  # fmt: skip
    return rows
