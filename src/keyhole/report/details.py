"""Tables of rows of strings behind the main one: comparisons, strengths, layers, all metrics and what was spent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from keyhole.report.comparisons import Comparison
from keyhole.report.layers import Layers
from keyhole.report.records import LABELS_ONLY, Row
from keyhole.report.strengths import SIMILAR_SSIM, Held
from keyhole.report.summarize import NEAR_MSE, NEAR_SSIM, Report
from keyhole.report.tables import LEVELS, Line, leaks_of, names, placed, shows_success
from keyhole.report.text import NOTHING, number, p_value, points, rated, share, signed, spread_out, spread_small
from keyhole.report.verdict import NOT_BROKEN_UP_TO, percent

HELD_NOTE = (
    f"Held: at most {percent(NOT_BROKEN_UP_TO)} % of images, at this strength and at every stronger one tried. Where "
    "little leaks without a defense, every strength holds; one that holds against a naive attacker alone does not "
    "protect."
)
KNOWLEDGE_NOTE = (
    "SSIM on the same images, adaptive minus naive; Wilcoxon signed-rank test, not corrected for the number of tests."
)
SETTINGS_NOTE = (
    "Setting minus the one it is compared with: same defense, attack, attacker, images and seeds. Leaks in percentage "
    "points, each side with its own controls. Wilcoxon signed-rank test on SSIM, not corrected for the number of "
    "tests. 0 images: the two draw on different data, and nothing can be paired."
)
NOTES_NOTE = (
    "What the defenses recorded of their own work, which no attacker was given, and a client's seconds for an update "
    "when all updates of a group are worked on together."
)
BOUNDS_NOTE = (
    "An upper bound on the probability with which any attack, known or not, recovers an image: from the mechanism's "
    "noise and the success of the best guess without an update. That success is estimated from public images, as an "
    "upper 95 % limit over the guesses tried. A leak rate above the bound by more than its interval would be a fault."
)
CERTIFICATES_NOTE = (
    "What a defense certifies for each image as the least mean squared error of a reconstruction that reproduces "
    "exactly what was shared; to first order where the network is not linear. Attackers who leave the defended tensor "
    "out, or mask it, are outside this assumption, as are those who do not reach an exact match, and clamping pixels "
    "to [0, 1] can only bring an image nearer. Void where, to first order, no picture in [0, 1] shares so."
)
VARIANTS_NOTE = (
    "Attack minus the one it is compared with, on the same updates. Solved: updates that the attack itself counts as "
    "matched, in percentage points. Evaluations: of the gradient, for the update behind an image. The updates of one "
    "series are taken as separate, although the attack carries something over; where one of the two does, only updates "
    "whose start was carried over count. Wilcoxon signed-rank test on SSIM, not "
    "corrected for the number of tests."
)


def knowledge_table(report: Report) -> list[Line]:
    """Adaptive against naive attackers."""
    tests = [test for test in report.comparisons if test.kind == "knowledge"]
    labels = _labels_tested(tests)
    head = ["defense", "attack", "attacker", "against", "images", "difference in SSIM (95 %)"]
    lines = [placed(report, "setting", [*head, *labels, "p"])]
    for test in tests:
        line = [test.defense, test.attack, test.attacker, test.against, str(test.n), signed(test.difference)]
        line += [points(test.labels)] * len(labels)
        lines.append(placed(report, test.setting, [*line, p_value(test.p)]))
    return lines


def settings_table(report: Report) -> list[Line]:
    """Settings against those they name."""
    tests = [test for test in report.comparisons if test.kind == "setting"]
    labels = _labels_tested(tests)
    head = ("setting", "against", "defense", "attack", "attacker", "images", "difference in SSIM (95 %)")
    lines: list[Line] = [(*head, "difference in leaks (95 %)", *labels, "p")]
    for test in tests:
        line = (test.setting, test.against, test.defense, test.attack, test.attacker, str(test.n))
        more = (points(test.labels),) * len(labels)
        lines.append((*line, signed(test.difference), points(test.leaks), *more, p_value(test.p)))
    return lines


def variants_table(report: Report) -> list[Line]:
    """Attacks against others of their name."""
    tests = [test for test in report.comparisons if test.kind == "attack"]
    labels = _labels_tested(tests)
    head = ["defense", "attack", "against", "images", "difference in SSIM (95 %)", "difference in solved (95 %)"]
    lines = [placed(report, "setting", [*head, "difference in evaluations (95 %)", *labels, "p"])]
    for test in tests:
        line = [test.defense, test.attack, test.against, str(test.n), signed(test.difference), points(test.success)]
        line += [signed(test.evaluations, 1), *([points(test.labels)] * len(labels)), p_value(test.p)]
        lines.append(placed(report, test.setting, line))
    return lines


def _labels_tested(tests: Iterable[Comparison]) -> list[str]:
    """A column for differences in labels, where an attack recovers nothing else."""
    alone = any(test.attack.partition("(")[0] == LABELS_ONLY for test in tests)
    return ["difference in labels right (95 %)"] if alone else []


def strengths_table(report: Report) -> list[Line]:
    """The weakest strength of each defense that held, under both rules of what counts."""
    lines = [
        placed(
            report,
            "setting",
            ["defense", "strengths, weakest first", "counted", "undefended", "naive: held from", "adaptive: held from"],
        )
    ]
    for line in report.strengths:
        tried = f"{line.option} {', '.join(f'{s:g}' for s in line.strengths)}"
        counted = "leaks" if line.rule == "leak" else f"SSIM ≥ {SIMILAR_SSIM:g}"
        held = (_held(one, line.strengths[0]) for one in (line.naive, line.adaptive))
        lines.append(placed(report, line.setting, [line.defense, tried, counted, rated(line.undefended), *held]))
    return lines


def _held(held: Held, weakest: float) -> str:
    if held.strength is None:
        return "none tried" if held.scored else "no such attacker scored"
    by = f"; {held.attacker.partition(':')[2]}" if held.attacker.startswith("adaptive:") else ""
    rate = held.leak_rate
    least = ", weakest tried" if held.strength == weakest else ""
    return f"{held.strength:g}{least} ({percent(rate.value)} %, {percent(rate.low)}-{percent(rate.high)}{by})"


def layers_table(report: Report, lines: Sequence[Layers]) -> list[Line]:
    """Sets of layers that were left out, the smallest first."""
    head = ["layers left out", "share withheld", "leaks, worst (95 %)", "worst attacker", "level"]
    found = [placed(report, "setting", head)]
    several = len({line.attack for line in report.layers}) > 1
    for line in lines:
        by = f"{line.attacker}, {line.attack}" if several and line.attack else line.attacker or NOTHING
        cells = [line.layers, share(line.withheld), rated(line.leak_rate), by, LEVELS[line.level]]
        found.append(placed(report, line.setting, cells))
    return found


def notes_table(report: Report) -> list[Line]:
    """What the defenses put on record about themselves, and what they cost a client."""
    lines = [placed(report, "setting", ["defense", "what", "median", "middle 80 %", "remark"])]
    told: set[tuple[str, str]] = set()
    for row in report.rows:
        cell = (row.setting, row.defense)
        if not row.is_attack or cell in told or not (row.notes or row.remarks):
            continue
        told.add(cell)
        remark = " ".join(f"{count} of {sum(row.statuses.values())}: {text}" for text, count in row.remarks.items())
        for name, found in row.notes.items():
            middle = f"{number(found.q10)} to {number(found.q90)}"
            line = [row.defense, name.replace("_", " "), number(found.median), middle, remark or NOTHING]
            lines.append(placed(report, row.setting, line))
            remark = NOTHING
        seconds = ["client seconds for an update", number(row.client_seconds), NOTHING, remark or NOTHING]
        lines.append(placed(report, row.setting, [row.defense, *seconds]))
    return lines


def bounds_table(report: Report) -> list[Line]:
    """Where a defense's noise bounds every attack: the bound beside what was measured."""
    head = ["defense", "attack", "attacker", "leak rate (95 %)", "best guess", "bound on any attack"]
    lines = [placed(report, "setting", head)]
    for row in report.rows:
        if row.is_attack and math.isfinite(row.bound):
            line = [*names(row), rated(row.leak_rate), f"{percent(row.prior)} %", f"{percent(row.bound)} %"]
            lines.append(placed(report, row.setting, line))
    return lines


def certificates_table(report: Report) -> list[Line]:
    """Where a defense certifies a distance: the certificate beside what was measured."""
    head = [
        "defense",
        "attack",
        "attacker",
        "certified MSE (middle 80 %)",
        "MSE (middle 80 %)",
        "images below the certificate",
    ]
    lines = [placed(report, "setting", head)]
    for row in report.rows:
        if row.is_attack and math.isfinite(row.certified.median):
            line = [*names(row), spread_small(row.certified), spread_small(row.mse), rated(row.below_certificate)]
            lines.append(placed(report, row.setting, line))
    return lines


def spent_table(report: Report) -> list[Line]:
    """What each attacker used."""
    each = any(math.isfinite(row.evaluations_per_image) for row in report.rows)
    head = ["defense", "attack", "attacker", "trials by status", "evaluations", "seconds"]
    lines = [placed(report, "setting", [*head, *(["evaluations for an update"] if each else [])])]
    for row in report.rows:
        line = [*names(row), statuses(row), f"{row.evaluations:,}", f"{row.seconds:,.1f}"]
        line += [number(row.evaluations_per_image, 4)] if each else []
        lines.append(placed(report, row.setting, line))
    return lines


def statuses(row: Row) -> str:
    """How many trials ended in which way."""
    return ", ".join(f"{count} {status}" for status, count in row.statuses.items())


def metrics_table(report: Report) -> list[Line]:
    """Every number of every row."""
    identified, solved = any(row.identified for row in report.rows), shows_success(report)
    by_features = any(row.identified_by_features for row in report.rows)
    head = ["defense", "attack", "attacker", "n", "networks", "leak rate", f"SSIM ≥ {NEAR_SSIM:g}"]
    head += [f"MSE < {NEAR_MSE:g}", "SSIM", "PSNR (dB)", "MSE", "labels right", "lift in SSIM", "update norm"]
    head += ["zeros in update", *(["solved"] if solved else []), *(["identified"] if identified else [])]
    head += ["identified by features"] if by_features else []
    lines = [placed(report, "setting", head)]
    for row in report.rows:
        line = [*names(row), str(row.n), str(row.networks)]
        images = [rated(row.leak_rate), rated(row.leak_rate_90), rated(row.leak_rate_mse)]
        images += [spread_out(row.ssim, 2), spread_out(row.psnr, 1), spread_small(row.mse)]
        pictured = leaks_of(row) is not None
        line += [*(images if pictured else [NOTHING] * len(images)), rated(row.labels)]
        line += [signed(row.lift) if pictured else NOTHING, number(row.update_norm), share(row.zeros)]
        line += [rated(row.success)] if solved else []
        line += [rated(row.identified)] if identified else []
        line += [rated(row.identified_by_features)] if by_features else []
        lines.append(placed(report, row.setting, line))
    return lines
