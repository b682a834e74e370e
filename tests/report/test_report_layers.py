"""Which layers to leave out: order, worst attacker, the sentence of advice, and room in the main table."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from report_cases import MASK, outcome, report_of, report_on, setting, shares

from keyhole.core.trial import Outcome, Spec
from keyhole.report.details import layers_table
from keyhole.report.grid import grid
from keyhole.report.markdown import render_markdown
from keyhole.report.render import render_html
from keyhole.report.summarize import Report


def without(*layers: str) -> tuple[Spec, ...]:
    return (Spec.of("withhold", {"layers": ",".join(layers)}),)


def left_out(share: float, hits: int, *layers: str, attacker: str = "adaptive:zeros", model: str = "a") -> Outcome:
    return outcome(
        shares(hits, 20), defense=without(*layers), attacker=attacker, facts={"withheld": share}, model=model
    )


def found(model: str = "a", undefended: int = 20) -> list[Outcome]:
    """The head alone does not help; the first layer does, and so do the first two together."""
    return [
        outcome(shares(undefended, 20), model=model),
        left_out(0.9, 0, "conv1", "conv2", model=model),
        left_out(0.1, 12, "head", model=model),
        left_out(0.3, 1, "conv1", model=model),
        left_out(0.3, 0, "conv1", attacker="naive", model=model),
    ]


def advice(report: Report, setting: str = "") -> str:
    return report.advice[setting]


class TestLines:
    def test_by_share_with_the_worst_attacker(self) -> None:
        lines = report_of(found()).layers
        assert [(one.layers, one.withheld, one.leak_rate.value) for one in lines] == [
            ("head", 0.1, 0.6),
            ("conv1", 0.3, 0.05),
            ("conv1, conv2", 0.9, 0.0),
        ]
        assert [(one.level, one.attacker) for one in lines] == [
            ("fell", "adaptive:zeros"),
            ("not broken", "adaptive:zeros"),
            ("not broken", "adaptive:zeros"),
        ]

    def test_only_chains_of_this_defense_alone(self) -> None:
        report = report_of([outcome([0.1], defense=(*without("head"), MASK)), outcome([0.1], defense=(MASK,))])
        assert (report.layers, report.advice) == ((), {})

    def test_the_share_is_a_median_and_may_be_missing(self) -> None:
        some = [
            outcome([0.1], defense=without("a"), episode=(i,), facts={"withheld": s})
            for i, s in enumerate((0.1, 0.2, 0.9))
        ]
        report = report_of([outcome([0.1], defense=without("b")), *some])
        assert [(one.layers, one.withheld) for one in report.layers[:1]] == [("a", 0.2)]
        assert math.isnan(report.layers[1].withheld)
        assert report.asdict()["layers"][1]["withheld"] is None

    @pytest.mark.parametrize(
        ("layers", "shown"), [("head", "head"), ("conv1,head", "conv1, head"), (["a", "b"], "a, b"), ("", "nothing")]
    )
    def test_a_list_or_a_text_with_commas(self, layers: Any, shown: str) -> None:
        (one,) = report_of([outcome([0.1], defense=(Spec.of("withhold", {"layers": layers}),))]).layers
        assert one.layers == shown


class TestAdvice:
    def test_the_smallest_set_that_stopped_every_attack(self) -> None:
        text = advice(report_of(found()))
        assert "The smallest set of layers that stopped every attack tried, when left out, is “conv1” (30 % of" in text
        assert "; leaks: 5 %, 95 % interval" in text
        assert text.endswith("another attack may still succeed.")

    def test_none_did(self) -> None:
        text = advice(report_of([*found()[:1], left_out(0.1, 12, "head"), left_out(0.5, 2, "conv1")]))
        assert text.startswith("No set of layers that was tried stopped every attack")

    def test_an_attack_without_score_stopped_nothing(self) -> None:
        failed = outcome([], defense=without("conv1"), attack=Spec.of("dlg"), status="failed", model="a")
        assert "“conv1, conv2” (90 %" in advice(report_of([*found(), failed]))

    def test_who_does_not_know_is_weak_evidence(self) -> None:
        text = advice(report_of([outcome([0.9] * 20), left_out(0.2, 0, "head", attacker="naive")]))
        assert "only attackers who do not know what is left out were tried" in text

    def test_nothing_to_stop(self) -> None:
        assert "nothing follows" in advice(report_of(found(undefended=1)))

    def test_each_setting(self) -> None:
        report = report_on({"a": found(), "b": [outcome([0.9] * 20, model="b"), left_out(0.2, 20, "head", model="b")]})
        assert "conv1" in advice(report, "a")
        assert advice(report, "b").startswith("No set of layers")
        assert [one.setting for one in report.layers] == ["a", "a", "a", "b"]


class TestShown:
    def test_table(self) -> None:
        report = report_of(found())
        head, *lines = layers_table(report, report.layers)
        assert head == ("layers left out", "share withheld", "leaks, worst (95 %)", "worst attacker", "level")
        assert lines[1][:2] == ("conv1", "30 %")
        assert lines[1][3:] == ("adaptive:zeros", "not broken by the attacks tried")

    @pytest.mark.parametrize(("sets", "shown"), [(6, True), (7, False)])
    def test_many_sets_leave_the_main_table(self, sets: int, shown: bool) -> None:
        outcomes = [outcome([0.9]), outcome([0.1], defense=(MASK,))]
        outcomes += [outcome([0.1], defense=without(f"layer{i}")) for i in range(sets)]
        report = report_of(outcomes)
        names = [line["defense"] for line in grid(report.rows, report.layers)["lines"]]
        assert names[:2] == ["none", "random_masking(rate=0.5)"]
        assert (len(names) > 2) is shown
        text = render_html(report, setting(outcomes), outcomes, None)
        table = re.split("<h3>Which layers to leave out</h3>", text)[1].split("</table>")[0]
        assert len(re.findall(r'<th scope="row">', table)) == sets

    def test_markdown_and_json(self) -> None:
        report = report_of(found())
        text = render_markdown(report)
        assert "## Which layers to leave out\n\n- The smallest set of layers" in text
        record = report.asdict()
        assert record["layers"][0]["layers"] == "head"
        assert record["advice"][""].startswith("The smallest set")
