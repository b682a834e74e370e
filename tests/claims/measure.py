"""Re-measure the claim cards: run what each names, write what came out back into it, and render docs/claims.md.

A claim that is not met stays, marked as unmet. Run by `make claims`; audits resume where they stopped.

    python tests/claims/measure.py [--only NAME ...] [--from AUDIT=DIR ...] [--render]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from keyhole.experiment.store import Store
from keyhole.report.intervals import spread
from keyhole.report.inversion_summary import difference
from keyhole.report.summarize import summarize
from keyhole.report.write import read_audit

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "claims.md"


def cards() -> dict[str, dict[str, Any]]:
    """All cards by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}


BARS = {"at_least": "at least", "at_most": "at most", "low_at_least": "interval from"}


def is_met(card: dict[str, Any]) -> bool | None:
    """Whether the measured value keeps the claim; `None` where nothing was measured or no bar is set."""
    measured, claimed = card.get("measured"), card["claimed"]
    if measured is None or claimed is None:
        return None
    if "low_at_least" in claimed and not (card["interval"] and card["interval"][0] >= claimed["low_at_least"]):
        return False
    return bool(claimed.get("at_least", float("-inf")) <= measured <= claimed.get("at_most", float("inf")))


Report = dict[str, Any]


def report_of(audit_name: str, folder: Path | None) -> tuple[Report, Path]:
    """Run an audit, or take the finished one in ``folder``; its report, and where it is."""
    source = str(HERE / audit_name) if audit_name.endswith(".toml") else audit_name
    command = [sys.executable, "-c", "from keyhole.cli import main; main()"]
    if folder is None:
        folder = ROOT / "audits" / "claims" / audit_name.removesuffix(".toml")
        subprocess.run([*command, "audit", source, "--out", str(folder)], check=True)
    settings, outcomes = read_audit(folder)  # the numbers alone: a page of many cells takes long to draw
    report = summarize(settings, outcomes).asdict()
    if not report["complete"]:
        raise SystemExit(f"the audit in {folder} is not complete; run it to the end first")
    return dict(report), folder


def measure_report(how: dict[str, Any], report: Report, folder: Path) -> tuple[float, list[float] | None]:
    """A number and its interval from a report.

    ``how`` names what to read: ``kind``, the fields that pick the row or the comparison (``setting``, ``defense``,
    ``attack``, ``attacker``, ``against``), and the ``value`` in it.
    """
    rows = report["rows"]
    if how["kind"] == "row":
        return number(pick(rows, how)[how["value"]])
    if how["kind"] == "comparison":
        return number(pick(report["comparisons"], how)[how["value"]])
    if how["kind"] == "change":  # of one attack's mean to that of the one it is compared with, in percent
        # A report compares the earlier of two attacks with the later one; a card may ask for the other way round.
        names = {(one["attack"], one["against"]) for one in report["comparisons"]}
        turned = (how["attack"], how["against"]) not in names
        asked = {**how, "attack": how["against"], "against": how["attack"]} if turned else how
        sides = pick(report["comparisons"], asked)[how["value"]]
        new, old = reversed(sides) if turned else sides
        return 100.0 * (new / old - 1.0), None
    if how["kind"] == "difference":  # of the best of some rows to the best of others
        best, other = (
            max(number(pick(rows, fields)[how["value"]])[0] for fields in how[side]) for side in ("of", "to")
        )
        return best - other, None
    if how["kind"] == "highest_control":
        controls = [r for r in rows if r["attacker"].startswith("control:")]
        return number(max(controls, key=lambda r: r[how["value"]]["value"])[how["value"]])
    if how["kind"] == "median_over_best_control":
        return paired_with_best_control(how, folder)
    raise SystemExit(f"unknown kind of measurement '{how['kind']}'")


def pick(entries: list[dict[str, Any]], how: dict[str, Any]) -> dict[str, Any]:
    """The one entry that has what ``how`` says."""
    fields = {f: how[f] for f in ("setting", "defense", "attack", "attacker", "against", "round") if f in how}
    found = [e for e in entries if all(e.get(field) == wanted for field, wanted in fields.items())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} entries of the report have {fields}; one is needed")
    return found[0]


def number(cell: Any) -> tuple[float, list[float] | None]:
    """A cell of a report as a number with its interval."""
    if not isinstance(cell, dict):
        return float(cell), None
    value = cell["median"] if "median" in cell else cell["value"]
    return value, None if cell["low"] is None else [cell["low"], cell["high"]]


def points_of(verb: str, source: str, folder: Path | None) -> list[dict[str, Any]]:
    """What ``keyhole train``, ``frontier`` or ``invert`` says of each row, run here or taken from ``folder``."""
    name = str(HERE / source) if source.endswith(".toml") else source
    if folder is None:
        folder = ROOT / "audits" / "claims" / source.removesuffix(".toml")
        command = [sys.executable, "-c", "from keyhole.cli import main; main()", verb, name, "--out", str(folder)]
        subprocess.run(command, check=True)
    file, key = {
        "train": ("train.json", "summary"), "frontier": ("report.json", "points"), "invert": ("report.json", "rows")
    }[verb]  # fmt: skip
    return list(json.loads((folder / file).read_text())[key])


def paired_with_best_control(how: dict[str, Any], folder: Path) -> tuple[float, list[float]]:
    """Median over images of an attack's metric less the best control's for that image, with a bootstrap interval."""
    attack: dict[tuple[int, int], float] = {}
    control: dict[tuple[int, int], float] = {}
    for outcome in Store(folder).outcomes().values():
        trial = outcome.trial
        if trial.pool != "target" or trial.defense:
            continue
        for row, value in zip(trial.episode, outcome.metrics[how["value"]], strict=True):
            key = (trial.seed, row)
            if trial.attacker == how["attacker"]:
                attack[key] = value
            elif trial.attacker.startswith("control:"):
                control[key] = max(value, control.get(key, float("-inf")))
    seeds, images = sorted({seed for seed, _ in attack}), sorted({row for _, row in attack})
    differences = np.array([[attack[s, r] - control[s, r] for r in images] for s in seeds])
    found = spread(differences)
    return found.median, [found.low, found.high]


def paired_by_network(how: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """One row less another on the same networks, on average, with its 95 % interval over networks."""
    one, other = (pick(rows, how[side])[how["value"]] for side in ("of", "to"))
    found = difference([one[seed] - other[seed] for seed in one])
    return found.value, [found.low, found.high]


def run_benchmark(script: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """A benchmark's figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json", str(path)]
        subprocess.run(command, check=True)
        return dict(json.loads(path.read_text()))


def dig(figures: Any, path: str | list[str]) -> Any:
    """The value at a path, dotted or in parts where names have dots."""
    for part in path.split(".") if isinstance(path, str) else path:
        figures = figures[part]
    return figures


def render(all_cards: dict[str, dict[str, Any]]) -> str:
    """docs/claims.md."""
    lines = [
        "# Claims",
        "",
        "What Keyhole says of itself, what was measured, and when. `make claims` measures all of it again;",
        "claims that are not met stay here. Each card is a file in `tests/claims/`.",
        "",
        "| claim | bar | measured (95 % interval) | met | date |",
        "|---|---|---|---|---|",
    ]
    for card in all_cards.values():
        bar = (
            "shown" if card["claimed"] is None else " and ".join(f"{BARS[k]} {v:g}" for k, v in card["claimed"].items())
        )
        value = "not yet measured" if card.get("measured") is None else f"{card['measured']:.3g}"
        if card.get("interval"):
            value += " ({:.3g} to {:.3g})".format(*card["interval"])
        met = {True: "yes", False: "**no**", None: "-"}[is_met(card)]
        lines.append(f"| {card['statement']} | {bar} | {value} | {met} | {card.get('date') or '-'} |")
    lines += ["", "Settings:", ""]
    settings = {card["setting"]: card.get("paper", "") for card in all_cards.values()}
    lines += [f"- {setting}" + (f" After {paper}." if paper else "") for setting, paper in settings.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Re-measure the claim cards.")
    parser.add_argument("--only", nargs="*", help="names of cards")
    parser.add_argument("--from", nargs="*", default=[], dest="folders", help="AUDIT=DIR of finished audits")
    parser.add_argument("--render", action="store_true", help="only write docs/claims.md from the cards")
    chosen = parser.parse_args()
    everything = cards()
    if not chosen.render:
        folders = dict(pair.split("=", 1) for pair in chosen.folders)
        reports: dict[str, tuple[Report, Path]] = {}
        figures: dict[tuple[str, ...], dict[str, Any]] = {}
        points: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for name, card in everything.items():
            if chosen.only and name not in chosen.only:
                continue
            how = card["measure"]
            if how["kind"] == "benchmark":
                run = (how.get("script", "lifted.py"), *how.get("arguments", ()))
                figures[run] = figures.get(run) or run_benchmark(run[0], run[1:])
                card["measured"], card["interval"] = number(dig(figures[run], how["value"]))
            elif how["kind"] in ("train", "frontier", "invert", "invert_difference"):
                own = (how["kind"].removesuffix("_difference"), how["file"])
                if own not in points:
                    points[own] = points_of(*own, Path(folders[how["file"]]) if how["file"] in folders else None)
                if how["kind"] == "invert_difference":
                    card["measured"], card["interval"] = paired_by_network(how, points[own])
                else:
                    card["measured"], card["interval"] = number(pick(points[own], how)[how["value"]])
            else:
                audit = how["audit"]
                if audit not in reports:
                    reports[audit] = report_of(audit, Path(folders[audit]) if audit in folders else None)
                card["measured"], card["interval"] = measure_report(how, *reports[audit])
            card["date"] = datetime.date.today().isoformat()
            (HERE / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
            print(f"{name}: {card['measured']:.4g}, met: {is_met(card)}")
    PAGE.write_text(render(everything))


if __name__ == "__main__":
    main()
