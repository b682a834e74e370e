"""Read an audit's folder, summarise it, and write the report beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keyhole.core.trial import Outcome
from keyhole.errors import StoreError
from keyhole.experiment.audit import SETTING
from keyhole.experiment.store import Store
from keyhole.report.markdown import render_markdown
from keyhole.report.records import Images
from keyhole.report.render import render_html
from keyhole.report.summarize import Report, Setting, summarize


def read_audit(folder: Path) -> tuple[list[Setting], list[Outcome]]:
    """What an audit's folder says of the experiment, setting by setting, and its outcomes so far.

    Raises:
        StoreError: the folder holds no audit, or a damaged one.
    """
    path = folder / SETTING
    if not path.exists():
        raise StoreError(
            f"'{folder}' holds no audit that began its attacks (there is no {SETTING} in it); name the --out of one."
        )
    try:
        raw = json.loads(path.read_text())
        settings = [_setting(one) for one in raw.get("settings", [raw])]  # a lone one was once written by itself
        if not settings or len({setting.name for setting in settings}) < len(settings):
            raise ValueError("it needs settings with names of their own")
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"'{path}' is damaged ({error}); run the audit again to have it written anew.") from error
    return settings, list(Store(folder).outcomes().values())


def _setting(raw: dict[str, Any]) -> Setting:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Setting(**fields)


def write_report(folder: Path) -> tuple[Report, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``; returns the report and the page's path."""
    settings, outcomes = read_audit(folder)
    report = summarize(settings, outcomes)
    store = Store(folder)
    reconstructions, secrets = store.images()
    images = Images(secrets, reconstructions) if reconstructions else None
    store.write_text("report.json", report.to_json())
    store.write_text("report.md", render_markdown(report))
    return report, store.write_text("report.html", render_html(report, settings, outcomes, images))
