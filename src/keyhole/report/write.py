"""Read an audit's folder, summarise it, and write the report beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keyhole.core.trial import Outcome
from keyhole.errors import StoreError
from keyhole.experiment.audit import SETTING
from keyhole.experiment.store import Store
from keyhole.report.render import Images, render_html, render_markdown
from keyhole.report.summarize import Report, Setting, summarize


def read_audit(folder: Path) -> tuple[Setting, list[Outcome]]:
    """What an audit's folder says of the experiment, and its outcomes so far.

    Raises:
        StoreError: the folder holds no audit, or a damaged one.
    """
    path = folder / SETTING
    if not path.exists():
        raise StoreError(f"'{folder}' holds no audit that began its attacks (there is no {SETTING} in it).")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        setting = Setting(**fields)
    except (ValueError, TypeError) as error:
        raise StoreError(f"'{path}' is damaged ({error}); run the audit again to have it written anew.") from error
    return setting, list(Store(folder).outcomes().values())


def write_report(folder: Path) -> tuple[Report, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``; returns the report and the page's path."""
    setting, outcomes = read_audit(folder)
    report = summarize(setting, outcomes)
    store = Store(folder)
    reconstructions, secrets = store.images()
    images = Images(secrets, reconstructions) if reconstructions else None
    store.write_text("report.json", report.to_json())
    store.write_text("report.md", render_markdown(report))
    return report, store.write_text("report.html", render_html(report, setting, outcomes, images))
