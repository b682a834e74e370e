"""The certificates of a defense beside what was measured."""

from __future__ import annotations

import dataclasses
import math

from report_cases import outcome, report_of

from keyhole.core.trial import Outcome, Spec
from keyhole.report.details import certificates_table
from keyhole.report.markdown import render_markdown

SOTERIA = (Spec.of("soteria", {"rate": 0.4}),)


def certified(mse: list[float], certificate: list[float], attacker: str = "naive", **trial: object) -> Outcome:
    one = outcome([0.5] * len(mse), mse=mse, attacker=attacker, defense=SOTERIA)
    return dataclasses.replace(
        one, trial=dataclasses.replace(one.trial, **trial), notes={"certified_mse": certificate, "other": [1.0]}
    )


def test_the_share_below_is_counted_image_by_image() -> None:
    naive = certified([0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.2, 0.5])
    knows = certified([0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.2, 0.3], attacker="adaptive:drop_layer")
    report = report_of([naive, knows, outcome([0.9] * 4)])
    rows = {row.attacker: row for row in report.rows if row.defense != "none"}
    assert rows["naive"].below_certificate.value == 0.5  # equal is not below
    assert rows["naive"].certified.median == 0.2
    assert rows["adaptive:drop_layer"].below_certificate.value == 0
    assert math.isclose(rows["adaptive:drop_layer"].certified.median, 0.15)
    head, *lines = certificates_table(report)
    assert head[-1] == "images below the certificate"
    assert [line[2] for line in lines] == ["naive", "adaptive:drop_layer"]
    assert lines[0][-1].startswith("50 %")
    text = render_markdown(report)
    assert "## Certificates" in text
    assert "outside this assumption" in text


def test_there_is_no_table_without_a_certificate() -> None:
    assert len(certificates_table(report_of([outcome([0.9])]))) == 1
    assert "Certificates" not in render_markdown(report_of([outcome([0.9])]))


def test_local_steps_and_numbers_for_a_whole_update_certify_nothing() -> None:
    stepped = certified([0.1, 0.2], [0.2, 0.3], rule=Spec.of("sgd", {"epochs": 2}))
    (row,) = report_of([stepped]).rows
    assert math.isnan(row.certified.median)
    (row,) = report_of([certified([0.1, 0.2], [0.2])]).rows
    assert math.isnan(row.certified.median)
