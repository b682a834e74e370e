"""Tables of model inversions: attacks compared, matched accuracy, and updates beside networks."""

from __future__ import annotations

from inversion_cases import found, row, spec

from keyhole.report.intervals import Estimate
from keyhole.report.inversion_summary import cells
from keyhole.report.inversion_tables import compared, joined, matched, table
from keyhole.report.text import NOTHING


def test_attacks_are_compared_network_by_network() -> None:
    pairs = [(0.5, 0.7), (0.6, 0.9), (0.4, 0.5)]
    rows = [row(a, seed=s, diversity=2.0) for s, (a, _) in enumerate(pairs)]
    rows += [row(b, seed=s, attack=spec(1), diversity=2.5 + s) for s, (_, b) in enumerate(pairs)]
    rows += [row(0.1, seed=7, attack=spec(1))]  # which the first attack has not
    head, line = compared(cells(found(*rows)))
    assert line[:2] == ("none", "9") and line[-1] == "3"
    assert "+20" in line[4] and "+1.5" in line[5]
    assert len(head) == len(line)


def test_a_defense_is_held_against_the_undefended_network_of_its_accuracy() -> None:
    rows = [
        row(0.3, round=1, accuracy=0.61), row(0.8, round=9, accuracy=0.95),
        row(0.2, round=1, accuracy=0.10, defense=1), row(0.4, round=9, accuracy=0.65, defense=1),
        # The second network got there earlier, so that another round is its match.
        row(0.5, round=1, accuracy=0.80, seed=1), row(0.9, round=9, accuracy=0.95, seed=1),
        row(0.7, round=9, accuracy=0.94, defense=1, seed=1),
    ]  # fmt: skip
    _, line = matched(cells(found(*rows)))
    assert line[1:3] == (line[1], "9") and line[-1] == "2"
    # 0.4 - 0.3 and 0.7 - 0.9.
    assert "-5" in line[5].replace("\u2212", "-")
    assert line[4] == "78 %"  # (0.61 + 0.95) / 2


def test_updates_and_networks_are_joined_by_defense_and_round() -> None:
    made = cells(found(row(0.4, round=1), row(0.6), row(0.7, attack=spec(1))))
    head, *lines = joined(made, {("none", 0): Estimate(0.8, 0.6, 0.9), ("none", 9): Estimate(0.1, 0.0, 0.2)})
    assert [line[1] for line in lines] == ["0", "1", "9"] and len(head) == 5
    assert lines[0][4] == NOTHING and lines[1][3] == NOTHING
    assert "10.0 %" in lines[2][3] and "70.0 %" in lines[2][4]  # the worst attack
    assert joined(made, {}) == []


def test_the_table_has_a_line_for_each_cell() -> None:
    head, *lines = table(cells(found(row(0.5), row(None, round=1))))
    assert [len(line) for line in lines] == [len(head)] * 2
