"""What clients themselves sent in a frontier's trainings, in words and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyhole.errors import StoreError, cause
from keyhole.experiment.sent_updates import FILE, FOLDER, PICTURES
from keyhole.report.groups import LEAK_MARGIN, LEAK_SSIM
from keyhole.report.names import UNDEFENDED
from keyhole.report.recorded import leaked
from keyhole.report.tables import Line
from keyhole.report.text import NOTHING

NOTE = (
    "Each update as the server got it, whatever is behind it. Attackers know learning rate, epochs and batch size, "
    "but no order of images; some know the defense, too. Leaked: to the attacker who recovered most of each update, "
    f"with an SSIM of at least {LEAK_SSIM:g} and at least {LEAK_MARGIN:g} above the best guess without the update: "
    "what the same attack makes of noise of the same size, or the mean public image of the image's class. Best SSIM: "
    "of any image, to that attacker; beside it the best of these guesses."
)
HEAD = (
    "defense", "sent in round", "behind an update", "prediction", "worst attacker", "leaked", "best SSIM",
    "best SSIM of guesses", "labels recovered",
)  # fmt: skip


@dataclass(frozen=True)
class Attacked:
    """The worst attack on one update."""

    attack: dict[str, Any]
    guesses: list[float]
    """SSIM of the best guess for each image that does without the update; empty where the attack was not scored."""

    @property
    def leaked(self) -> list[bool]:
        """Of each image."""
        return leaked(self.attack["metrics"], {"ssim": self.guesses})

    @property
    def leaks(self) -> int:
        """How many of them."""
        return sum(self.leaked)

    @property
    def attacker(self) -> str:
        """With the attack's name."""
        return f"{self.attack['attack']}, {self.attack['attacker']}"

    @property
    def ssim(self) -> list[float]:
        """Of each image."""
        found: list[float] = self.attack["metrics"].get("ssim", [])
        return found


def read_sent(folder: Path) -> list[dict[str, Any]]:
    """The updates that were attacked; empty where none were.

    Raises:
        StoreError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"'{path}' is damaged ({cause(error)}); remove it, and run the command again.") from error
    return found


def worst(update: dict[str, Any]) -> Attacked | None:
    """Who recovered most images, or else the most similar ones; `None` where no attack was scored."""
    attacked = [
        Attacked(one, [max(both) for both in zip(one["control"]["ssim"], update["class_mean"], strict=True)])
        for one in update["attacks"]
        if "ssim" in one["metrics"]
    ]
    return max(attacked, key=lambda one: (one.leaks, sum(one.ssim)), default=None)


def by_round(sent: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Updates of one defense and round: of all seeds and clients."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for update in sent:
        groups.setdefault((update["defense"], update["round"]), []).append(update)
    for (defense, number), updates in groups.items():
        yield defense, number, updates


def sent_table(sent: Sequence[dict[str, Any]]) -> list[Line]:
    """A row for each defense and round."""
    lines: list[Line] = [HEAD]
    several = len({attack["attack"] for update in sent for attack in update["attacks"]}) > 1
    for defense, number, updates in by_round(sent):
        found = [one for one in map(worst, updates) if one is not None]
        who = [one.attacker if several else one.attack["attacker"] for one in found]
        scores = [one.attack["metrics"] for one in found]
        labels = [one["label_accuracy"][0] for one in scores if "label_accuracy" in one]
        lines.append(
            (
                defense, str(number), _behind(updates), "; ".join(dict.fromkeys(u["prediction"] for u in updates)),
                "; ".join(dict.fromkeys(who)) or NOTHING, _count(updates),
                f"{max(max(one.ssim) for one in found):.2f}" if found else NOTHING,
                f"{max(max(one.guesses) for one in found):.2f}" if found else NOTHING,
                f"{100 * sum(labels) / len(labels):.0f} %" if labels else NOTHING,
            )
        )  # fmt: skip
    return lines


def _count(updates: Sequence[dict[str, Any]]) -> str:
    """Images that leaked, of those behind updates on which an attack was scored."""
    found = [worst(update) for update in updates]
    images = sum(len(one.ssim) for one in found if one is not None)
    if not images:
        return NOTHING
    rest = f" ({found.count(None)} of {len(found)} updates not scored)" if None in found else ""
    return f"{sum(one.leaks for one in found if one is not None):,} of {images:,}{rest}"


def _behind(updates: Sequence[dict[str, Any]]) -> str:
    """Images and steps."""
    images, steps = (_span(one[key] for one in updates) for key in ("images", "steps"))
    return f"{images} image{'s' * (images != '1')}, {steps} step{'s' * (steps != '1')}"


def _span(numbers: Any) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def sent_in_words(sent: Sequence[dict[str, Any]]) -> str:
    """A sentence; empty where nothing was attacked."""
    if not sent:
        return ""
    groups = {title: [u for u in sent if (u["defense"] == UNDEFENDED) is bare] for title, bare in _TITLES}
    counted = {title: _count(updates) for title, updates in groups.items() if updates}
    said = [
        f"no attack could be scored {title}" if count == NOTHING else f"{count} images leaked {title}"
        for title, count in counted.items()
    ]
    return f"Of what clients themselves sent ({_behind(sent)} an update) {' and '.join(said)}."


_TITLES = (("without a defense", True), ("in spite of one", False))


def sent_strips(sent: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Pictures, where they were kept: without a defense, of the update in each round with the most similar image.

    Args:
        sent: the updates.
        folder: of the frontier.
    """
    from safetensors.numpy import load_file

    path = folder / FOLDER / PICTURES
    stored = load_file(path) if path.exists() else {}
    shown = []
    for _, number, updates in by_round([one for one in sent if f"{one['file']}/0" in stored]):
        found = [(one, update) for update in updates if (one := worst(update)) is not None]
        if found:
            best = max(found, key=lambda pair: max(pair[0].ssim))
            shown.append({"title": f"Sent in round {number}", "strip": _strip(*best, stored)})
    return shown


def _strip(found: Attacked, update: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """From the worst to the best image at even distances; guesses are in the order of secrets."""
    from keyhole.report import figures, strips

    ssim, judged = found.ssim, found.leaked
    ranked = sorted(range(len(ssim)), key=ssim.__getitem__)
    count = min(strips.PICTURES, len(ranked))
    rows = [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]
    secrets = stored.get(f"{update['file']}/secret")
    guesses = stored[f"{update['file']}/{update['attacks'].index(found.attack)}"]
    lines = [
        {
            "name": found.attacker,
            "items": [
                {
                    "src": figures.picture(guesses[row]),
                    "text": f"{ssim[row]:.2f}{' leak' if judged[row] else ''}",
                    "leak": judged[row],
                }
                for row in rows
            ],
        }
    ]
    if secrets is not None:
        drawn = [{"src": figures.picture(secrets[row]), "text": "", "leak": False} for row in rows]
        lines.insert(0, {"name": "Secret", "items": drawn})
    return {"heads": [f"image {row}" for row in rows], "lines": lines, "of": len(ssim), "by": found.attacker}
