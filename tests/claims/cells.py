"""Keep what audits measured of every defense, for the table in docs/defenses.md: tests/claims/measured/cells.json.

    python tests/claims/cells.py PRESET=DIR ...     read finished audits' report.json
    python tests/claims/cells.py --accuracy DIR     keep what `keyhole train accuracy` measured
    python tests/claims/cells.py --frontier NAME=DIR --inversion NAME=DIR    keep those of keyhole frontier and invert
    python tests/claims/cells.py --sent DIR ...     keep what `keyhole frontier sent` recovered, by images an update
    python tests/claims/cells.py --claims           all of it, from what `make claims` measured

Each cell is one attack on one defense in one setting: the naive attacker, the worst who knows the defense, the best
control, what a client pays, and a bound on any attack where there is one. docs/generate.py renders them.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from keyhole.report.sent import read_sent, sent_in_words, worst
from keyhole.report.verdict import FELL_FROM, NOT_BROKEN_UP_TO

HERE = Path(__file__).parent
KEPT = HERE / "measured" / "cells.json"
ACCURACY = HERE / "measured" / "accuracy.json"
FRONTIERS = HERE / "measured" / "frontiers.json"
INVERSIONS = HERE / "measured" / "inversions.json"
SENT = HERE / "measured" / "sent.json"
CLAIMS = HERE.parent.parent / "audits" / "claims"

AUDITS = ("masking", "masking_weak.toml", "dp_sgd", "soteria", "obscuring", "concealing", "concealing_inserted.toml",
          "training_losses")  # fmt: skip
"""Audits whose cells are kept, in the order of the page."""

Cell = dict[str, Any]
Row = dict[str, Any]


def load() -> list[Cell]:
    """All cells, in the order of the table."""
    return list(json.loads(KEPT.read_text())) if KEPT.exists() else []


def save(cells: list[Cell]) -> None:
    """Write all cells, one a line, so that a changed number is a changed line."""
    KEPT.write_text("[\n" + ",\n".join(json.dumps(cell) for cell in cells) + "\n]\n")


def merge(cells: list[Cell], audit: str, new: list[Cell]) -> list[Cell]:
    """Cells with those of one audit replaced, at the place where they were."""
    place = next((i for i, cell in enumerate(cells) if cell["audit"] == audit), len(cells))
    others = [cell for cell in cells if cell["audit"] != audit]
    return [*others[:place], *new, *others[place:]]


def cells_of(audit: str, report: dict[str, Any], day: str) -> list[Cell]:
    """Every attack x defense cell of a report.

    Args:
        audit: its preset.
        report: a report.json of a complete audit.
        day: when it was measured.
    """
    if not report["complete"]:
        raise SystemExit(f"the audit of {audit} is not complete; run it to the end first")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in report["rows"]:
        regular = row["statuses"].keys() - {"diverged", "failed", "refused"}
        if row["n"] and regular and not row["attack"].startswith("labels_only"):
            groups.setdefault((row.get("setting", ""), row["defense"], row["attack"]), []).append(row)
    found = []
    for (setting, defense, attack), rows in groups.items():
        naive = [row for row in rows if row["attacker"] == "naive"]
        adaptive = [row for row in rows if row["attacker"].startswith("adaptive:")]
        controls = [row["leak_rate"]["value"] for row in rows if row["attacker"].startswith("control:")]
        attacks = [*naive, *adaptive]
        if not attacks:
            continue
        worst = max(attacks, key=lambda row: (row["leak_rate"]["value"], row["ssim"]["median"]))
        cell: Cell = {"audit": audit, "setting": setting, "task": worst["task"], "state": worst["state"]}
        cell |= {"defense": defense, "attack": attack, "n": worst["n"], "networks": worst["networks"]}
        cell["naive"] = _brief(naive[0]) if naive else None
        cell["adaptive"] = _brief(max(adaptive, key=_leakiness)) if adaptive else None
        cell["controls"] = max(controls, default=None)
        cell["lift"] = worst["lift"]
        cell["client_seconds"] = worst.get("client_seconds")
        cell["bound"] = worst.get("bound")
        cell["level"] = level(naive, attacks)
        found.append({**cell, "date": day})
    return found


def _leakiness(row: Row) -> tuple[float, float]:
    return row["leak_rate"]["value"], row["ssim"]["median"]


def _brief(row: Row) -> Cell:
    return {
        "attacker": row["attacker"],
        "leak_rate": row["leak_rate"],
        "ssim": row["ssim"]["median"],
        "psnr": row["psnr"]["median"],
    }


def level(naive: list[Row], attacks: list[Row]) -> str:
    """How the defense did, in the report's own levels."""
    if any(row["leak_rate"]["value"] >= FELL_FROM for row in naive):
        return "fell to naive"
    worst = max(row["leak_rate"]["value"] for row in attacks)
    return "fell" if worst >= FELL_FROM else "partly" if worst > NOT_BROKEN_UP_TO else "not broken"


def keep_accuracy(folder: Path, today: str) -> None:
    """What each defense leaves of the test accuracy, and costs of it, paired by seed."""
    found = json.loads((folder / "train.json").read_text())["summary"]
    trainings = min(len(one["seeds"]) for one in found)
    kept = {one["defense"]: {key: one[key] for key in ("accuracy", "change")} for one in found}
    ACCURACY.write_text(json.dumps({"date": today, "trainings": trainings, "defenses": kept}, indent=1) + "\n")


FRONTIER_NAMES = ("frontier", "frontier_mnist", "frontier_cifar10")
INVERSION_NAMES = ("fedinverse_digits", "fedinverse_mnist", "fedinverse_mnist_defenses", "fedinverse_mnist_ked",
                   "fedinverse_faces")  # fmt: skip


def keep_frontier(name: str, folder: Path, today: str) -> None:
    """The points of a frontier: accuracy and worst leak rate of each defense; and what clients themselves sent."""
    found = json.loads((folder / "report.json").read_text())
    sent = {"sent": sent_in_words(found["sent"])} if found.get("sent") else {}
    _keep(FRONTIERS, name, {"date": today, "points": found["points"], **sent})


def keep_sent(folders: list[Path], today: str) -> None:
    """Images recovered from what clients themselves sent without a defense, by how many were behind an update."""
    kept = []
    for folder in folders:
        sent = read_sent(folder)
        attacked = [one for one in map(worst, sent) if one is not None]
        counts = {"images": sent[0]["images"], "steps": sent[0]["steps"], "clients": len(attacked)}
        kept.append(
            {**counts, "leaked": sum(one.leaks for one in attacked), "of": sum(len(one.ssim) for one in attacked)}
        )
    kept.sort(key=lambda one: (one["steps"], one["images"]))
    SENT.write_text(json.dumps({"date": today, "updates": kept}, indent=1) + "\n")


def keep_inversion(name: str, folder: Path, today: str) -> None:
    """The rows of a model inversion, and what was compared."""
    found = json.loads((folder / "report.json").read_text())
    kept = {key: found[key] for key in ("verdict", "assumptions", "rows", "compared", "matched")}
    _keep(INVERSIONS, name, {"date": today, **kept})


def _keep(path: Path, name: str, value: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, name: value}, indent=1) + "\n")


def main() -> None:
    """Read reports and keep their cells."""
    parser = argparse.ArgumentParser(description="Keep what audits measured of every defense.")
    parser.add_argument("measured", nargs="*", metavar="PRESET=DIR", help="finished audits")
    parser.add_argument("--accuracy", type=Path, metavar="DIR", help="the finished trainings of the preset accuracy")
    parser.add_argument("--frontier", nargs="*", default=[], metavar="NAME=DIR", help="finished frontiers")
    parser.add_argument("--inversion", nargs="*", default=[], metavar="NAME=DIR", help="finished inversions")
    parser.add_argument(
        "--sent", nargs="*", type=Path, default=[], metavar="DIR", help="finished runs of the preset sent"
    )
    parser.add_argument("--claims", action="store_true", help="read audits/claims")
    chosen = parser.parse_args()
    measured = list(chosen.measured)
    if chosen.claims:
        measured += [f"{name}={CLAIMS / name.removesuffix('.toml')}" for name in AUDITS]
        chosen.accuracy = CLAIMS / "accuracy"
        chosen.frontier += [f"{name}={CLAIMS / name}" for name in FRONTIER_NAMES]
        chosen.inversion += [f"{name}={CLAIMS / name}" for name in INVERSION_NAMES]
    cells, today = load(), datetime.date.today().isoformat()
    if chosen.accuracy:
        keep_accuracy(chosen.accuracy, today)
    for given in chosen.frontier:
        keep_frontier(given.partition("=")[0], Path(given.partition("=")[2]), today)
    if chosen.sent:
        keep_sent(chosen.sent, today)
    for given in chosen.inversion:
        keep_inversion(given.partition("=")[0], Path(given.partition("=")[2]), today)
    for given in measured:
        audit, _, folder = given.partition("=")
        cells = merge(cells, audit, cells_of(audit, json.loads((Path(folder) / "report.json").read_text()), today))
    save(cells)


if __name__ == "__main__":
    main()
