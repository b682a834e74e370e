"""A report of model inversions as Markdown and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keyhole.core.registry import INVERSIONS
from keyhole.experiment.audit import versions
from keyhole.experiment.inversion_judge import ATTACK, Inversions
from keyhole.report.intervals import Estimate
from keyhole.report.inversion_sentences import NETWORKS, assumptions, note, verdict
from keyhole.report.inversion_summary import Cell
from keyhole.report.inversion_tables import compared, matched, overview, table
from keyhole.report.markdown import markdown_table
from keyhole.report.names import defense_name, spec_names
from keyhole.report.render import environment
from keyhole.report.tables import Line


def render_markdown(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> str:
    """The report as Markdown."""

    def block(title: str, rows: Sequence[Line]) -> list[str]:
        if len(rows) < 2:
            return []
        return ["", f"## {title}", "", markdown_table(rows)]

    parts = [
        f"# {found.plan.title}", "", verdict(lines), "", *(f"- {one}" for one in assumptions(found)),
        *block("Rounds", table(lines)), "", note(found), *block("Attacks compared", compared(lines)),
        *block("At matched accuracy", matched(lines)), *block("Update and network", both),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def render_html(found: Inversions, lines: Sequence[Cell], both: Sequence[Line]) -> str:
    """The report as one page."""
    templates = environment()
    from keyhole.report import figures

    attacks = [c for c in lines if c.is_attack and c.by_seed]
    curves = []
    for defense, attack in dict.fromkeys((c.defense, c.attack) for c in attacks):
        own = sorted((c for c in attacks if (c.defense, c.attack) == (defense, attack)), key=lambda c: c.round)
        name = attack if defense == "none" else f"{attack}, {defense}"
        curves.append((name, own))
    several = len({c.round for c in attacks}) > 1
    recognised = "images recognised, %"
    page: str = templates.get_template("inversion.html.j2").render(
        title=found.plan.title,
        verdict=verdict(lines),
        assumptions=assumptions(found),
        note=note(found),
        overview=overview(lines),
        table=table(lines),
        compared=compared(lines),
        matched=matched(lines),
        both=both,
        by_round=figures.leaks_by_round(
            [(name, [(c.round, c.attack_accuracy) for c in own]) for name, own in curves],
            x="rounds of training", y=recognised,
        )
        if several
        else None,
        by_accuracy=figures.trade_off(
            [(f"{name}, round {c.round}", Estimate(c.accuracy), c.attack_accuracy) for name, o in curves for c in o],
            x=recognised,
        )
        if attacks
        else None,
        grids=_grids(found),
        networks=NETWORKS,
        versions=versions(),
    )  # fmt: skip
    return page


def _grids(found: Inversions) -> list[dict[str, Any]]:
    """For each defense and attack of the first seed: a grid a round, classes downwards, beside its controls."""
    from keyhole.report import figures

    if not found.inverting.settings.images:
        return []
    names = spec_names(found.inverting.attacks, INVERSIONS)
    seed = found.plan.run.seeds[0]
    groups = []
    for index, specs in enumerate(found.plan.defenses):
        for spec in found.inverting.attacks:
            shown = []
            for (i, s, when, own, attacker), images in sorted(
                found.pictures.items(), key=lambda item: (item[0][4] != ATTACK, item[0][2])
            ):
                if (i, s, own) != (index, seed, spec):
                    continue
                if attacker == ATTACK:
                    shown.append((f"round {when}", images))
                elif when == found.inverting.rounds[-1]:
                    shown.append((attacker, images))
            if not shown:
                continue
            if found.private is not None:
                shown.insert(0, ("private images", found.private))
            groups.append(
                {
                    "title": f"{names[spec]}, {'no defense' if not specs else defense_name(specs)}",
                    "grids": [{"name": name, "src": figures.mosaic(images.numpy())} for name, images in shown],
                }
            )
    return groups
