"""Numbers of the report: intervals against closed forms, the leak rule and rows against hand-computed cases."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from report_cases import IDLG, MASK, NOISE, outcome, report_of, setting
from scipy import stats

from keyhole.core.trial import Outcome, Spec
from keyhole.errors import StoreError
from keyhole.report.intervals import (
    bootstrap,
    mean,
    overlap,
    overlap_difference,
    rate,
    share_difference,
    spread,
    wilson,
)
from keyhole.report.meaning import meaning
from keyhole.report.summarize import Report, summarize
from keyhole.report.verdict import WORDS

NAN = math.nan


def mixed() -> list[Outcome]:
    """Two networks, two images a batch, two episodes; controls, NaN, failed, refused and tuning outcomes."""
    found = []
    for seed in (0, 1):
        for first in (0, 2):
            rows = {"episode": (first, first + 1), "seed": seed}
            found += [
                outcome([0.95, 0.6], **rows, label_accuracy=[1.0, 1.0], identified=[1.0, 0.0]),
                outcome([0.2, 0.3], attacker="control:prior_only", **rows),
                outcome([0.75, 0.5], defense=(MASK,), **rows),
                outcome([0.9, 0.8], defense=(MASK,), attacker="adaptive:survivors", **rows),
                outcome([0.4, 0.75], defense=(MASK,), attacker="control:other_client", **rows),
                outcome([0.1, 0.1], attacker="control:class_mean", **rows),
                outcome([NAN, 0.2], mse=[NAN, 0.3], defense=(NOISE,), status="diverged", **rows),
                outcome([], defense=(NOISE,), attacker="adaptive:denoise", status="refused", **rows),
            ]
    found.append(outcome([], episode=(4, 5), status="failed"))
    found.append(outcome([0.9], pool="tune", episode=(9,)))
    return found


def row_of(report: Report, defense: str, attacker: str) -> Any:
    """The one row of a defense and an attacker."""
    (row,) = [row for row in report.rows if (row.defense, row.attacker) == (defense, attacker)]
    return row


class TestIntervals:
    @pytest.mark.parametrize(("hits", "n"), [(0, 16), (16, 16), (7, 20), (1, 64), (1, 1)])
    def test_wilson_agrees_with_scipy(self, hits: int, n: int) -> None:
        known = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits / n, n) == pytest.approx((known.low, known.high), abs=1e-9)

    def test_all_equal_values_do_not_prove_certainty(self) -> None:
        z = stats.norm.ppf(0.975)
        found = rate(np.ones((1, 16)))
        assert (found.value, found.high) == (1.0, pytest.approx(1.0))
        assert found.low == pytest.approx(1 / (1 + z**2 / 16))

    def test_more_networks_are_not_more_images(self) -> None:
        assert rate(np.ones((8, 16))) == rate(np.ones((1, 16)))

    def test_disagreeing_networks_widen_the_interval(self) -> None:
        found = rate(np.repeat([[0.0], [1.0]], 64, axis=1))
        assert (found.low, found.high) == (0.0, 1.0)  # Wilson with 64 images would say 0.38 to 0.62

    def test_mean_of_one_network_has_the_normal_width(self) -> None:
        values = np.random.default_rng(1).normal(size=(1, 400))
        low, high = bootstrap(values)
        known = 2 * 1.96 * values.std() / 20
        assert high - low == pytest.approx(known, rel=0.08)

    def test_bootstrap_covers_the_true_mean(self) -> None:
        rng = np.random.default_rng(2)
        hits = 0
        for _ in range(100):
            low, high = bootstrap(rng.normal(size=(1, 40)))
            hits += low <= 0 <= high
        assert 88 <= hits <= 100

    def test_crossed_variance_adds_both_sides(self) -> None:
        networks, images = np.random.default_rng(3).normal(size=(2, 40))
        low, high = bootstrap(networks[:, None] + images[None, :])
        known = 2 * 1.96 * math.sqrt(networks.var() / 40 + images.var() / 40)
        assert high - low == pytest.approx(known, rel=0.1)

    def test_median_agrees_with_a_plain_bootstrap(self) -> None:
        values = np.random.default_rng(4).exponential(size=51)
        rng = np.random.default_rng(5)
        known = np.quantile([np.median(rng.choice(values, 51)) for _ in range(4000)], [0.025, 0.975])
        assert bootstrap(values[None, :], "median") == pytest.approx(known, abs=0.08)

    def test_median_of_an_even_number_is_between(self) -> None:
        low, high = bootstrap(np.array([[1.0, 3.0]]), "median")
        assert (low, high) == (1.0, 3.0)
        assert spread(np.array([[1.0, 3.0]])).median == 2.0

    def test_holes_are_left_out(self) -> None:
        full = np.array([[0.1, 0.5, 0.9]])
        holed = np.array([[0.1, NAN, 0.5, 0.9], [NAN, NAN, NAN, NAN]])
        assert spread(holed).median == spread(full).median == 0.5
        assert mean(holed).value == pytest.approx(0.5)
        assert bootstrap(holed)[0] >= 0.1

    def test_overlap_of_equal_values_is_not_certain(self) -> None:
        found = overlap(np.full((1, 16), 0.5))
        assert (found.low, found.high) == pytest.approx(wilson(0.5, 16))
        assert overlap(np.ones((1, 16))) == rate(np.ones((1, 16)))

    def test_overlap_between_is_a_mean(self) -> None:
        values = np.array([[0.25, 0.5, 0.75, 1.0]])
        assert overlap(values) == mean(values)

    def test_difference_of_shares_where_no_pair_differs(self) -> None:
        found = share_difference(np.zeros((2, 16)))
        half = stats.norm.ppf(0.975) * math.sqrt((2 / 18) / 18)  # Bonett and Price with no discordant pair
        assert (found.value, found.low, found.high) == (0.0, pytest.approx(-half), pytest.approx(half))

    def test_difference_of_shares_by_hand(self) -> None:
        found = share_difference(np.array([[1.0] + [0.0] * 15 + [NAN]]))
        up, down = 2 / 18, 1 / 18
        half = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / 18)
        assert dataclasses.astuple(found) == pytest.approx((1 / 16, up - down - half, up - down + half))

    def test_difference_of_shares_on_networks_that_disagree(self) -> None:
        found = share_difference(np.repeat([[-1.0], [1.0]], 64, axis=1))
        assert (found.low, found.high) == (-1.0, 1.0)

    def test_difference_of_overlaps(self) -> None:
        found = overlap_difference(np.full((1, 9), 0.5))
        low, high = wilson(0.75, 9)
        assert (found.value, found.low, found.high) == pytest.approx((0.5, 2 * low - 1, 2 * high - 1))
        values = np.array([[0.5, -0.25, 0.0]])
        assert overlap_difference(values) == mean(values)

    def test_difference_of_shares_covers_the_truth(self) -> None:
        rng, hits = np.random.default_rng(6), 0
        for _ in range(100):
            found = share_difference(rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=(1, 30)))
            hits += found.low <= 0.2 <= found.high
        assert 90 <= hits <= 100

    @pytest.mark.parametrize("function", [rate, mean, spread, overlap, overlap_difference, share_difference])
    def test_nothing_gives_nothing(self, function: Any) -> None:
        for empty in (np.empty((0, 0)), np.full((2, 3), NAN)):
            assert all(math.isnan(value) for value in dataclasses.astuple(function(empty)))


class TestLeakRule:
    @pytest.mark.parametrize(
        ("ssim", "control", "leaks"),
        [
            (0.7, 0.6, 1),
            (0.69, 0.1, 0),  # too different
            (0.75, 0.7, 0),  # the control does nearly as well
            (0.8, 0.7, 1),  # exactly the margin, which has no exact binary form
            (0.95, 0.94, 0),
            (0.95, NAN, 1),  # a control that broke guessed nothing
            (NAN, 0.1, 0),
        ],
    )
    def test_threshold_and_margin(self, ssim: float, control: float, leaks: int) -> None:
        report = report_of([outcome([ssim]), outcome([control], attacker="control:prior_only")])
        assert row_of(report, "none", "naive").leak_rate.value == leaks

    def test_best_of_the_controls_counts(self) -> None:
        found = [
            outcome([0.8, 0.8, 0.8]),
            outcome([0.1, 0.75, 0.1], attacker="control:prior_only"),
            outcome([0.1, 0.1, 0.75], attacker="control:other_client"),
        ]
        assert row_of(report_of(found), "none", "naive").leaks == 1

    def test_class_mean_counts_for_every_cell_and_other_controls_for_their_own(self) -> None:
        found = [
            outcome([0.8, 0.8]),
            outcome([0.75, 0.1], attacker="control:class_mean"),
            outcome([0.8, 0.8], defense=(MASK,)),
            outcome([0.1, 0.75], defense=(MASK,), attacker="control:prior_only"),
        ]
        report = report_of(found)
        assert row_of(report, "none", "naive").leaks == 1
        assert row_of(report, "random_masking(rate=0.5)", "naive").leaks == 0

    def test_controls_are_of_the_same_network(self) -> None:
        found = [outcome([0.8], seed=0), outcome([0.8], seed=1), outcome([0.75], seed=1, attacker="control:class_mean")]
        row = row_of(report_of(found), "none", "naive")
        assert (row.n, row.leaks, row.networks, row.images, row.uncontrolled) == (2, 1, 2, 1, 1)

    def test_a_control_needs_the_threshold_only(self) -> None:
        found = [
            outcome([0.1, 0.75], attacker="control:prior_only"),
            outcome([0.9, 0.9], attacker="control:class_mean"),
        ]
        report = report_of(found)
        assert row_of(report, "none", "control:prior_only").leaks == 1
        assert math.isnan(row_of(report, "none", "control:prior_only").lift.value)

    def test_rates_beside_it_ignore_the_controls(self) -> None:
        found = [outcome([0.9, 0.89], mse=[1e-3, 9e-4]), outcome([0.9, 0.9], attacker="control:prior_only")]
        row = row_of(report_of(found), "none", "naive")
        assert (row.leak_rate.value, row.leak_rate_90.value, row.leak_rate_mse.value) == (0, 0.5, 0.5)


class TestRows:
    def test_hand_computed(self) -> None:
        row = row_of(report_of(mixed()), "none", "naive")
        assert (row.n, row.networks, row.images) == (8, 2, 4)
        assert row.leak_rate.value == 0.5
        assert row.ssim.median == pytest.approx(0.775)
        assert row.lift.value == pytest.approx((0.75 + 0.3) / 2)
        assert row.label_accuracy.mean == 1.0
        assert row.identified is not None
        assert row.identified.value == 0.5
        assert (row.evaluations, row.seconds) == (50, 2.5)  # the failed trial's too
        assert row.statuses == {"converged": 4, "failed": 1}

    def test_broken_scores_count_as_no_leak_and_are_counted(self) -> None:
        row = row_of(report_of(mixed()), "gaussian_noise(std=0.1)", "naive")
        assert (row.n, row.nan, row.leaks) == (8, 4, 0)
        assert row.ssim.median == pytest.approx(0.1)
        assert row.mse.median == pytest.approx(0.3)

    def test_without_scores(self) -> None:
        row = row_of(report_of(mixed()), "gaussian_noise(std=0.1)", "adaptive:denoise")
        assert (row.n, row.statuses) == (0, {"refused": 4})
        assert math.isnan(row.leak_rate.value)

    def test_perfect_copies(self) -> None:
        row = report_of([outcome([1.0], mse=[0.0], psnr=[math.inf])]).rows[0]
        assert (row.psnr.median, row.leak_rate_mse.value, row.nan) == (100.0, 1.0, 0)

    def test_an_image_met_twice_counts_once(self) -> None:
        row = report_of([outcome([0.3, 0.8], episode=(5, 5))]).rows[0]
        assert (row.n, row.leaks) == (1, 1)

    def test_plan_order(self) -> None:
        found = mixed()
        report = summarize(setting(found[::-1]), found)
        names = [(row.defense, row.attacker) for row in report.rows]
        assert names[0] == ("none", "naive")  # the failed trial is planned first now
        assert names[1] == ("gaussian_noise(std=0.1)", "adaptive:denoise")

    def test_order_of_outcomes_does_not_matter(self) -> None:
        found = [*mixed(), outcome([0.1, 0.1], episode=(0, 1))]  # the last is a second line for a planned trial
        plan = setting(mixed())
        first = summarize(plan, found).to_json()
        for number in range(3):
            random.Random(number).shuffle(found)
            assert summarize(plan, found).to_json() == first

    def test_unplanned_and_tuning_outcomes_stay_out(self) -> None:
        found = mixed()
        report = summarize(setting(found[:-1]), [*found, outcome([1.0], episode=(77,))])
        assert report.unplanned == 1
        assert report.tuning == {"trials": 1, "evaluations": 10, "seconds": 0.5}
        assert row_of(report, "none", "naive").images == 4

    def test_changed_store_is_an_error(self) -> None:
        with pytest.raises(StoreError, match="2 values of 'ssim' for 1 images"):
            report_of([outcome([0.1, 0.2], episode=(3,))])


class TestNames:
    def test_strength_and_what_is_not_default(self) -> None:
        specs = [Spec.of("clip", {"norm": norm, "scale": "absolute"}) for norm in (0.5, 1.0)]
        report = report_of([outcome([0.1], defense=(spec,)) for spec in specs])
        assert [row.defense for row in report.rows] == ["clip(norm=0.5)", "clip(norm=1)"]

    def test_chain_shows_what_is_set(self) -> None:
        row = report_of([outcome([0.1], defense=(MASK, NOISE))]).rows[0]
        assert row.defense == "random_masking(rate=0.5) -> gaussian_noise(std=0.1)"

    def test_tuned_options_do_not_split_an_attack(self) -> None:
        found = [outcome([0.1]), outcome([0.1], defense=(MASK,), attack=IDLG.replace(tv=0.1))]
        assert {row.attack for row in report_of(found).rows} == {"idlg"}

    def test_rivals_are_told_apart_by_the_listed_option(self) -> None:
        found = [
            outcome([0.1], defense=defense, attack=IDLG.replace(steps=steps, tv=tv))
            for defense, steps, tv in (((), 100, 0.0), ((), 200, 0.1), ((MASK,), 100, 0.1), ((MASK,), 200, 0.2))
        ]
        assert [row.attack for row in report_of(found).rows] == ["idlg(steps=100)", "idlg(steps=200)"] * 2


class TestComparisons:
    def test_paired(self) -> None:
        rng = np.random.default_rng(0)
        low, gain = rng.uniform(0.1, 0.5, (2, 8)), rng.uniform(0.1, 0.3, (2, 8))
        found = []
        for seed in (0, 1):
            found.append(outcome(list(low[seed]), defense=(MASK,), seed=seed))
            found.append(
                outcome(list(low[seed] + gain[seed]), defense=(MASK,), seed=seed, attacker="adaptive:survivors")
            )
        (test,) = report_of(found).comparisons
        assert (test.attacker, test.against, test.n) == ("adaptive:survivors", "naive", 8)
        assert test.difference.value == pytest.approx(gain.mean())
        assert test.difference.low < gain.mean() < test.difference.high
        assert test.p == pytest.approx(2 / 2**8)  # all eight differences positive

    def test_too_few_images_and_no_difference(self) -> None:
        few = [outcome([0.1] * 5, attacker=who) for who in ("naive", "adaptive:a")]
        assert math.isnan(report_of(few).comparisons[0].p)
        equal = [outcome([0.1] * 6, attacker=who) for who in ("naive", "adaptive:a")]
        assert report_of(equal).comparisons[0].p == 1.0


class TestJson:
    def test_keys_in_order(self) -> None:
        record = json.loads(report_of(mixed()).to_json())
        assert list(record)[:5] == ["schema", "kind", "verdict", "rows", "versions"]
        assert (record["schema"], record["kind"], record["complete"]) == (1, "update", True)
        wanted = (
            "task state threat defense attack attacker n networks leak_rate leak_rate_90 leak_rate_mse psnr ssim mse"
        )
        wanted += " label_accuracy lift evaluations seconds statuses"
        assert list(record["rows"][0])[:19] == wanted.split()
        assert list(record["rows"][0]["leak_rate"]) == ["value", "low", "high"]
        assert list(record["rows"][0]["ssim"]) == ["median", "mean", "low", "high", "q10", "q90"]
        identified = [(row["defense"], row["attacker"]) for row in record["rows"] if "identified" in row]
        assert identified == [("none", "naive")]

    def test_strict_with_missing_values(self) -> None:
        def refuse(name: str) -> None:
            raise AssertionError(name)

        broken = outcome([NAN, math.inf], mse=[math.inf, NAN], label_accuracy=[NAN, NAN], attacker="adaptive:a")
        text = report_of([*mixed(), broken]).to_json()
        record = json.loads(text, parse_constant=refuse)
        row = next(row for row in record["rows"] if row["attacker"] == "adaptive:a")
        assert row["mse"]["median"] is None
        assert row["label_accuracy"] == dict.fromkeys(["median", "mean", "low", "high", "q10", "q90"])

    def test_deterministic(self) -> None:
        assert report_of(mixed()).to_json() == report_of(mixed()).to_json()

    def test_survives_the_store(self) -> None:
        found = [Outcome.from_json(o.to_json()) for o in mixed()]
        assert report_of(found).to_json() == report_of(mixed()).to_json()


class TestVerdict:
    def test_in_full(self) -> None:
        found = [outcome([0.9] * 16)]
        found.append(outcome([0.1] * 16, defense=(MASK,)))
        found.append(outcome([0.9] * 16, defense=(MASK,), attacker="adaptive:survivors"))
        found.append(outcome([0.1] * 16, defense=(NOISE,)))
        found.append(outcome([0.1] * 16, defense=(NOISE,), attacker="adaptive:denoise"))
        assert report_of(found).verdict == (
            "Undefended, the attacks tried recovered 16 of 16 images (100 %, 95 % interval 81-100 %) from one update; "
            "of 2 defenses, 1 fell to an attacker who knows it (random_masking(rate=0.5): 16 of 16) and "
            "1 was not broken by the attacks tried (gaussian_noise(std=0.1): 0 of 16)."
        )

    def test_levels(self) -> None:
        masks = [Spec.of("random_masking", {"rate": rate}) for rate in (0.1, 0.3, 0.5)]
        found = [outcome([0.9] * 20)]
        for mask, hits in zip(masks, (10, 2, 1), strict=True):
            found.append(outcome([0.9] * hits + [0.1] * (20 - hits), defense=(mask,)))
        text = report_of(found).verdict
        assert "1 fell even to an attacker who does not know it (random_masking(rate=0.1): 10 of 20" in text
        assert "1 gave way in part (random_masking(rate=0.3): 2 of 20" in text
        assert "1 was not broken by the attacks tried (random_masking(rate=0.5): 1 of 20" in text
        assert "who do not know it only" in text  # no adaptive attacker was tried

    def test_worst_attack_counts(self) -> None:
        other = Spec.of("inverting_gradients")
        found = [outcome([0.1] * 4), outcome([0.9] * 4, attack=other)]
        assert "recovered 4 of 4" in report_of(found).verdict

    def test_one_defense_without_scores(self) -> None:
        text = report_of([outcome([0.9] * 4), outcome([], defense=(MASK,), status="refused")]).verdict
        assert "; the one defense tried could not be scored (random_masking(rate=0.5))" in text
        assert text.endswith("; 1 of 2 attack trials diverged, failed or were refused.")

    def test_a_failed_self_test_is_said(self) -> None:
        stays = outcome([1.0], attacker="check:truth")
        leaves = outcome([0.5], attacker="check:truth", episode=(9,))
        loses = dataclasses.replace(outcome([1.0], attacker="check:truth", episode=(8,)), facts={"truth_loss": 0.01})
        assert "self-test" not in report_of([outcome([0.9]), stays]).verdict
        text = report_of([outcome([0.9]), stays, leaves, loses]).verdict
        assert "the self-test that starts at the truth failed in 2 of 3 trials" in text

    def test_facts_of_the_update_are_medians(self) -> None:
        found = [outcome([0.9], episode=(i,)) for i in range(3)]
        facts = ({"update_norm": 1.0, "zeros": 0.5}, {"update_norm": 5.0, "zeros": 0.52}, {"update_norm": math.nan})
        (row,) = report_of([dataclasses.replace(o, facts=f) for o, f in zip(found, facts, strict=True)]).rows
        assert (row.update_norm, row.zeros) == (3.0, pytest.approx(0.51))

    def test_below_the_threshold_is_not_nothing(self) -> None:
        """No leak, but far above the controls: a rate of zero alone would mislead."""
        control = outcome([0.1] * 8, attacker="control:prior_only")
        report = report_of([outcome([0.6] * 8), control])
        assert "recovered 0 of 8 images" in report.verdict
        assert "yet with SSIM 0.50 above the best control" in report.verdict
        assert "yet" not in report_of([outcome([0.12] * 8), control]).verdict

    def test_nothing_to_stop(self) -> None:
        assert "says little about the defenses" in report_of([outcome([0.1]), outcome([0.1], defense=(MASK,))]).verdict

    def test_several_networks_and_rounds(self) -> None:
        found = [outcome([0.9] * 4, seed=seed, batch_size=2) for seed in range(3)]
        text = report_of(found).verdict
        assert "recovered 12 of 12 cases (4 images on 3 networks; 100 %" in text
        assert "from 2 updates in a row" in text

    def test_incomplete_and_empty(self) -> None:
        found = mixed()
        part = summarize(setting(found), found[:5])
        assert part.verdict.startswith("Incomplete (5 of 34 trials): Undefended")
        assert not part.complete
        assert "no attack has produced a score" in summarize(setting(found), []).verdict
        assert report_of([]).verdict.startswith("No attack has produced a score")

    def test_complete_without_a_score(self) -> None:
        """Nothing more will come, and what went wrong is said."""
        found = [outcome([], status="failed")]
        assert report_of(found).verdict == (
            "No attack has produced a score, so that nothing can be said about leaks; "
            "1 of 1 attack trials diverged, failed or were refused."
        )

    def test_meaning_ends_with_how_much_it_rests_on(self) -> None:
        """However much there is to say of the defenses."""
        fell = [outcome([0.9, 0.9], defense=(MASK,), attacker="adaptive:survivors")]
        held = [outcome([0.0, 0.0], defense=(NOISE,), attacker="adaptive:denoise")]
        said = meaning(report_of([outcome([0.9, 0.9]), *fell, *held]))
        assert [sentence.split(" ")[0] for sentence in said] == ["Assume", "A", "“Not", "The"]
        assert said[-1].startswith("The results rest on 2 images")

    def test_promises_nothing(self) -> None:
        texts = [
            report_of(mixed()).verdict,
            report_of([outcome([0.0])]).verdict,
            report_of([]).verdict,
            *WORDS.values(),
        ]
        assert not any(word in text.lower() for text in texts for word in ("safe", "secure"))
