"""The page, the Markdown and the terminal's table, on a small synthetic audit."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from keyhole.core.trial import Outcome, Spec, Trial
from keyhole.report.markdown import render_markdown
from keyhole.report.records import Images
from keyhole.report.render import render_html
from keyhole.report.summarize import Setting, summarize
from keyhole.report.tables import leak_table

HOSTILE = "<script>alert('x')</script> | `faces`"


def secrets_of(rows: int) -> np.ndarray:
    """Smooth coloured blobs, (rows, 3, 24, 24) in [0, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:24, 0:24] / 24
    waves, colors = rng.uniform(2, 9, (rows, 2, 1, 1)), rng.uniform(0.3, 1, (rows, 3, 1, 1))
    shapes = 0.5 + 0.5 * np.sin(waves[:, :1] * x * 2 + waves[:, 1:] * y)
    return shapes[:, 0][:, None] * colors


def world(rows: int = 10, seeds: int = 3, title: str = "faces_dlg") -> tuple[Setting, list[Outcome], Images]:
    """An audit of batches of two on several networks, with NaN, diverged, failed, refused and tuning trials."""
    rng = np.random.default_rng(1)
    secrets = secrets_of(rows)
    masks = [(Spec.of("random_masking", {"rate": rate}),) for rate in (0.3, 0.5, 0.7)]
    noise = (Spec.of("clip", {"norm": 1.0}), Spec.of("gaussian_noise", {"std": 0.1}))
    levels: dict[tuple[tuple[Spec, ...], str], float] = {((), "naive"): 0.93}
    levels |= {(mask, "naive"): level for mask, level in zip(masks, (0.6, 0.3, 0.1), strict=True)}
    levels |= {(mask, "adaptive:survivors"): level for mask, level in zip(masks, (0.92, 0.75, 0.65), strict=True)}
    levels |= {(noise, "naive"): 0.1, (noise, "adaptive:noise_scale"): 0.25}
    for defense in ((), *masks, noise):
        levels |= {(defense, "control:prior_only"): 0.05, (defense, "control:other_client"): 0.25}
    levels[(), "control:class_mean"] = 0.4
    found, reconstructions = [], {}
    for (defense, attacker), level in levels.items():
        for seed in range(seeds):
            for first in range(0, rows, 2):
                trial = Trial(
                    source="faces", model="lenet_zhu", state="none", rule=Spec.of("gradient"), belief=Spec.of("exact"),
                    sees=("update", "weights"), defense=defense, attack=Spec.of("idlg", {"tv": level}),
                    attacker=attacker, episode=(first, first + 1), batch_size=2, seed=seed,
                )  # fmt: skip
                ssim = np.clip(level + rng.normal(0, 0.12, 2), 0, 1)
                kept = ssim[:, None, None, None]
                guess = kept * secrets[first : first + 2] + (1 - kept) * rng.uniform(size=(2, 3, 24, 24))
                mse = (1 - ssim) ** 2 / 10 + 1e-6
                metrics: dict[str, list[float]] = {"ssim": [*ssim], "mse": [*mse], "psnr": [*(-10 * np.log10(mse))]}
                metrics |= {"label_accuracy": [1.0, 1.0]} if "control" not in attacker else {}
                metrics |= {"identified": [*(ssim > 0.6).astype(float)]} if attacker == "naive" else {}
                history = tuple(
                    (k, float(10 * math.exp(-k / 40 * level) + rng.uniform(0, 0.01))) for k in range(1, 300, 6)
                )
                outcome = Outcome(trial, "budget", metrics, 1.5, 300, history=history)
                reconstructions[trial.hash] = guess
                found.append(outcome)
    nan = {"ssim": [math.nan, 0.1], "mse": [math.nan, 0.2], "psnr": [math.nan, 7.0]}
    pruned = (Spec.of("prune", {"share": 0.9}),)
    extra: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"episode": (rows, rows + 1)},
            {"status": "diverged", "metrics": nan, "detail": "every start went to infinity"},
        ),
        ({"episode": (rows + 2, rows + 3)}, {"status": "failed", "metrics": {}, "detail": f"broke: {HOSTILE}"}),
        ({"episode": (90, 91), "pool": "tune"}, {}),
        (
            {"defense": pruned, "attacker": "adaptive:pattern"},
            {"status": "refused", "metrics": {}, "detail": "the attack needs 'targets', which this threat hides"},
        ),
    ]
    for trial_changes, changes in extra:
        found.append(replace(found[0], trial=replace(found[0].trial, **trial_changes), **{"history": (), **changes}))
    setting = Setting(
        title=title, task="faces / lenet_zhu, 32 x 32 in colour", state="untrained",
        threat="gradient of one batch, batch 2; sees weights, update; labels: auto",
        assumptions=("The server is honest but curious.", "The model runs in evaluation mode: an upper bound."),
        planned=tuple(o.trial.hash for o in found),
        budget=("300 evaluations and 2 starts for each attack.", "tv was tuned over 3 values on 12 images."),
        versions={"torch": "2.13.0", "keyhole": "0.1"}, classes=2,
    )  # fmt: skip
    return setting, found, Images({f"faces/{row}": image for row, image in enumerate(secrets)}, reconstructions)


def page(images: bool = True, **changes: Any) -> str:
    """The page of the synthetic audit."""
    setting, found, stored = world(**changes)
    return render_html(summarize(setting, found), setting, found, stored if images else None)


class Links(HTMLParser):
    """Collects everything a browser would load, and the tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note resources, and push the tag."""
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag not in ("meta", "img", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Pop the tag."""
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html() -> str:
    """The page with pictures."""
    return page()


def parsed(text: str) -> Links:
    """The page's tags, which must all be closed."""
    links = Links()
    links.feed(text)
    assert links.open == []
    return links


class TestHtml:
    def test_loads_nothing(self, html: str) -> None:
        links = parsed(html)
        assert links.loads
        assert all(source.startswith("data:image/") for source in links.loads)
        assert not links.tags & {"script", "link", "iframe", "object"}
        assert not re.search(r"https?:|@import|url\(", html)

    def test_parts_in_order(self, html: str) -> None:
        setting, found, _ = world()
        heads = re.findall(r"<h[12]>([^<]*)</h[12]>", html)
        assert heads == [
            "Keyhole: faces_dlg", "Assumptions", "How many images leaked", "Pictures", "Leak curves", "Loss histories",
            "All metrics", "Does knowing the defense help?", "Budget", "Versions", "Words used here",
        ]  # fmt: skip
        verdict = summarize(setting, found).verdict
        assert html.index(escape(verdict)) < html.index("What this means") < html.index("Assumptions")

    def test_promises_nothing(self, html: str) -> None:
        shown = re.sub(r"data:[^\"]*", "", html).lower()
        assert "not broken by the attacks tried" in shown
        assert not re.search(r"\b(un)?safe|secure", shown)

    def test_hides_no_failure(self, html: str) -> None:
        assert "the attack needs &#39;targets&#39;" in html
        assert "every start went to infinity" in html
        assert "Reconstructions with a score that is not a number: 1." in html

    def test_user_text_is_escaped(self) -> None:
        text = page(rows=2, seeds=1, title=HOSTILE)
        assert "<script" not in text
        assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text

    def test_without_pictures(self) -> None:
        text = page(images=False, rows=2, seeds=1)
        assert "Pictures were not stored" in text
        assert "run.images" in text
        assert "data:image/png" not in text
        parsed(text)

    def test_without_secrets_or_some_reconstructions(self) -> None:
        setting, found, stored = world(rows=4, seeds=1)
        few = Images(None, dict(list(stored.reconstructions.items())[:3]))
        text = render_html(summarize(setting, found), setting, found, few)
        assert "The secrets themselves were not" in text
        assert ">Secret</th>" not in text
        assert "not stored</span>" in text

    def test_nothing_done_yet(self) -> None:
        setting, _, _ = world(rows=2, seeds=1)
        text = render_html(summarize(setting, []), setting, [], None)
        assert "Incomplete (0 of" in text
        parsed(text)

    def test_same_page_again(self) -> None:
        assert page(rows=2, seeds=1) == page(rows=2, seeds=1)


class TestStrips:
    def test_evenly_spaced_from_worst_to_best(self, html: str) -> None:
        setting, found, _ = world()
        adaptive = [
            o for o in found if o.trial.attacker == "adaptive:survivors" and ("rate", 0.5) in o.trial.defense[0].options
        ]
        ranked = sorted(value for o in adaptive for value in o.metrics["ssim"])
        wanted = [f"{ranked[round(i * 29 / 7)]:.2f}" for i in range(8)]
        strip = html.split("<h3>random_masking(rate=0.5)</h3>")[1].split("</table>")[0]
        line = strip.split("Adaptive: survivors</th>")[1].split("</tr>")[0]
        assert re.findall(r"<small>([0-9.]+)", line) == wanted
        assert "8 of 30, chosen by adaptive:survivors" in strip

    def test_a_picture_is_the_reconstruction_of_its_image(self) -> None:
        from PIL import Image

        setting, found, stored = world(rows=2, seeds=1)
        assert stored.secrets is not None
        marked = {name: np.zeros_like(value) for name, value in stored.reconstructions.items()}
        naive = next(o for o in found if o.trial.attacker == "naive")
        marked[naive.trial.hash][1, 0] = 1.0  # the second image is red
        text = render_html(summarize(setting, found), setting, found, Images(stored.secrets, marked))
        strip = text.split("<h3>No defense</h3>")[1].split("</table>")[0]
        line = strip.split("Naive</th>")[1].split("</tr>")[0]
        drawn = {}
        for source, name in re.findall(r'base64,([^"]+)" alt="Naive, (image \d+)', line):
            with Image.open(io.BytesIO(base64.b64decode(source))) as png:
                drawn[name] = png.convert("RGB").getpixel((0, 0))
        assert drawn == {"image 0": (0, 0, 0), "image 1": (255, 0, 0)}

    @pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (2, 5, 7), (3, 400, 200)])
    def test_any_channels_and_size(self, shape: tuple[int, ...]) -> None:
        from PIL import Image

        from keyhole.report.figures import LARGEST, picture

        image = np.full(shape, 2.0)
        image[0, 0, 0] = math.nan
        with Image.open(io.BytesIO(base64.b64decode(picture(image).partition(",")[2]))) as png:
            assert png.width / png.height == pytest.approx(shape[2] / shape[1])
            assert max(png.size) <= LARGEST


class TestCurves:
    def test_histories_hold_their_last_value_and_skip_what_is_not_finite(self) -> None:
        from keyhole.report.figures import _histories, loss_history
        from keyhole.report.groups import Group

        _, found, _ = world(rows=2, seeds=1)
        histories = [((1, 4.0), (11, 1.0)), ((1, 2.0), (5, math.nan), (21, 0.5)), ()]
        outcomes = tuple(replace(found[0], history=history) for history in histories)
        group = Group("none", "idlg", "naive", outcomes, {}, {})
        grid, values = _histories(group)
        assert values.shape == (2, grid.size)
        assert (grid[0], grid[-1]) == (1, 21)
        assert [*values[:, 0], *values[:, -1]] == [4.0, 2.0, 1.0, 0.5]
        assert loss_history([replace(group, outcomes=outcomes[2:])]) is None

    def test_a_history_of_one_evaluation_is_seen(self) -> None:
        from keyhole.report.figures import loss_history
        from keyhole.report.groups import Group

        _, found, _ = world(rows=2, seeds=1)
        dots = []
        for history in (((10, 0.5),), ((1, 0.7), (10, 0.5))):
            picture = loss_history([Group("none", "idlg", "naive", (replace(found[0], history=history),), {}, {})])
            assert picture is not None
            dots.append("fill: #1f5fa8" in base64.b64decode(picture.partition(",")[2]).decode())
        assert dots == [True, False]

    def test_objective_below_zero(self) -> None:
        from keyhole.report.figures import loss_history
        from keyhole.report.groups import Group

        _, found, _ = world(rows=2, seeds=1)
        outcomes = (replace(found[0], history=((1, 0.5), (9, -1e-7))),)
        assert loss_history([Group("none", "idlg", "naive", outcomes, {}, {})]) is not None


class TestText:
    def test_table(self) -> None:
        setting, found, _ = world(rows=4, seeds=1)
        head, *rows = leak_table(summarize(setting, found))
        assert head[:4] == ("defense", "attack", "attacker", "n")
        assert {len(row) for row in (head, *rows)} == {8}
        assert all(isinstance(value, str) for row in rows for value in row)
        refused = next(row for row in rows if row[2] == "adaptive:pattern")
        assert refused == ("prune(share=0.9)", "idlg", "adaptive:pattern", "0", "–", "–", "–", "–")

    def test_markdown(self) -> None:
        setting, found, _ = world(rows=2, seeds=1, title=HOSTILE)
        text = render_markdown(summarize(setting, found))
        assert "<script" not in text
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| none")}
        assert widths == {9, 7}  # leaks and budget; no name broke a line apart
        assert "of 5 defenses" in text
        assert not re.search("safe|secure", text.lower())

    def test_markdown_of_nothing(self) -> None:
        setting, _, _ = world(rows=2, seeds=1)
        assert "no attack has produced a score" in render_markdown(summarize(setting, []))
