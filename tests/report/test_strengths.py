"""The weakest strength that held, on leak counts chosen so that the answer can be read off."""

from __future__ import annotations

import re
from typing import Any

import pytest
from report_cases import MASK, mask, outcome, report_of, report_on, setting, shares

from keyhole.core.registry import DEFENSES
from keyhole.core.trial import Outcome, Spec
from keyhole.report.details import strengths_table
from keyhole.report.markdown import render_markdown
from keyhole.report.render import render_html
from keyhole.report.strengths import Strength
from keyhole.report.summarize import Report

RATES = (0.1, 0.3, 0.5, 0.7)


def masked(hits: dict[str, tuple[int, ...]], model: str = "lenet_zhu", **more: Any) -> list[Outcome]:
    """Undefended all of 20 images leak; under masks of `RATES` so many to each attacker."""
    found = [outcome([0.9] * 20, model=model)]
    for i, rate in enumerate(RATES):
        for attacker, counts in hits.items():
            found.append(outcome(shares(counts[i], 20), defense=mask(rate), attacker=attacker, model=model, **more))
    return found


def line(report: Report, rule: str = "leak", setting: str = "") -> Strength:
    (found,) = [one for one in report.strengths if (one.rule, one.setting) == (rule, setting)]
    return found


class TestHeld:
    @pytest.mark.parametrize(
        ("naive", "held"),
        [
            ((20, 1, 0, 0), 0.3),  # 1 of 20 is 5 %, which still counts as held
            ((20, 2, 0, 0), 0.5),
            ((0, 0, 0, 0), 0.1),
            ((0, 0, 2, 0), 0.7),  # what held at 0.1 did not at 0.5
            ((0, 0, 0, 2), None),
        ],
    )
    def test_weakest_and_every_stronger_one(self, naive: tuple[int, ...], held: float | None) -> None:
        found = line(report_of(masked({"naive": naive})))
        assert (found.naive.strength, found.naive.scored) == (held, 4)
        assert (found.defense, found.option, found.strengths) == ("random_masking", "rate", RATES)
        assert found.undefended.value == 1.0
        if held is not None:
            assert found.naive.leak_rate.value == naive[RATES.index(held)] / 20

    def test_the_worst_adaptive_attacker_counts(self) -> None:
        hits = {"naive": (20, 0, 0, 0), "adaptive:a": (20, 20, 0, 0), "adaptive:b": (20, 0, 20, 1)}
        found = line(report_of(masked(hits)))
        assert (found.naive.strength, found.adaptive.strength, found.adaptive.attacker) == (0.3, 0.7, "adaptive:b")

    def test_the_worst_attack_counts(self) -> None:
        more = [
            outcome(shares(hits, 20), defense=mask(rate), attack=Spec.of("dlg"))
            for rate, hits in zip(RATES, (20, 20, 20, 0), strict=True)
        ]
        found = line(report_of([*masked({"naive": (20, 0, 0, 0)}), *more]))
        assert found.naive.strength == 0.7

    def test_no_adaptive_attacker(self) -> None:
        found = line(report_of(masked({"naive": (0, 0, 0, 0)})))
        assert (found.adaptive.scored, found.adaptive.strength) == (0, None)

    def test_a_strength_without_scores_is_not_one_that_held(self) -> None:
        found = masked({"naive": (20, 0, 0, 0)})
        found[3] = outcome([], defense=mask(0.5), status="failed")
        assert line(report_of(found)).naive.strength == 0.7

    def test_similarity_of_one_half_ignores_controls(self) -> None:
        found = [outcome([0.9] * 20)]
        for rate, ssim in zip(RATES, (0.8, 0.6, 0.5, 0.49), strict=True):
            found.append(outcome([ssim] * 20, defense=mask(rate)))
            found.append(outcome([0.75] * 20, defense=mask(rate), attacker="control:prior_only"))
        report = report_of(found)
        assert line(report).naive.strength == 0.1  # 0.8 is no leak beside a control of 0.75
        assert line(report, "ssim_50").naive.strength == 0.7


class TestFamilies:
    def test_at_least_three_strengths(self) -> None:
        found = [outcome([0.1], defense=mask(rate)) for rate in (0.1, 0.3)]
        assert report_of(found).strengths == ()

    def test_other_options_and_chains_are_no_strengths(self) -> None:
        found = [outcome([0.1], defense=mask(rate)) for rate in (0.1, 0.3)]
        found.append(outcome([0.1], defense=mask(0.5, rescale=True)))
        found.append(outcome([0.1], defense=(*mask(0.7), *mask(0.7))))
        assert report_of(found).strengths == ()

    def test_options_that_all_share_are_named(self) -> None:
        found = [outcome([0.1], defense=mask(rate, rescale=True)) for rate in RATES]
        assert {one.defense for one in report_of(found).strengths} == {"random_masking(rescale=True)"}

    def test_words_have_no_order(self) -> None:
        found = [outcome([0.1], defense=(Spec.of("mystery", {"kind": kind}),)) for kind in "abc"]
        assert report_of(found).strengths == ()

    @pytest.mark.parametrize(("stronger", "held"), [("down", 1.0), ("up", None)])
    def test_direction(self, monkeypatch: pytest.MonkeyPatch, stronger: str, held: float | None) -> None:
        monkeypatch.setitem(DEFENSES.card("clip").facts, "stronger", stronger)
        found = [
            outcome(shares(hits, 20), defense=(Spec.of("clip", {"norm": norm, "scale": "absolute"}),))
            for norm, hits in ((0.1, 0), (1.0, 0), (10.0, 20))
        ]
        one = line(report_of(found))
        assert (one.stronger, one.naive.strength) == (stronger, held)
        assert one.strengths == ((10.0, 1.0, 0.1) if stronger == "down" else (0.1, 1.0, 10.0))

    def test_each_setting_by_itself(self) -> None:
        report = report_on({
            "a": masked({"naive": (20, 0, 0, 0)}),
            "b": masked({"naive": (20, 20, 20, 0)}, model="mlp"),
        })  # fmt: skip
        held = [(name, line(report, "leak", name).naive.strength) for name in ("a", "b")]
        assert held == [("a", 0.3), ("b", 0.7)]


class TestShown:
    def test_table(self) -> None:
        report = report_of(masked({"naive": (20, 0, 0, 0), "adaptive:x": (20, 20, 20, 20)}))
        head, leak, similar = strengths_table(report)
        assert len(head) == len(leak) == len(similar)
        assert leak[:3] == ("random_masking", "rate 0.1, 0.3, 0.5, 0.7", "leaks")
        assert leak[3].startswith("100 % (")
        assert leak[4:] == ("0.3 (0 %, 0-16)", "none tried")

    def test_everywhere(self) -> None:
        found = masked({"naive": (20, 0, 0, 0)})
        report = report_of(found)
        assert "## Weakest strength that held" in render_markdown(report)
        assert "<h3>Weakest strength that held</h3>" in render_html(report, setting(found), found, None)
        record = report.asdict()["strengths"]
        assert [one["rule"] for one in record] == ["leak", "ssim_50"]
        assert record[0]["naive"]["strength"] == 0.3
        assert record[0]["adaptive"]["leak_rate"] == {"value": None, "low": None, "high": None}

    def test_not_where_there_is_none(self) -> None:
        found = [outcome([0.9]), outcome([0.1], defense=(MASK,))]
        report = report_of(found)
        assert "Weakest" not in render_markdown(report) + re.sub(
            'data:[^"]*', "", render_html(report, setting(found), found, None)
        )
