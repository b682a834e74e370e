"""Write the pages that follow from the registries: one for each method, their index, and the table of defenses.

Run by ``make docs`` before mkdocs. It also holds the hand-written pages to the code: every key of the audit file must
be in docs/audit-file.md, every key of ``[invert]`` in docs/inversion.md, every attack, inversion and defense in
README.md, and every source file that a page names must exist.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import keyhole.experiment.audit  # noqa: F401  (fills the registries)
from keyhole.core import registry
from keyhole.core.defense import Defense
from keyhole.core.registry import Card, Registry
from keyhole.experiment.inversion_plan import EvaluatorSection, InvertSection, PublicSection
from keyhole.experiment.spec import Experiment, presets
from keyhole.report.tables import LEVELS

DOCS = Path(__file__).parent
MEASURED = DOCS.parent / "tests" / "claims" / "measured"
PAGES = DOCS / "methods"
SOURCE = Path(keyhole.__file__).parent

KINDS: dict[str, tuple[str, Registry, str]] = {
    "attacks": ("Attacks", registry.ATTACKS, "Named in `[[attacks]]`."),
    "inversions": ("Inversions", registry.INVERSIONS, "Named in `[[invert.attacks]]` of a training file."),
    "defenses": ("Defenses", registry.DEFENSES, "Named in the `chain` of `[[defenses]]`."),
    "labels": ("Label rules", registry.LABELS, "Named in an attack's option `labels`, or for all in `[attacker]`."),
    "controls": ("Controls", registry.CONTROLS, "Run beside every attack, without being asked for."),
    "metrics": ("Metrics", registry.METRICS, "Computed for every image, without being asked for."),
    "models": ("Models", registry.MODELS, "Named in `[model]`; your own come with `factory`."),
    "data": ("Data sets", registry.DATASETS, "Named in `[data]`; your own come as a path or a hub id."),
}
WITH_OPTIONS = ("attacks", "inversions", "defenses", "models")
NOTHING = "-"
FILLED_IN = ("input_shape", "num_classes")
"""Arguments that the runner gives to a model."""


def main() -> None:
    """Write all pages, then check the hand-written ones."""
    for folder, (_, cards, _) in KINDS.items():
        (PAGES / folder).mkdir(parents=True, exist_ok=True)
        for old in (PAGES / folder).glob("*.md"):
            old.unlink()
        for card in cards:
            (PAGES / folder / f"{card.name}.md").write_text(method_page(folder, card))
    (PAGES / "index.md").write_text(index_page())
    (DOCS / "defenses.md").write_text(defenses_page())
    (DOCS / "inversions.md").write_text(inversions_page())
    missing = list(undocumented())
    if missing:
        sys.exit("docs/generate.py: " + "; ".join(missing))


# Pages ----------------------------------------------------------------------------------------------------------------


def index_page() -> str:
    """All methods, with links."""
    lines = [
        "# Methods",
        "",
        "Everything an audit file can name. `keyhole list` and `keyhole show NAME` say the same.",
        "",
    ]
    for folder, (title, cards, hint) in KINDS.items():
        lines += [f"## {title}", "", hint, ""]
        rows = [(f"[`{c.name}`]({folder}/{c.name}.md)", markdown(c.summary), markdown(c.paper)) for c in cards]
        lines += [*table(("name", "what it is", "source"), rows), ""]
    lines += ["## Presets", "", "Audit files that come with Keyhole: `keyhole audit NAME`, `keyhole show NAME`.", ""]
    found = [(f"`{name}`", text.split("\n")[0].lstrip("# ")) for name, text in sorted(presets().items())]
    return "\n".join([*lines, *table(("name", "what it is"), found), ""])


def method_page(folder: str, card: Card) -> str:
    """Card, signature and docstring of one method."""
    body, arguments = split_docstring(inspect.getdoc(card.factory) or "")
    summary, _, rest = body.partition("\n\n")
    lines = [f"# {card.name}", "", markdown(summary), "", f"{card.kind.capitalize()}, version {card.version}."]
    if card.paper or card.link:
        link = f"[{card.link}]({card.link})" if card.link else ""
        lines += ["", f"Source: {'. '.join(part for part in (card.paper, link) if part)}"]
    if card.known_breaks:
        lines += ["", "**Known to break it**", "", *(f"- {text}." for text in card.known_breaks)]
    lines += needs(folder, card)
    if folder in WITH_OPTIONS:
        lines += options(card, arguments)
    if folder == "defenses":
        lines += counters(card)
    if rest.strip():
        lines += ["", "## Details", "", markdown(rest)]
    lines += usage(folder, card)
    return "\n".join([*lines, ""])


def defenses_page() -> str:
    """The table of defenses with their counters and known breaks."""
    rows = [
        (
            f"[`{card.name}`](methods/defenses/{card.name}.md)",
            markdown(card.summary),
            ", ".join(f"`{c.name}`" for c in card.factory().counters()) or "none yet",
            "; ".join(card.known_breaks) or "nothing recorded",
        )
        for card in registry.DEFENSES
    ]
    return "\n".join(
        [
            "# Defenses",
            "",
            "A defense changes the model, the objective, the gradient or the update of a client. Each comes with",
            "*counters*: what an attacker who knows the defense does about it. An audit scores a defense by its worst",
            "attacker, naive or adaptive. A defense without a counter has been tried only against attackers who do",
            "not know it, and the verdict says so.",
            "",
            *table(("name", "what the client does", "counters", "known to break it"), rows),
            "",
            "Known breaks are statements of the method's authors or of this project about settings that were tried.",
            "The strength at which a defense gives way depends on model, data and attack. Measure yours.",
            "",
            "Defenses can follow one another: a `chain` of several applies the first link first. Its adaptive",
            "attackers use one counter of every link at a time.",
            "",
            *measured_cells(),
            *measured_accuracy(),
            *measured_frontiers(),
        ]
    )


def measured_accuracy() -> Iterator[str]:
    """What `keyhole train accuracy` measured of each defense."""
    kept = json.loads((MEASURED / "accuracy.json").read_text())
    yield from ("", "## What they cost", "")
    yield from (
        "Accuracy on held-out digits after 20 rounds with the defense on all ten clients, and the difference to the",
        f"undefended trainings of the same seeds (`keyhole train accuracy`; {trainings_in_words(kept)} each,",
        f"{kept['date']}). Accuracies with the wider of the intervals over trainings and over held-out images. The",
        "same learning rate and number of rounds for all: a defense that only slows training down would catch up with",
        "more rounds.",
        "",
    )
    rows = [(name, interval(one["accuracy"]), signed(one["change"])) for name, one in kept["defenses"].items()]
    yield from table(("defense", "test accuracy", "change in points"), rows)


def trainings_in_words(kept: dict[str, Any]) -> str:
    """How often a training was repeated."""
    return f"{kept['trainings']} training{'s' * (kept['trainings'] != 1)}"


def signed(value: dict[str, float | None]) -> str:
    """A difference of shares in points with its interval, where there is one."""
    return interval(value, "{:+.1f}", unit="")


def measured_frontiers() -> Iterator[str]:
    """What `keyhole frontier` measured of each defense: accuracy beside the worst leak rate, on the same data."""
    kept = MEASURED / "frontiers.json"
    if not kept.exists():
        return
    yield from ("", "## Accuracy against leakage", "")
    yield from (
        "Federated training with the defense on every client, then the worst attacker on updates of untrained and of",
        "trained networks (`keyhole frontier NAME`). Accuracy with the wider of the intervals over trainings and over",
        "held-out images, with one training the latter; leaks with that over images and networks.",
    )
    head = (
        "defense", "test accuracy", "change in points", "images leaked, worst", "at round", "worst attacker",
        "epsilon",
    )  # fmt: skip
    for name, found in json.loads(kept.read_text()).items():
        yield from ("", f"### `{name}`", "", f"{found['date']}.", "")
        yield from table(head, [frontier_line(point) for point in found["points"]])
        if "sent" in found:
            yield from ("", found["sent"])


def frontier_line(point: dict[str, Any]) -> tuple[str, ...]:
    """One defense of a frontier."""
    epsilon = point["epsilon"]
    return (
        point["defense"], interval(point["accuracy"]), signed(point["change"]), interval(point["leak_rate"]),
        NOTHING if point["round"] is None else str(point["round"]),
        f"{point['attack']}, {point['attacker']}" if point["attacker"] else NOTHING,
        NOTHING if epsilon is None else f"{epsilon:.3g}",
    )  # fmt: skip


def inversions_page() -> str:
    """What `keyhole invert` measured, preset by preset."""
    lines = [
        "# Inversions measured",
        "",
        "What `keyhole invert NAME` found with the presets. *Recognised*: the share of images made from the global",
        "network alone that another network takes for the private class they were made to show, with the interval over",
        "federations; how to read it: [Inverting the model](inversion.md).",
    ]
    kept = MEASURED / "inversions.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    head = (
        "defense", "attack", "attacker", "round", "test accuracy", "recognised", "by the target", "diversity", "FID",
        "networks", "seconds",
    )  # fmt: skip
    for name, found in known.items():
        lines += ["", f"## `{name}`", "", f"{found['verdict']} {found['date']}.", ""]
        lines += [f"- {one}" for one in found["assumptions"]]
        lines += ["", *table(head, [inversion_line(row) for row in found["rows"]])]
        for key, title in (("compared", "Against the first attack"), ("matched", "At matched accuracy")):
            if found[key]:
                lines += [
                    "",
                    f"{title}:",
                    "",
                    *table(tuple(found[key][0]), [tuple(row.values()) for row in found[key]]),
                ]
    return "\n".join(lines) + "\n"


def inversion_line(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of an inversion's report."""

    def shown(value: float | None, digits: int = 3) -> str:
        return NOTHING if value is None else f"{value:.{digits}g}"

    return (
        row["defense"], row["attack"], row["attacker"].removeprefix("control:").replace("_", " "), str(row["round"]),
        f"{100 * row['accuracy']:.0f} %", row["failed"] or interval(row["attack_accuracy"]),
        NOTHING if row["target_accuracy"] is None else f"{100 * row['target_accuracy']:.0f} %",
        shown(row["diversity"]), shown(row["fid"]), str(row["networks"]), shown(row["seconds"], 2),
    )  # fmt: skip


def interval(value: dict[str, float | None], form: str = "{:.1f}", unit: str = " %") -> str:
    """A share in hundredths with its interval, where there is one."""
    middle, low, high = (
        None if value[end] is None else form.format(100 * value[end]) for end in ("value", "low", "high")
    )
    if middle is None:
        return NOTHING
    return f"{middle}{unit}" if low is None or high is None else f"{middle}{unit} ({low} to {high})"


def measured_cells() -> Iterator[str]:
    """What the presets' audits measured of every defense under every attack, a table for each setting."""
    cells = json.loads((MEASURED / "cells.json").read_text())
    trained = json.loads((MEASURED / "accuracy.json").read_text())
    accuracy = trained["defenses"]
    yield from ("## Measured", "")
    yield from (
        "Every attack on every defense of the presets below, measured by `make claims`. Share of images leaked, with",
        "the 95 % interval, and median PSNR: by an attacker who does not know the defense, and by the worst of those",
        "who do. *Controls*: the most that guesses without the update leak. *Lift*: mean SSIM of the worst attacker",
        "above the best control. *Client*: seconds for one update when all of a group are worked on together, on one",
        "CPU core. *Bound*: the largest share that any attack could recover, where the mechanism's noise gives one.",
        "*Accuracy on digits*, whatever images the table is about: on held-out digits after 20 rounds of federated",
        f"averaging with that defense on all ten clients, the mean of {trainings_in_words(trained)}",
        "(`keyhole train accuracy`); below, all of them.",
        "A dash: not measured, or there is none. Every defense had the same attack budget.",
        "",
    )
    head = (
        "defense",
        "naive",
        "adaptive, worst",
        "controls",
        "lift",
        "client",
        "bound",
        "accuracy on digits",
        "verdict",
    )
    for place in dict.fromkeys((c["audit"], c["setting"], c["attack"]) for c in cells):
        own = [c for c in cells if (c["audit"], c["setting"], c["attack"]) == place]
        audit, setting, attack = place
        yield f"### `{audit}`{f', {setting}' if setting else ''}: {markdown(attack)}"
        yield ""
        first, most = own[0], max(c["n"] for c in own)
        networks = f"{first['networks']} network{'s' * (first['networks'] != 1)}"
        yield f"{first['task']}, {first['state']}; {most} images, {networks}; {first['date']}."
        yield ""
        yield from table(head, [cell_line(c, accuracy) for c in own])
        yield ""


def cell_line(cell: dict[str, Any], accuracy: dict[str, Any]) -> tuple[str, ...]:
    """One line of a measured table."""

    def attacker(found: dict[str, Any] | None) -> str:
        if found is None:
            return "-"
        rate = found["leak_rate"]
        interval = "{:.0f}-{:.0f}".format(100 * rate["low"], 100 * rate["high"])
        psnr = "" if found["psnr"] is None else f", {found['psnr']:.1f} dB"
        name = found["attacker"].partition(":")[2]
        return f"{100 * rate['value']:.0f} % ({interval}){psnr}" + (f", `{name}`" if name else "")

    lift, known = cell["lift"], accuracy.get(cell["defense"])
    return (
        markdown(cell["defense"]),
        attacker(cell["naive"]),
        attacker(cell["adaptive"]),
        "-" if cell["controls"] is None else f"{100 * cell['controls']:.0f} %",
        "-" if lift["value"] is None else f"{lift['value']:+.2f} ({lift['low']:.2f} to {lift['high']:.2f})",
        "-" if cell["client_seconds"] is None else f"{cell['client_seconds']:.2g} s",
        "-" if cell["bound"] is None else f"{100 * cell['bound']:.0f} %",
        NOTHING if known is None else interval(known["accuracy"]),
        LEVELS[cell["level"]] if cell["defense"] != "none" else "undefended",
    )


# Parts of a page ------------------------------------------------------------------------------------------------------


def options(card: Card, arguments: dict[str, str]) -> Iterator[str]:
    """The table of options: names, types and defaults from the signature, meanings from the docstring."""
    rows = [
        (f"`{name}`", kind(p.annotation), default(p), markdown(arguments.get(name, "")))
        for name, p in card.signature().parameters.items()
        if name not in FILLED_IN
    ]
    yield from ("", "## Options", "")
    yield from table(("option", "type", "default", "meaning"), rows) if rows else ["None."]


def counters(card: Card) -> Iterator[str]:
    """What attackers who know the defense do about it."""
    defense: Defense = card.factory()
    yield from ("", "## Counters", "")
    known = defense.counters()
    if not known:
        yield "None yet: audits try this defense only against attackers who do not know it."
    promise = {
        "zero": "At the true image the matching loss is zero: the self-test `check:truth` applies.",
        "law": "At the true image the matching loss follows the law of the noise.",
        "none": "What the matching loss is at the true image is not known.",
    }
    for counter in known:
        text, _ = split_docstring(inspect.getdoc(type(counter)) or "")
        yield from (f"### {counter.name}", "", markdown(text), "", promise[counter.truth_loss], "")


def needs(folder: str, card: Card) -> Iterator[str]:
    """What an attack or a label rule must see."""
    if folder in ("attacks", "inversions"):
        seen = card.factory().needs
    elif folder == "labels":
        seen = card.facts.get("needs", frozenset())
    else:
        return
    names = ", ".join(f"`{name}`" for name in sorted(seen)) or "nothing"
    yield from ("", f"Must see: {names}{' (with default options)' if folder == 'attacks' else ''}.")


def usage(folder: str, card: Card) -> Iterator[str]:
    """The lines of an audit file that name the method."""
    lines = {
        "attacks": f'[[attacks]]\nname = "{card.name}"',
        "inversions": f'[[invert.attacks]]\nname = "{card.name}"',
        "defenses": f'[[defenses]]\nchain = [{{ name = "{card.name}" }}]',
        "labels": f'[attacker]\nlabels = "{card.name}"',
        "models": f'[model]\nname = "{card.name}"',
        "data": f'[data]\nname = "{card.name}"',
    }
    if folder in lines:
        title = "## In a training file" if folder == "inversions" else "## In an audit file"
        yield from ("", title, "", "```toml", lines[folder], "```")


def kind(annotation: Any) -> str:
    """A type as an audit file's author thinks of it."""
    if choices := get_args(annotation):
        return " or ".join(f"`{show(choice)}`" for choice in choices if choice is not type(None))
    names = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
    return names.get(annotation, f"`{annotation}`")


def default(parameter: inspect.Parameter) -> str:
    """A default value as TOML."""
    return "required" if parameter.default is parameter.empty else f"`{show(parameter.default)}`"


def show(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in cells]


# Docstrings -----------------------------------------------------------------------------------------------------------

SECTION = re.compile(r"^(Args|Returns|Raises):\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A docstring without its arguments, and the arguments; Returns and Raises become paragraphs."""
    arguments: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        title, block = match[1], inspect.cleandoc("\n" + match[2])
        if title == "Returns":
            return f"Returns: {block}\n\n"
        items = re.findall(r"^(\w[\w, ]*): (.*(?:\n(?: +.*)?)*)", block, re.MULTILINE)
        if title == "Raises":
            raised = "".join(f"- `{name}`: {' '.join(meaning.split())}\n" for name, meaning in items)
            return f"Raises:\n\n{raised}\n"
        for names, meaning in items:
            arguments.update({name.strip(): " ".join(meaning.split()) for name in names.split(",")})
        return ""

    return SECTION.sub(replace, text + "\n").strip(), arguments


def markdown(text: str) -> str:
    """Docstring conventions as Markdown: code in single backticks, blocks after a double colon."""
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r"::$", ":", text, flags=re.MULTILINE), flags=re.DOTALL)


# Checks ---------------------------------------------------------------------------------------------------------------


def undocumented() -> Iterator[str]:
    """What the hand-written pages leave out."""
    audit_file = (DOCS / "audit-file.md").read_text()
    for section in ("data", "model", "state", "client", "attacker", "run"):
        for key in Experiment.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            if not re.search(rf"^\| `{key}` \|", audit_file, re.MULTILINE):
                yield f"docs/audit-file.md does not explain '{key}' of [{section}]"
    readme = (DOCS.parent / "README.md").read_text()
    inversion = (DOCS / "inversion.md").read_text()
    for model in (InvertSection, PublicSection, EvaluatorSection):
        for key in model.model_fields:
            if not re.search(rf"^\| `{key}` \|", inversion, re.MULTILINE):
                yield f"docs/inversion.md does not explain '{key}' of {model.__name__}"
    for card in (*registry.ATTACKS, *registry.INVERSIONS, *registry.DEFENSES):
        if f"`{card.name}`" not in readme:
            yield f"README.md does not name the {card.kind} '{card.name}'"
    for page in (*DOCS.glob("*.md"), DOCS.parent / "CONTRIBUTING.md"):
        yield from stale_references(page)


def stale_references(page: Path) -> Iterator[str]:
    """Source files, and names in them, that a page mentions and the package has not."""
    text = " ".join(page.read_text().split())
    for path in sorted(set(re.findall(r"`(\w+/\w+\.py)`", text))):
        if not (SOURCE / path).is_file():
            yield f"{page.name} names {path}, which does not exist"
    pairs = re.findall(r"`(\w+)`(?: and `(\w+)`)? in `(\w+/\w+\.py)`", text)
    for name, path in ((name, path) for *names, path in pairs for name in names if name):
        if (SOURCE / path).is_file() and f"def {name}(" not in (SOURCE / path).read_text():
            yield f"{page.name} names {name} in {path}, which does not define it"


if __name__ == "__main__":
    main()
