"""The report of a transcript's audit: JSON, Markdown and one page of HTML, all readable by the owner alone."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from keyhole.errors import StoreError
from keyhole.experiment.recorded import Findings
from keyhole.experiment.recorded_attack import Attempt
from keyhole.experiment.recorded_work import Finding
from keyhole.report.groups import LEAK_MARGIN, LEAK_SSIM, SLACK
from keyhole.solve.files import make_folder, tensors_as_bytes, write_whole

HEAD = (
    "round",
    "client",
    "images",
    "steps",
    "prediction",
    "attack",
    "attacker",
    "status",
    "score",
    "SSIM (noise)",
    "leaked",
)

NOTE = (
    "Score: the attack's own distance between the update and what its images would have caused; 0 explains all of it. "
    "SSIM: mean similarity to the private images, paired one to one, and in brackets that of what the same attack "
    f"makes of noise in place of the update. Leaked: images with an SSIM of at least {LEAK_SSIM:g} that is at least "
    f"{LEAK_MARGIN:g} above that of noise for the same image. Status: how the search ended."
)

PICTURES = 16
"""Images of one attack on the page."""


def leaks(attempt: Attempt) -> list[bool]:
    """Of each secret image, whether it leaked."""
    return leaked(attempt.metrics, attempt.control)


def leaked(metrics: dict[str, list[float]], control: dict[str, list[float]]) -> list[bool]:
    """The same from scores: similar enough, and more so than what the attack makes of noise."""
    pairs = zip(metrics.get("ssim", []), control.get("ssim", []), strict=True)
    return [own >= LEAK_SSIM - SLACK and own >= blind + LEAK_MARGIN - SLACK for own, blind in pairs]


def as_dict(findings: Findings) -> dict[str, Any]:
    """For ``report.json``."""
    return {
        "kind": "transcript",
        "model": findings.model,
        "strategy": findings.about.get("strategy"),
        "stopped": findings.about.get("stopped"),
        "recorded": findings.recorded,
        "without_update": list(findings.missing),
        "missing_rounds": [list(gap) for gap in findings.gaps],
        "without_secrets": list(findings.unscored),
        "view": "sum over clients" if findings.known.sum else "each client",
        "updates": [_update(one) for one in findings.found],
    }


def _update(one: Finding) -> dict[str, Any]:
    return {
        "round": one.update.round,
        "client": one.update.client,
        "images": one.training.images,
        "steps": one.training.steps,
        "training": list(one.training.words),
        "prediction": {"verdict": one.verdict, "reasons": [reason._asdict() for reason in one.reasons]},
        "attacks": [_attack(attempt) for attempt in one.attempts],
    }


def _attack(one: Attempt) -> dict[str, Any]:
    judged = leaks(one)
    return {
        "attack": one.attack,
        "attacker": one.attacker,
        "status": one.status,
        "detail": one.detail,
        "score": None if math.isnan(one.score) else one.score,
        "explains_update": one.explains,
        "explained_up_to": one.explained_up_to,
        "evaluations": one.evaluations,
        "labels": list(one.labels),
        "metrics": one.metrics,
        "control": one.control,
        "leak_rate": sum(judged) / len(judged) if judged else None,
    }


def conclusion(findings: Findings) -> str:
    """The result in a few sentences, what leaked first."""
    said = [_leaked_in_words(findings)] if any(one.truth is not None for one in findings.found) else []
    answers = [explains(one) for one in findings.found]
    explained, unknown = answers.count(True), answers.count(None)
    judged = len(answers) - unknown
    if judged:
        how = ": images were found that would have caused (nearly) the same update" if explained else ""
        said.append(f"{explained} of {judged} attacked update{'s' * (judged != 1)} explained{how}.")
    if unknown:
        said.append(
            f"Of {unknown} attacked update{'s' * (unknown != 1)} the attacks' own score tells nothing: after a defense "
            "or several steps, or where it is only assumed how the client trained, the true images would not score 0 "
            "either, and a refused attack has no score."
        )
    if explained < judged:
        said.append("What is not explained is not safe for that: what was found may still resemble the images.")
    if all(one.truth is None for one in findings.found):
        said.append(_leaked_in_words(findings))
    return " ".join(said)


def _leaked_in_words(findings: Findings) -> str:
    scored = [one for one in findings.found if one.truth is not None]
    if scored:
        worst = [max((sum(leaks(a)) for a in one.attempts), default=0) for one in scored]
        images = sum(len(one.truth) for one in scored if one.truth is not None)
        return f"{sum(worst)} of {images} private images leaked to the best attack on each update."
    if findings.unscored:
        return "Nothing was scored: the folder of secrets has none of these clients and rounds."
    return "What leaked only the secrets of a test run can tell (--secrets)."


def explains(one: Finding) -> bool | None:
    """Whether any attack explains the update; `None` where no score can tell."""
    said = [attempt.explains for attempt in one.attempts]
    return True if True in said else False if False in said else None


def lines(findings: Findings) -> list[tuple[str, ...]]:
    """A table: one line for each attack on each update, after its head."""
    table: list[tuple[str, ...]] = [HEAD]
    for one in findings.found:
        for attempt in one.attempts:
            ssim, judged = attempt.metrics.get("ssim", []), leaks(attempt)
            table.append(
                (
                    str(one.update.round),
                    one.update.client,
                    str(one.training.images),
                    str(one.training.steps),
                    one.verdict,
                    attempt.attack,
                    attempt.attacker,
                    attempt.status,
                    f"{attempt.score:.2g}",
                    f"{np.mean(ssim):.2f} ({np.mean(attempt.control['ssim']):.2f})" if ssim else "-",
                    f"{sum(judged)} of {len(judged)}" if judged else "-",
                )
            )
    return table


def remarks(findings: Findings) -> list[str]:
    """What the table does not say: clients without an update, why recording stopped, what attacks say of themselves."""
    said = [f"Not attacked: {text}" for text in findings.missing]
    if findings.gaps:
        several = "s" * (len(findings.gaps) > 1 or findings.gaps[0][0] < findings.gaps[0][1])
        numbers = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in findings.gaps)
        said.append(f"Not in the transcript, though later rounds are: round{several} {numbers}.")
    said += [f"Not scored: {name}, of which the folder of secrets has nothing." for name in findings.unscored]
    if "stopped" in findings.about:
        said.append(f"Recording stopped early: {findings.about['stopped']}")
    return said + [
        f"{_title(one)}, {attempt.attack}, {attempt.attacker}: {attempt.detail}"
        for one in findings.found
        for attempt in one.attempts
        if attempt.detail
    ]


def told(findings: Findings) -> list[str]:
    """How the clients trained, a line for each update."""
    return [f"{_title(one)}: {'; '.join(one.training.words)}." for one in findings.found]


def _title(one: Finding) -> str:
    return one.update.name[0].upper() + one.update.name[1:]


def _markdown(findings: Findings) -> str:
    head, *rows = lines(findings)
    table = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    known = [
        f"- {_title(one)}: {'; '.join(one.training.words)}."
        + "".join(f"\n    - {reason.text}" for reason in one.reasons)
        for one in findings.found
    ]
    notes = [f"- {text}" for text in remarks(findings)]
    parts = ["# Transcript audited", conclusion(findings), *table, "", NOTE, "", "## How the clients trained", *known]
    return "\n".join([parts[0], "", parts[1], "", *parts[2:], *(["", "## Remarks", *notes] if notes else []), ""])


def _html(findings: Findings) -> str:
    from keyhole.report import figures

    def strip(title: str, images: Any) -> str:
        shown = "".join(f'<img src="{figures.picture(image.numpy())}" width="64">' for image in images[:PICTURES])
        return f"<p>{escape(title)}<br>{shown}</p>"

    head, *rows = lines(findings)
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    body = [
        "<h1>Transcript audited</h1>",
        f"<p>{escape(conclusion(findings))}</p>",
        f"<p>{escape(NOTE)}</p>",
        f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{cells}</table>",
    ]
    for one in findings.found:
        body.append(f"<h2>{escape(_title(one))}</h2>")
        body.append(f"<p>{escape('; '.join(one.training.words))}.</p>")
        body.append(f"<p>Prediction: {escape(one.verdict)}. {escape(' '.join(r.text for r in one.reasons))}</p>")
        if one.truth is not None:
            body.append(strip("Secret", one.truth))
        body += [strip(f"{a.attack}, {a.attacker}", a.guesses) for a in one.attempts if len(a.guesses)]
    if said := remarks(findings):
        body.append(f"<h2>Remarks</h2><ul>{''.join(f'<li>{escape(text)}</li>' for text in said)}</ul>")
    style = (
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:left}"
        "img{image-rendering:pixelated;margin:0 3px 3px 0}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Transcript audited</title>'
        f"<style>{style}</style>{''.join(body)}</html>"
    )


def write_recorded(findings: Findings, folder: Path) -> Path:
    """Write ``report.json``, ``report.md``, ``report.html`` and the images found; returns the page's path."""
    images = {
        f"round-{one.update.round}/{one.update.client}/{a.attack}/{a.attacker}": a.guesses.float()
        for one in findings.found
        for a in one.attempts
    }
    try:
        make_folder(folder)
        write_whole(folder / "reconstructions.safetensors", tensors_as_bytes(images))
        write_whole(folder / "report.json", (json.dumps(as_dict(findings), indent=1) + "\n").encode())
        write_whole(folder / "report.md", _markdown(findings).encode())
        write_whole(folder / "report.html", _html(findings).encode())
    except OSError as error:
        raise StoreError(f"cannot write to the output folder '{folder}': {error.strerror}.") from error
    return folder / "report.html"
