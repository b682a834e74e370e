"""The report without pictures, for a pull request or a wiki."""

from __future__ import annotations

from collections.abc import Sequence

from keyhole.report import details
from keyhole.report.sentence import labels_alone
from keyhole.report.summarize import Report
from keyhole.report.tables import LABELS_NOTE, LEAK_NOTE, SOLVED_NOTE, leak_table, overview_table, shows_success


def render_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# Keyhole: {_escaped(report.title)}" if report.title else "# Keyhole", f"**{_escaped(report.verdict)}**"]
    if report.several:
        parts.append("## Settings\n\n" + _table(overview_table(report)))
    if report.rows:
        first = report.rows[0]
        if not report.several:
            parts.append(f"{_escaped(first.task)}; {_escaped(first.state)}. Threat: {_escaped(first.threat)}.")
        alone = labels_alone(report.rows)
        parts.append(f"## {'Labels' if alone else 'Leaks'}\n\n" + _table(leak_table(report)))
        parts.append((LABELS_NOTE if alone else LEAK_NOTE) + (f" {SOLVED_NOTE}" if shows_success(report) else ""))
    if report.strengths:
        parts.append("## Weakest strength that held\n\n" + _table(details.strengths_table(report)))
        parts.append(details.HELD_NOTE)
    if report.layers:
        said = [
            f"- {_escaped(f'{name}: ' if report.several else '')}{_escaped(text)}"
            for name, text in report.advice.items()
        ]
        parts.append("## Which layers to leave out\n\n" + "\n".join(said))
        parts.append(_table(details.layers_table(report, report.layers)))
    for title, note, lines in (
        ("Does knowing the defense help?", details.KNOWLEDGE_NOTE, details.knowledge_table(report)),
        ("What the defenses did", details.NOTES_NOTE, details.notes_table(report)),
        ("Bounds", details.BOUNDS_NOTE, details.bounds_table(report)),
        ("Certificates", details.CERTIFICATES_NOTE, details.certificates_table(report)),
        ("Settings compared", details.SETTINGS_NOTE, details.settings_table(report)),
        ("Variants of one attack compared", details.VARIANTS_NOTE, details.variants_table(report)),
    ):
        if len(lines) > 1:
            parts.append(f"## {title}\n\n{note}\n\n{_table(lines)}")
    if report.rows:
        parts.append("## Budget\n\n" + _table(details.spent_table(report)))
    if report.versions:
        listed = "\n".join(f"- {_escaped(name)} {_escaped(version)}" for name, version in report.versions.items())
        parts.append(f"## Versions\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, without markup or raw HTML."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text


def _table(lines: Sequence[Sequence[str]]) -> str:
    return markdown_table([[_escaped(value) for value in line] for line in lines])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table of text that is Markdown already."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
