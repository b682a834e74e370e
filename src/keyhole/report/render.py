"""A report as one HTML page.

The page is one file without scripts or outside resources, so that it can be mailed and archived. jinja2 and matplotlib
are imported when a page is asked for: the rest of a report needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keyhole.core.trial import Outcome
from keyhole.errors import KeyholeError
from keyhole.report import details
from keyhole.report.grid import grid
from keyhole.report.groups import LEAK_MARGIN, LEAK_SSIM, Group, collect
from keyhole.report.meaning import meaning, notes, shared_sentences, troubles
from keyhole.report.records import Images, Setting
from keyhole.report.sentence import labels_alone
from keyhole.report.summarize import NEAR_SSIM, Report
from keyhole.report.tables import (
    LABELS_NOTE,
    LEAK_NOTE,
    SOLVED_NOTE,
    overview_table,
    shows_success,
)
from keyhole.report.verdict import FELL_FROM, NOT_BROKEN_UP_TO, percent

OPEN_SETTINGS = 3
"""Settings whose section is open when the page is; the others unfold."""


def render_html(
    report: Report,
    settings: Sequence[Setting] | Setting,
    outcomes: Sequence[Outcome],
    images: Images | None,
    frontier: dict[str, Any] | None = None,
) -> str:
    """The whole report as one page.

    Args:
        report: what `summarize` made of the outcomes.
        settings: the same settings.
        outcomes: the same outcomes, for curves, histories and pictures.
        images: pictures that the run stored; `None` where it stored none.
        frontier: what `keyhole.report.frontier` shows of accuracy; `None` for an audit alone.

    Returns:
        HTML that refers to no other file.
    """
    templates = environment()
    from keyhole.report.strips import PICTURES

    settings = [settings] if isinstance(settings, Setting) else list(settings)
    groups = collect(settings, outcomes)
    assumed, own_assumptions = shared_sentences(settings, (setting.assumptions for setting in settings))
    spent, own_budgets = shared_sentences(settings, (setting.budget for setting in settings))
    views = [
        {**_view(report, setting, groups, images), "assumptions": sentences, "open": i < OPEN_SETTINGS}
        for i, (setting, sentences) in enumerate(zip(settings, own_assumptions, strict=True))
    ]
    page: str = templates.get_template("report.html.j2").render(
        report=report,
        frontier=frontier,
        title=settings[0].title,
        views=views,
        alone=labels_alone(report.rows),
        meaning=meaning(report),
        assumptions=assumed,
        overview=overview_table(report),
        stored=images is not None,
        secrets_stored=images is not None and images.secrets is not None,
        metrics=details.metrics_table(report),
        notes=notes(report),
        strengths=details.strengths_table(report),
        knowledge=details.knowledge_table(report),
        noted=details.notes_table(report),
        bounds=details.bounds_table(report),
        certificates=details.certificates_table(report),
        compared=details.settings_table(report),
        variants=details.variants_table(report),
        budgets=[*spent, *_by_setting(report, settings, own_budgets)],
        spent=details.spent_table(report),
        troubles=troubles(groups, report.several),
        words={
            "leak": (LABELS_NOTE if labels_alone(report.rows) else LEAK_NOTE)
            + (f" {SOLVED_NOTE}" if shows_success(report) else ""),
            "held": details.HELD_NOTE,
            "knowledge": details.KNOWLEDGE_NOTE,
            "noted": details.NOTES_NOTE,
            "bounds": details.BOUNDS_NOTE,
            "certificates": details.CERTIFICATES_NOTE,
            "compared": details.SETTINGS_NOTE,
            "variants": details.VARIANTS_NOTE,
        },
        constants={
            "ssim": LEAK_SSIM,
            "margin": LEAK_MARGIN,
            "near": NEAR_SSIM,
            "low": percent(NOT_BROKEN_UP_TO),
            "high": percent(FELL_FROM),
            "pictures": PICTURES,
        },
    )
    return page


def environment() -> Any:
    """The templates of pages, a `jinja2.Environment`.

    Raises:
        KeyholeError: what pages need is not installed.
    """
    try:
        import jinja2

        import keyhole.report.figures  # noqa: F401  (all pages have figures)
    except ImportError as error:
        raise KeyholeError(
            f"the HTML report needs {error.name}; install it with `pip install keyhole[report]`."
        ) from error
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"breakable": _breakable, "stacked": _stacked, "headline": _headline}
    return env


def _view(report: Report, setting: Setting, groups: Sequence[Group], images: Images | None) -> dict[str, Any]:
    """What the page shows of one setting."""
    from keyhole.report.strips import panels

    rows = [row for row in report.rows if row.setting == setting.name]
    layers = [line for line in report.layers if line.setting == setting.name]
    table = details.layers_table(report, layers)
    return {
        "setting": setting,
        "grid": grid(rows, layers, shows_success(report)),
        "panels": panels([group for group in groups if group.setting == setting.name], images),
        # The section is the setting's own, so that its name need not stand in each line.
        "layers": [line[1:] for line in table] if report.several else table,
        "advice": report.advice.get(setting.name, ""),
    }


def _by_setting(report: Report, settings: Sequence[Setting], own: Sequence[Sequence[str]]) -> list[str]:
    """Sentences of settings, under their names where there are several."""
    if not report.several:
        return [said for sentences in own for said in sentences]
    return [f"{setting.name}: {' '.join(said)}" for setting, said in zip(settings, own, strict=True) if said]


def _headline(text: str) -> str:
    """A column's name with a capital, but for those that are a letter; percentages stay in one piece."""
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    return text[0].upper() + text[1:] if len(text) > 1 else text


def _breakable(text: str) -> str:
    """A name that a narrow column may break before its options, rather than anywhere."""
    from markupsafe import Markup, escape

    # Not in front of what a space already sets apart, such as an interval.
    return Markup(re.sub(r"(?<! )\(", "(<wbr>", str(escape(text))))


def _stacked(text: str) -> str:
    """A number with what stands in brackets behind it on a line of its own."""
    from markupsafe import Markup

    value, _, rest = text.partition(" (")
    return Markup("{}<br><small>{}</small>").format(value, rest.rstrip(")")) if rest else value
