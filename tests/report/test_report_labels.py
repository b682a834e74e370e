"""Labels: their interval over batches, what chance would give, and audits whose attacks recover nothing else."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from report_cases import LABELS, MASK, NOISE, outcome, report_of, report_on, setting
from scipy import stats

from keyhole.core.trial import Outcome
from keyhole.report.grid import grid
from keyhole.report.intervals import mean
from keyhole.report.markdown import render_markdown
from keyhole.report.render import render_html
from keyhole.report.summarize import label_chance, summarize
from keyhole.report.tables import leak_table, overview_table, verdict_table


def batches(overlaps: list[float], size: int = 4, **more: object) -> list[Outcome]:
    """One trial for each overlap of a batch."""
    return [
        outcome([0.2] * size, attack=LABELS, episode=tuple(range(size * i, size * i + size)),
                label_accuracy=[overlap] * size, **more)  # type: ignore[arg-type]
        for i, overlap in enumerate(overlaps)
    ]  # fmt: skip


def audit() -> list[Outcome]:
    """Sixteen labels: 15 without a defense, 8 and 12 under a mask, 4 under noise."""
    return [
        *batches([1.0, 1.0, 1.0, 0.75]),
        *batches([0.5] * 4, defense=(MASK,)),
        *batches([0.75] * 4, defense=(MASK,), attacker="adaptive:survivors"),
        *batches([0.25] * 4, defense=(NOISE,)),
        outcome([0.3] * 4, attack=LABELS, attacker="control:class_mean"),
    ]


class TestInterval:
    def test_batches_are_resampled_not_images(self) -> None:
        overlaps = [0.25, 0.5, 0.75, 1.0]
        row = report_of(batches(overlaps)).rows[0]
        assert row.labels == mean(np.array([overlaps]))
        assert row.labels_right == 10

    def test_all_right_in_four_batches_is_not_all_right_in_sixteen(self) -> None:
        row = report_of(batches([1.0] * 4)).rows[0]
        assert row.labels.low == pytest.approx(1 / (1 + stats.norm.ppf(0.975) ** 2 / 4))

    def test_networks_count_too(self) -> None:
        found = [*batches([0.0, 0.5] * 8, seed=0), *batches([0.5, 1.0] * 8, seed=1)]
        row = report_of(found).rows[0]
        assert row.labels.value == 0.5
        assert row.labels.low < 0.3  # networks differ by one half; sixteen batches of one network would say 0.37


class TestChance:
    @pytest.mark.parametrize(("classes", "size"), [(2, 1), (10, 1), (2, 3), (3, 2), (4, 3)])
    def test_agrees_with_all_cases_counted(self, classes: int, size: int) -> None:
        draws = list(itertools.product(range(classes), repeat=size))
        overlaps = [
            sum(min(mine.count(c), theirs.count(c)) for c in range(classes)) / size
            for mine in draws
            for theirs in draws
        ]
        assert label_chance(classes, size) == pytest.approx(sum(overlaps) / len(overlaps))

    def test_unknown_classes(self) -> None:
        assert np.isnan(label_chance(0, 4))


class TestLabelsAlone:
    def test_verdict_speaks_of_labels(self) -> None:
        text = report_of(audit()).verdict
        assert text.startswith("Undefended, labels: 15 of 16 recovered (94 %, 95 % interval ")
        chance = 100 * label_chance(2, 4)
        assert f"evenly drawn guesses: {chance:.0f} %) from one update; no attack on images was tried" in text
        assert (
            "with a defense, labels: 12 of 16 under random_masking(rate=0.5) and 4 of 16 under gaussian_noise(std=0.1) "
            "recovered by the worst attacker."
        ) in text
        assert "images (" not in text
        assert "not broken" not in text

    def test_verdict_of_several_settings(self) -> None:
        other = batches([0.5, 0.25, 0.75, 0.5], model="mlp")
        text = report_on({"a": audit(), "b": other}).verdict
        assert "labels: 15 of 16 recovered in “a” (94 %, 95 % interval" in text
        assert "and 8 of 16 recovered in “b” (50 %, " in text

    def test_main_tables_have_the_interval(self) -> None:
        report = report_of(audit())
        head, line, *_ = leak_table(report)
        assert (head[-1], line[-1][:6]) == ("labels right (95 %)", "94 % (")
        head, *lines = verdict_table(report)
        assert head == ("defense", "attack", "labels right, naive", "labels right, adaptive, worst")
        assert lines[1][3].startswith("75 % (")
        assert lines[2][3] == "–"
        assert "labels right (95 %)" in render_markdown(report)

    def test_page(self) -> None:
        found = audit()
        text = render_html(report_of(found), setting(found), found, None)
        heads = re.findall(r"<h2>([^<]*)</h2>", text)
        assert heads[:3] == ["Assumptions", "How many labels were recovered", "All metrics"]
        assert "15 of 16 labels" in text
        assert "12 of 16 labels" in text
        assert "no attack on images was tried" in text

    def test_overview(self) -> None:
        report = report_on({"a": audit(), "b": batches([0.5, 0.25, 0.75, 0.5], model="mlp")})
        head, first, second = overview_table(report)
        assert head == ("setting", "task", "state", "threat", "labels right (95 %)", "worst defended")
        assert first[-1].startswith("random_masking(rate=0.5): 75 % (")
        assert second[-2:][0].startswith("50 % (")
        assert second[-1] == "–"

    def test_nothing_scored(self) -> None:
        failed = outcome([], attack=LABELS, status="failed")
        assert "no attack has produced a score" in summarize(setting([failed]), [failed]).verdict.lower()


class TestLabelsBesideImages:
    def test_gray_images_stop_nothing(self) -> None:
        """An attack on labels alone must not make a defense look unbroken."""
        found = [outcome([0.9] * 4), outcome([], defense=(MASK,), status="refused")]
        found += [*batches([1.0]), *batches([1.0], defense=(MASK,))]
        report = report_of(found)
        assert "recovered 4 of 4 images" in report.verdict
        assert "could not be scored (random_masking(rate=0.5))" in report.verdict
        lines = {(line["defense"], line["attack"]): line for line in grid(report.rows)["lines"]}
        block = lines["none", "labels_only"]["cells"][0][0]
        assert (block["rate"], block["count"], block["color"]) == ("100 %", "4 of 4 labels", "#ffffff")
        assert lines["none", "idlg"]["cells"][0][0]["count"] == "4 of 4"
        mask = "random_masking(rate=0.5)"
        levels = [lines[mask, attack]["level"] for attack in ("idlg", "labels_only")]
        assert levels == ["could not be scored", ""]  # a level is about images
        leaks = {row[:2]: row[2] for row in verdict_table(report)[1:]}
        assert leaks["none", "labels_only"] == "labels 100 % (21-100)"
        assert leaks["none", "idlg"].startswith("100 %")

    def test_a_setting_where_only_labels_were_scored_has_no_leak_rate(self) -> None:
        failed = outcome([], model="mlp", status="failed")
        text = report_on({"a": [outcome([0.9] * 4)], "b": [failed, *batches([1.0], model="mlp")]}).verdict
        assert "recovered 4 of 4 images in “a”" in text
        assert "the undefended case could not be scored in “b”" in text
