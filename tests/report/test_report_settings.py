"""Several settings in one report: rows, controls and verdict of each, folders on disk, and how they are shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_cases import MASK, NOISE, outcome, report_of, report_on, setting, shares

from keyhole.core.trial import Outcome
from keyhole.errors import StoreError
from keyhole.report.markdown import render_markdown
from keyhole.report.render import render_html
from keyhole.report.summarize import Report, summarize
from keyhole.report.tables import leak_table, overview_table, verdict_table
from keyhole.report.write import read_audit, write_report

SHARED = outcome([0.75] + [0.1] * 7, attacker="control:class_mean")


def first() -> list[Outcome]:
    """All eight images leak but the one that the shared control guesses; the mask falls to whoever knows it."""
    return [
        outcome([0.8] * 8),
        SHARED,
        outcome([0.1] * 8, defense=(MASK,)),
        outcome(shares(6, 8), defense=(MASK,), attacker="adaptive:survivors"),
    ]


def second() -> list[Outcome]:
    """Another network, of which only the image leaks that the shared control guesses, by more than the margin."""
    return [
        outcome([0.9] + [0.1] * 7, model="mlp"),
        SHARED,
        outcome([0.1] * 8, model="mlp", defense=(NOISE,)),
        outcome([0.1] * 8, model="mlp", defense=(NOISE,), attacker="adaptive:denoise"),
    ]


@pytest.fixture(scope="module")
def both() -> Report:
    return report_on({"lenet": first(), "mlp": second()})


class TestRows:
    def test_a_shared_trial_counts_in_both(self, both: Report) -> None:
        rows = {(r.setting, r.defense, r.attacker): r for r in both.rows}
        assert rows["lenet", "none", "naive"].leaks == 7  # the shared control guesses the first image
        assert rows["mlp", "none", "naive"].leaks == 1
        assert {name for name, _, attacker in rows if attacker == "control:class_mean"} == {"lenet", "mlp"}
        assert (both.done, both.planned, both.complete) == (7, 7, True)

    def test_a_control_of_one_setting_is_none_of_another(self) -> None:
        report = report_on({"a": [outcome([0.8])], "b": [outcome([0.8], model="mlp"), outcome([0.75], model="mlp",
                           attacker="control:class_mean")]})  # fmt: skip
        assert [(row.setting, row.leaks, row.uncontrolled) for row in report.rows if row.is_attack] == [
            ("a", 1, 1),
            ("b", 0, 0),
        ]

    def test_each_row_is_that_of_its_setting_alone(self, both: Report) -> None:
        for name, found in (("lenet", first()), ("mlp", second())):
            alone = summarize(setting(found, name=name), found)
            assert json.dumps(Report.asdict(alone)["rows"]) == json.dumps(
                [row for row in both.asdict()["rows"] if row["setting"] == name]
            )

    def test_json_names_them(self, both: Report) -> None:
        record = json.loads(both.to_json())
        assert record["settings"] == ["lenet", "mlp"]
        assert {row["setting"] for row in record["rows"]} == {"lenet", "mlp"}

    def test_one_attack_has_one_name_in_all_settings(self) -> None:
        variants = [outcome([0.1]).trial.attack.replace(steps=steps) for steps in (100, 200)]
        report = report_on({
            "both": [outcome([0.1], attack=attack) for attack in variants],
            "one": [outcome([0.1], attack=variants[0], model="mlp")],
        })  # fmt: skip
        assert [row.attack for row in report.rows] == ["idlg(steps=100)", "idlg(steps=200)", "idlg(steps=100)"]

    def test_options_that_differ_between_settings_do_not_split_an_attack(self) -> None:
        tuned = outcome([0.1]).trial.attack.replace(tv=0.1)
        report = report_on({"a": [outcome([0.1])], "b": [outcome([0.2], attack=tuned)]}, {"b": "a"})
        assert [row.attack for row in report.rows] == ["idlg", "idlg"]
        assert [test.difference.value for test in report.comparisons] == [pytest.approx(0.1)]


class TestVerdict:
    def test_two_in_full(self, both: Report) -> None:
        assert both.verdict == (
            "Undefended, the attacks tried recovered 7 of 8 images in “lenet” (88 %, 95 % interval 53-98 %) and 1 of 8 "
            "in “mlp” (12 %, 2-47 %), from one update each; of 2 defenses, each by its worst setting, 1 fell to an "
            "attacker who knows it (random_masking(rate=0.5): 6 of 8 in “lenet”, scored in 1 of 2 settings) and 1 was "
            "not broken by the attacks tried (gaussian_noise(std=0.1): 0 of 8 in “mlp”, scored in 1 of 2 settings)."
        )

    def test_the_same_worst_setting_is_named_once(self) -> None:
        found = {
            name: [
                outcome([0.9] * 8, model=name),
                outcome(shares(hits, 8), model=name, defense=(MASK,)),
                outcome([0.1] * 8, model=name, defense=(NOISE,)),
            ]
            for name, hits in (("a", 4), ("b", 1))
        }
        text = report_on(found).verdict
        assert "of 2 defenses, each by its worst setting, which is “a”, 1 fell" in text
        assert "(random_masking(rate=0.5): 4 of 8, attackers who do not know it only)" in text

    def test_a_defense_counts_by_its_worst_setting(self) -> None:
        found = {
            name: [outcome([0.9] * 8, model=name), outcome(shares(hits, 8), model=name, defense=(MASK,))]
            for name, hits in (("a", 0), ("b", 8))
        }
        text = report_on(found).verdict
        assert "the one defense tried, by its worst setting, fell even to an attacker who does not know it" in text
        assert "8 of 8 in “b”" in text

    def test_many_settings_name_the_worst(self) -> None:
        found = {f"s{i}": [outcome(shares(i, 8), model=f"m{i}")] for i in range(7)}
        text = report_on(found).verdict
        assert re.findall(r"“(s\d)”", text) == ["s3", "s4", "s5", "s6"]
        assert "at most 25 % in each of 3 more settings" in text

    def test_unscored_settings_are_named(self) -> None:
        text = report_on({"a": [outcome([0.9])], "b": [outcome([], model="mlp", status="failed")]}).verdict
        assert "the undefended case could not be scored in “b”" in text
        assert "1 of 2 attack trials diverged, failed or were refused" in text

    def test_a_shared_failure_is_counted_once(self) -> None:
        lost = outcome([], status="failed", episode=(9,))
        text = report_on({"a": [outcome([0.9]), lost], "b": [outcome([0.9], model="mlp"), lost]}).verdict
        assert "1 of 3 attack trials" in text

    def test_little_to_stop_in_one_of_them(self) -> None:
        found = {
            name: [outcome([ssim], model=name), outcome([0.1], model=name, defense=(MASK,))]
            for name, ssim in (("a", 0.9), ("b", 0.1))
        }
        assert "as in “b” there was next to nothing to stop" in report_on(found).verdict

    def test_updates_that_differ_are_told_apart(self) -> None:
        found = {"one": [outcome([0.9])], "four": [outcome([0.9], rounds=4)]}
        text = report_on(found).verdict
        assert "in “one” (100 %, 95 % interval 21-100 %) from one update and" in text
        assert "in “four” (100 %, 21-100 %) from 4 updates of the same images" in text

    def test_rounds_of_a_lone_setting(self) -> None:
        assert "from 3 updates of the same images" in report_of([outcome([0.9], rounds=3)]).verdict
        both = outcome([0.9] * 4, rounds=3, batch_size=2)
        assert "from 2 batches in a row, 3 updates of the same images each" in report_of([both]).verdict

    def test_nothing_yet(self) -> None:
        assert (
            "no attack has produced a score"
            in summarize([setting(first(), name="a"), setting(second(), name="b")], []).verdict
        )


class TestFolder:
    def write(self, folder: Path, text: str, outcomes: list[Outcome]) -> None:
        (folder / "reconstructions").mkdir()
        (folder / "setting.json").write_text(text)
        (folder / "outcomes.jsonl").write_text("".join(f"{o.to_json()}\n" for o in outcomes))

    def test_several(self, tmp_path: Path) -> None:
        planned = [setting(first(), name="lenet"), setting(second(), name="mlp", against="lenet")]
        text = json.dumps({"title": "small", "settings": [vars(one) for one in planned]})
        found = {o.trial.hash: o for o in (*first(), *second())}
        self.write(tmp_path, text, list(found.values()))
        settings, outcomes = read_audit(tmp_path)
        assert settings == planned
        assert len(outcomes) == 7
        report, page = write_report(tmp_path)
        assert "7 of 8 images in “lenet”" in (tmp_path / "report.md").read_text()
        assert report.comparisons[-1].against == "lenet"
        assert page.read_text().count('<details class="setting"') == 2
        assert json.loads((tmp_path / "report.json").read_text())["settings"] == ["lenet", "mlp"]

    def test_a_lone_one_without_a_list(self, tmp_path: Path) -> None:
        self.write(tmp_path, json.dumps({**vars(setting(first()))}), first())
        settings, _ = read_audit(tmp_path)
        assert settings == [setting(first())]

    @pytest.mark.parametrize("text", ['{"settings": []}', '{"settings": [{"name": "a"}]}', "[1]", "{"])
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        self.write(tmp_path, text, [])
        with pytest.raises(StoreError, match="is damaged"):
            read_audit(tmp_path)

    def test_names_must_differ(self, tmp_path: Path) -> None:
        self.write(tmp_path, json.dumps({"settings": [vars(setting(first()))] * 2}), [])
        with pytest.raises(StoreError, match="names of their own"):
            read_audit(tmp_path)


class TestTables:
    def test_a_column_only_where_there_are_several(self, both: Report) -> None:
        lone = report_of(first())
        for table in (leak_table, verdict_table):
            (head, *rows), (alone, *others) = table(both), table(lone)
            assert head == ("setting", *alone)
            assert [row[1:] for row in rows if row[0] == "lenet"] == others

    def test_overview(self, both: Report) -> None:
        head, *lines = overview_table(both)
        assert len(head) == len(lines[0])
        assert [line[0] for line in lines] == ["lenet", "mlp"]
        assert lines[0][4:6] == ("88 % (53-98)", "0.80")
        assert lines[0][-1].startswith("random_masking(rate=0.5): 75 % (")
        assert lines[1][-1] == "gaussian_noise(std=0.1): 0 % (0-32)"

    def test_overview_of_settings_without_outcomes(self) -> None:
        report = summarize([setting(first(), name="a"), setting(second(), name="b")], first()[:1])
        assert overview_table(report)[2] == ("b", *["–"] * 7)

    def test_markdown(self, both: Report) -> None:
        text = render_markdown(both)
        assert "## Settings" in text
        widths = {
            len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| lenet | none")
        }
        assert widths == {10, 8}  # leaks and budget, each with one column more than for a lone setting


class TestPage:
    @pytest.fixture(scope="class")
    @staticmethod
    def html() -> str:
        found = {f"s{i}": [outcome([0.9], model=f"m{i}")] for i in range(4)}
        listed = [setting(own, name=name) for name, own in found.items()]
        outcomes = [o for own in found.values() for o in own]
        return render_html(summarize(listed, outcomes), listed, outcomes, None)

    def test_the_first_few_are_open(self, html: str) -> None:
        assert html.count('<details class="setting" open>') == 3
        assert html.count('<details class="setting">') == 1

    def test_overview_leads_to_each(self, html: str) -> None:
        targets = re.findall(r'href="#([^"]+)"', html)
        assert targets == [f"setting-{i}" for i in range(1, 5)]
        assert all(f'id="{target}"' in html for target in targets)

    def test_what_all_share_is_said_once(self, html: str) -> None:
        assert html.count("Labels are recovered.") == 1
        assert html.count("100 steps.") == 1

    def test_headings(self, html: str) -> None:
        heads = re.findall(r"<h2>([^<]*)</h2>", html)
        assert heads == [
            "Settings", "Assumptions of all settings", "s0", "s1", "s2", "s3", "All metrics",
            "Does knowing the defense help?", "Budget", "Versions", "Words used here",
        ]  # fmt: skip
