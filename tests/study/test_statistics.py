"""Intervals over seeds and examples hold as often as they say, and tests are right under the null and under a gain."""

from __future__ import annotations

import numpy as np
import pytest

from lofi.evaluate.intervals import bootstrap
from lofi.study.record import Measured, RunRecord
from lofi.study.statistics import bounds, holm, sign, summarise
from study.made_records import LATENCY, arm_runs, failed, means, rows, run


def test_a_value_is_the_mean_over_seeds_of_each_seeds_figure():
    found = summarise([run("lora r=4", 0, [0.2, 0.4]), run("lora r=4", 1, [0.6, 1.0])]).get("lora r=4")
    score = found.scores["rouge1"]
    assert score.value == pytest.approx((0.3 + 0.8) / 2)
    assert score.spread == pytest.approx(0.5 / 2**0.5)
    assert (score.rows, score.seeds, found.n_seeds) == (2, 2, 2)


def test_a_figure_that_is_no_mean_is_worked_out_per_seed_from_its_sums():
    def perplexities(*losses: float) -> Measured:
        return Measured(np.array([[loss, 10.0] for loss in losses]), "exp_ratio")

    runs = [run("full", 0, perplexities(10, 30), "perplexity"), run("full", 1, perplexities(0, 20), "perplexity")]
    assert summarise(runs).get("full").scores["perplexity"].value == pytest.approx((np.exp(2) + np.exp(1)) / 2)


def test_one_seed_gives_the_interval_over_rows_that_evaluate_gives():
    values = rows(50)
    score = summarise([run("lora r=4", 0, values)], seed=3, n=1000).get("lora r=4").scores["rouge1"]
    value, low, high = bootstrap(values, seed=3, n=1000)
    assert (score.value, score.low, score.high, score.spread) == (value, low, high, None)


def test_one_row_of_one_seed_has_no_interval_and_no_test():
    found = summarise([run("base", None, [0.1]), run("lora r=4", 0, [0.4])]).get("lora r=4")
    assert found.scores["rouge1"].low is None and found.contrast("base", "rouge1") is None


def test_intervals_hold_for_new_rows_and_new_seeds_where_drawing_from_three_seeds_would_not():
    """300 studies whose truth is 0.5; seeds move the figure more than rows do."""
    hits = naive = 0
    for study in range(300):
        rng = np.random.default_rng(study)
        luck, hard = rng.normal(0, 0.1, 3), rng.normal(0.5, 0.3, 60)
        found = summarise([run("full", seed, hard + luck[seed]) for seed in range(3)], seed=study, n=400)
        score = found.get("full").scores["rouge1"]
        hits += score.low <= 0.5 <= score.high
        drawn = luck[rng.integers(0, 3, (400, 3))].mean(1) + hard[rng.integers(0, 60, (400, 60))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        naive += low <= 0.5 <= high
    assert 0.92 <= hits / 300 <= 0.99
    assert naive / 300 < 0.88


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_uniform_where_two_arms_differ_by_nothing_but_luck(seeds):
    """With one seed the luck is of rows only, for that is all that p then speaks of."""
    ps = []
    for study in range(250):
        rng = np.random.default_rng(study)
        hard, luck = rng.normal(0, 0.3, 60), (0.05 if seeds > 1 else 0.0)
        runs = [
            run(arm, seed, means(hard + rng.normal(0, luck) + rng.normal(0, 0.2, 60)), "own")
            for arm in ("full", "lora r=4")
            for seed in range(seeds)
        ]
        ps.append(summarise(runs, seed=study, n=400).get("lora r=4").contrast("full", "own").p)
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(ps) <= level) == pytest.approx(level, abs=0.08), level


def test_a_small_gain_on_hard_and_easy_rows_alike_is_seen_because_rows_are_paired():
    found = summarise([*arm_runs("full", 0.03), *arm_runs("lora r=4", 0.0)])
    ours, theirs = (found.get(arm).scores["rouge1"] for arm in ("lora r=4", "full"))
    assert ours.high > theirs.low  # the intervals overlap
    test = found.get("lora r=4").contrast("full", "rouge1")
    assert test.significant and test.high < 0
    shuffled = [run("lora r=4", seed, np.roll(rows(), 7 + seed)) for seed in range(3)]
    assert not summarise([*arm_runs("full", 0.03), *shuffled]).get("lora r=4").contrast("full", "rouge1").significant


def test_arms_with_the_same_seeds_are_paired_by_seed_and_others_are_not():
    """A seed's luck that both arms share says nothing about their difference."""
    luck, hard = (0.0, 0.2, -0.15), rows()
    ours = [run("lora r=4", seed, hard + luck[seed] + 0.02) for seed in range(3)]
    full = [run("full", seed, hard + luck[seed]) for seed in range(3)]
    paired = summarise([*full, *ours]).get("lora r=4").contrast("full", "rouge1")
    assert paired.low == pytest.approx(0.02) and paired.high == pytest.approx(0.02)
    apart = summarise([*full, *ours[:2]]).get("lora r=4").contrast("full", "rouge1")
    assert apart.low < -0.1 and not apart.significant
    assert summarise([*full, *reversed(ours)]).get("lora r=4").contrast("full", "rouge1") == paired


def test_holm_corrects_step_by_step_in_any_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_is_corrected_over_the_arms_of_a_metric_but_not_over_metrics():
    runs = [*arm_runs("base", 0.0, seeds=1)[:1], *(one for r in (1, 2, 3) for one in arm_runs(f"lora r={r}", 0.01 * r))]
    found = summarise(runs)
    tests = [found.get(f"lora r={r}").contrast("base", "rouge1") for r in (1, 2, 3)]
    assert [test.corrected for test in tests] == pytest.approx(holm([test.p for test in tests]))
    assert found.get("base").contrasts["base"] == {}


def test_the_same_seed_gives_the_same_figures_and_an_arm_does_not_depend_on_the_others():
    ours, full = arm_runs("lora r=4", 0.1), arm_runs("full", 0.12)
    assert summarise([*full, *ours]) == summarise([*full, *ours])
    alone, beside = (summarise(runs).get("lora r=4").scores for runs in (ours, [*full, *ours]))
    assert alone == beside
    assert summarise(ours, seed=1).get("lora r=4").scores != alone


def test_best_and_full_are_chosen_by_the_first_metric_the_way_it_is_better():
    def study(metric: str):
        quality = {"full lr=1": 0.1, "full lr=2": 0.2, "lora r=4": 0.3}
        return summarise(
            [run("base", None, rows(), metric)] + [run(a, 0, rows() + q, metric) for a, q in quality.items()]
        )

    assert (study("rouge1").best, study("rouge1").full) == ("lora r=4", "full lr=2")
    assert (study("perplexity").best, study("perplexity").full) == ("full lr=1", "full lr=1")
    assert sign("loss") == sign("perplexity") == -sign("bleu") == -1


def test_intervals_stay_within_what_a_metric_can_be():
    found = summarise([run("lora r=4", seed, values) for seed, values in enumerate(([0.1, 0.2], [0.9, 1.0]))])
    assert (found.get("lora r=4").scores["rouge1"].low, found.get("lora r=4").scores["rouge1"].high) == (0.0, 1.0)
    assert bounds("bleu") == (0, 100) and bounds("perplexity")[0] == 1 and bounds("mine") == (-np.inf, np.inf)


def test_figures_are_means_with_their_range_and_ratios_are_taken_run_by_run():
    base = {"general_ppl_base": 10.0, "latency_base_ms": 20.0}
    runs = [
        run("lora r=4", 0, rows(), trainable=8.0, peak_mb=100.0, general_ppl=11.0, latency_ms=24.0, **base),
        run("lora r=4", 1, rows(), trainable=8.0, peak_mb=140.0, general_ppl=13.0, latency_ms=26.0, **base),
    ]
    arm = summarise(runs).get("lora r=4")
    assert arm.figure("forgetting") == pytest.approx(1.2) and arm.figure("latency_ratio") == pytest.approx(1.25)
    peak = arm.figures["peak_mb"]
    assert (peak.mean, peak.low, peak.high) == (120, 100, 140)
    assert arm.figure("latency_merged_ratio") is None and arm.figure("adapter_mb") is None
    whole = summarise(arm_runs("lora r=4", 0.1, **LATENCY)).get("lora r=4")
    assert whole.figure("latency_merged_ratio") == 1.0


def test_failed_runs_are_counted_and_listed_and_lose_nothing_else():
    found = summarise([*arm_runs("lora r=4", 0.1, seeds=2), failed("lora r=4", 2), failed("prefix", 0)])
    assert (found.get("lora r=4").n_seeds, found.get("lora r=4").failed) == (2, 1)
    assert found.get("prefix").scores == {} and [one.arm for one in found.failures] == ["lora r=4", "prefix"]
    assert found.best == "lora r=4" and found.trained == (found.get("lora r=4"),)


def test_a_perplexity_that_is_infinite_is_a_figure_without_interval_or_test():
    runaway = Measured(np.full((30, 2), [1e6, 1.0]), "exp_ratio")
    sound = [
        run("lora r=4", seed, Measured(np.full((30, 2), [2.0, 1.0]), "exp_ratio"), "perplexity") for seed in (0, 1)
    ]
    found = summarise([*sound, run("full", 0, runaway, "perplexity"), run("full", 1, runaway, "perplexity")])
    score = found.get("full").scores["perplexity"]
    assert score.value == np.inf and score.low is None and score.spread is None
    assert found.full is None and found.best == "lora r=4" and found.get("full").contrast("best", "perplexity") is None


def test_a_run_that_answered_other_rows_counts_as_failed_and_loses_no_other():
    found = summarise([run("full", 0, rows(6)), run("full", 1, rows(6)), run("lora r=4", 0, rows(5))])
    (failure,) = found.failures
    assert failure.run == "lora-r=4-s0" and "on 5 rows as mean, in most runs on 6 as mean" in failure.error
    assert found.best == "full" and found.get("lora r=4").scores == {} and found.get("lora r=4").failed == 1


def test_no_records_or_none_that_is_done_give_empty_statistics():
    assert summarise([]).arms == () and summarise([]).best is None
    found = summarise([failed("prefix", 0)])
    assert found.metrics == () and found.trained == () and found.base is None


def test_the_base_stands_first_and_the_seed_is_no_part_of_an_arm():
    base = RunRecord(name="base", arm="base", method="base", seed=None, measures={"rouge1": means(rows())})
    found = summarise([*arm_runs("lora r=4", 0.1), base])
    assert [arm.name for arm in found.arms] == ["base", "lora r=4"]
    assert found.get("lora r=4").overrides == {"method": "lora", "lora.r": 4}
