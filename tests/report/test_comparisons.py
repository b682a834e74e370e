"""Paired comparisons of settings and of variants of one attack, against values computed by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from report_cases import IDLG, LABELS, MASK, outcome, report_of, report_on, setting, shares
from scipy import stats

from keyhole.core.trial import Outcome, Spec
from keyhole.report.comparisons import Comparison
from keyhole.report.details import settings_table, variants_table
from keyhole.report.markdown import render_markdown
from keyhole.report.render import render_html
from keyhole.report.summarize import Report, summarize


def of_kind(report: Report, kind: str) -> list[Comparison]:
    return [test for test in report.comparisons if test.kind == kind]


def fb(feedback: bool, start: str = "random") -> Spec:
    return Spec.of("dlg_fb", {"feedback": feedback, "start": start})


class TestSettings:
    def test_paired_by_seed_and_image(self) -> None:
        rng = np.random.default_rng(0)
        low, gain = rng.uniform(0.1, 0.5, (2, 8)), rng.uniform(0.1, 0.3, (2, 8))
        one = [outcome([*low[seed]], seed=seed) for seed in (0, 1)]
        # The other setting meets the same images in another order, and two more.
        order = rng.permutation(8)
        two = [
            outcome([*(low + gain)[seed, order], 0.9, 0.9], seed=seed, model="mlp", episode=(*order, 8, 9))
            for seed in (0, 1)
        ]
        (test,) = of_kind(report_on({"a": one, "b": two}, {"b": "a"}), "setting")
        assert (test.setting, test.against, test.attacker, test.n) == ("b", "a", "naive", 8)
        assert test.difference.value == pytest.approx(gain.mean())
        assert test.difference.low < gain.mean() < test.difference.high
        assert test.p == pytest.approx(stats.wilcoxon(gain.mean(0)).pvalue)

    def test_leaks_count_with_the_controls_of_each_side(self) -> None:
        one = [outcome([0.8] * 8), outcome(shares(4, 8, 0.75), attacker="control:prior_only")]
        two = [outcome([0.8] * 8, model="mlp"), outcome(shares(2, 8, 0.75), attacker="control:prior_only", model="mlp")]
        (test,) = of_kind(report_on({"a": one, "b": two}, {"b": "a"}), "setting")
        assert (test.difference.value, test.leaks.value) == (0.0, 0.25)

    def test_attackers_only_and_the_same_ones(self) -> None:
        one = [outcome([0.1], defense=(MASK,), attacker=who) for who in ("naive", "adaptive:a", "control:prior_only")]
        two = [
            outcome([0.1], defense=(MASK,), attacker=who, model="mlp")
            for who in ("naive", "adaptive:b", "control:prior_only")
        ]
        tests = of_kind(report_on({"a": one, "b": two}, {"b": "a"}), "setting")
        assert [test.attacker for test in tests] == ["naive"]

    def test_only_where_asked(self) -> None:
        assert of_kind(report_on({"a": [outcome([0.1])], "b": [outcome([0.1], model="mlp")]}), "setting") == []

    def test_rows_of_other_data_are_other_images(self) -> None:
        report = report_on({"a": [outcome([0.1] * 8)], "b": [outcome([0.9] * 8, source="digits")]}, {"b": "a"})
        (test,) = of_kind(report, "setting")
        assert test.n == 0
        assert math.isnan(test.difference.value)
        assert math.isnan(test.leaks.value)
        assert settings_table(report)[1][5:8] == ("0", "–", "–")

    def test_an_attacker_who_knows_is_compared_within_a_setting(self) -> None:
        found = {
            name: [outcome([ssim], defense=(MASK,), attacker=who, model=name) for who, ssim in scores.items()]
            for name, scores in {"a": {"naive": 0.1, "adaptive:x": 0.4}, "b": {"naive": 0.3, "adaptive:x": 0.4}}.items()
        }
        tests = of_kind(report_on(found), "knowledge")
        assert [(test.setting, test.difference.value) for test in tests] == [
            ("a", pytest.approx(0.3)),
            ("b", pytest.approx(0.1)),
        ]


class TestVariants:
    def series(self) -> list[Outcome]:
        """Four series of three updates with and without feedback: with it, two updates a series more are solved."""
        found = []
        for first in range(0, 12, 3):
            rows = {"episode": (first, first + 1, first + 2), "batch_size": 1}
            found += [
                outcome([0.9] * 3, attack=fb(True), **rows, matched=[1.0] * 3, evaluations=[300.0, 100.0, 50.0]),
                outcome([0.9, 0.3, 0.3], attack=fb(False), **rows, matched=[1.0, 0.0, 0.0], evaluations=[300.0] * 3),
            ]
        return found

    def test_success_and_evaluations(self) -> None:
        (test,) = of_kind(report_of(self.series()), "attack")
        assert (test.attack, test.against) == ("dlg_fb(feedback=True)", "dlg_fb(feedback=False)")
        assert (test.attacker, test.n) == ("naive", 12)
        assert test.difference.value == pytest.approx((0 + 0.6 + 0.6) / 3)
        assert test.success.value == pytest.approx(2 / 3)
        assert test.evaluations.value == pytest.approx(-(0 + 200 + 250) / 3)
        assert 0 < test.success.low < test.success.high <= 1
        assert test.evaluations.low < test.evaluations.value < test.evaluations.high

    def test_only_updates_that_something_was_carried_over_to(self) -> None:
        found = []
        for first in range(0, 12, 3):
            rows = {"episode": (first, first + 1, first + 2), "batch_size": 1, "matched": [1.0] * 3}
            found += [
                outcome([0.5, 0.9, 0.9], attack=fb(True), **rows, evaluations=[300.0, 90, 60], carried=[0.0, 1, 1]),
                outcome([0.5, 0.3, 0.5], attack=fb(False), **rows, evaluations=[300.0] * 3, carried=[0.0] * 3),
            ]
        report = report_of(found)
        (test,) = of_kind(report, "attack")
        assert (test.n, test.spent, test.solved) == (8, (75.0, 300.0), (1.0, 1.0))
        assert test.difference.value == pytest.approx((0.6 + 0.4) / 2)
        assert test.evaluations.value == pytest.approx(-225)
        # Rows still count every image.
        assert [row.n for row in report.rows] == [12, 12]

    def test_updates_of_several_images_count_once(self) -> None:
        found = [
            outcome([0.9] * 4, attack=fb(True), batch_size=2, matched=[1.0, 1.0, 0.0, 0.0], evaluations=[8.0] * 4),
            outcome([0.9] * 4, attack=fb(False), batch_size=2, matched=[0.0] * 4, evaluations=[2.0, 2.0, 4.0, 4.0]),
        ]
        (test,) = of_kind(report_of(found), "attack")
        assert (test.n, test.success.value, test.evaluations.value) == (4, 0.5, 5.0)
        # Two updates, not four images: (n_up + 1) / (n + 2) = 2 / 4 and (n_down + 1) / (n + 2) = 1 / 4 are Bonett and
        # Price's shares, with z sqrt((3/4 - 1/16) / 4) = 0.81; resampling two pairs gives 0 to 1, which is narrower.
        assert test.success.high - test.success.low == pytest.approx(1.0 - (0.25 - 0.8126), abs=1e-3)

    def test_every_pair_of_at_most_six(self) -> None:
        found = [outcome([i / 10], attack=IDLG.replace(steps=i)) for i in range(1, 8)]
        tests = of_kind(report_of(found), "attack")
        assert len(tests) == 15
        assert "idlg(steps=7)" not in {name for test in tests for name in (test.attack, test.against)}
        assert all(test.difference.value < 0 for test in tests)  # the earlier one minus the later one

    def test_naive_attacks_of_one_name_and_cell(self) -> None:
        found = [
            outcome([0.1], attack=attack, defense=defense, attacker=attacker)
            for defense, attacker in (((), "naive"), ((MASK,), "naive"), ((MASK,), "adaptive:x"))
            for attack in (fb(True), fb(False), IDLG)
        ]
        tests = of_kind(report_of(found), "attack")
        assert [(test.defense, test.attacker) for test in tests] == [
            ("none", "naive"),
            ("random_masking(rate=0.5)", "naive"),
        ]

    def test_outcomes_that_record_neither(self) -> None:
        report = report_of([outcome([0.2], attack=fb(True)), outcome([0.1], attack=fb(False))])
        (test,) = of_kind(report, "attack")
        assert math.isnan(test.success.value)
        assert math.isnan(test.evaluations.value)
        assert report.asdict()["comparisons"][0]["success"] == {"value": None, "low": None, "high": None}

    def test_shown(self) -> None:
        found = self.series()
        report = report_of(found)
        head, line = variants_table(report)
        assert len(head) == len(line)
        assert line[5].startswith("+67 pp (+")
        assert line[6].startswith("-150.0 (-")
        assert "## Variants of one attack compared" in render_markdown(report)
        html = render_html(report, setting(found), found, None)
        assert "<h2>Variants of one attack compared</h2>" in html
        assert "Settings compared" not in html


class TestRows:
    def test_success_and_evaluations_of_updates(self) -> None:
        scores = {"matched": [1.0] * 8, "evaluations": [10.0, 10.0, 30.0, 30.0] * 2}
        (row,) = report_of([outcome([0.9] * 8, batch_size=2, **scores)]).rows
        assert row.success is not None
        assert (row.success.value, row.evaluations_per_image, row.series) == (1.0, 20.0, 4)
        # Wilson's bound for 4 of 4 updates, not for 8 of 8 images.
        assert row.success.low == pytest.approx(1 / (1 + stats.norm.ppf(0.975) ** 2 / 4))

    def test_older_outcomes_have_neither(self) -> None:
        report = report_of([outcome([0.9])])
        assert report.rows[0].success is None
        assert report.asdict()["rows"][0]["evaluations_per_image"] is None

    @pytest.mark.parametrize(
        ("matched", "size", "shown"),
        [([1.0, 1.0], 2, False), ([0.0, 0.0], 2, False), ([1.0, 0.0], 1, True), ([1.0, 1.0], 1, True)],
    )
    def test_solved_is_shown_where_it_says_something(self, matched: list[float], size: int, shown: bool) -> None:
        found = [outcome([0.9, 0.9], matched=matched, batch_size=size)]
        text = render_html(report_of(found), setting(found), found, None)
        assert bool(re.search(r"Solved</th>", text)) is shown
        assert ("| solved (95 %)" in render_markdown(report_of(found))) is shown


def test_labels_are_compared_where_there_is_nothing_else() -> None:
    found = [
        outcome([0.2] * 4, attack=LABELS, defense=(MASK,), attacker=who, batch_size=2, label_accuracy=labels)
        for who, labels in (("naive", [0.5] * 4), ("adaptive:x", [1.0, 1.0, 0.5, 0.5]))
    ]
    (test,) = of_kind(report_of(found), "knowledge")
    assert (test.n, test.labels.value) == (4, 0.25)
    assert math.isnan(test.difference.value)
    assert summarize(setting(found), found).asdict()["comparisons"][0]["difference"]["value"] is None
