"""The verdict takes the cheapest arm that is good enough, and claims no more than the study can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lofi.study.record import Measured, RunRecord
from lofi.study.statistics import Statistics, summarise
from lofi.study.verdict import Verdict, cost, verdict
from study.made_records import LATENCY, arm_runs, failed, rows, run


def the_base(quality: float = 0.0) -> RunRecord:
    return run("base", None, rows() + quality)


def a_study(*arms: tuple[str, float, dict], seeds: int = 3) -> Statistics:
    runs = [one for name, quality, figures in arms for one in arm_runs(name, quality, seeds=seeds, **figures)]
    return summarise([the_base(), *runs])


FULL = {"trainable": 40_000.0, "adapter_mb": 4.0, "peak_mb": 300.0, **(LATENCY | {"latency_ms": 20.0})}
SMALL = {"trainable": 1000.0, "adapter_mb": 0.5, "peak_mb": 150.0, **LATENCY}
LARGE = SMALL | {"trainable": 4000.0}


def test_a_clear_winner_that_is_the_cheapest_too_is_taken_without_ado():
    found = verdict(a_study(("lora r=4", 0.3, SMALL), ("full", 0.1, FULL)))
    assert found.take == "lora r=4"
    assert found.words.startswith("Take lora r=4: with 1,000 trainable parameters it reaches ROUGE-1 0.8")
    assert "the best of 2 arms, and it is also the cheapest" in found.words
    assert "Full fine-tuning is worse (-0.19" in found.words


def test_the_cheapest_arm_within_the_margin_is_taken_over_the_best():
    statistics = a_study(("lora r=1", 0.3, SMALL), ("lora r=4", 0.304, LARGE), ("full", 0.31, FULL))
    found = verdict(statistics)
    assert (found.take, statistics.best) == ("lora r=1", "full")
    assert "short of the best, full (0.8" in found.words and "the cheapest within 2 %" in found.words
    assert verdict(statistics, margin=0.001).take == "full"


def test_a_cheaper_arm_beyond_the_margin_is_not_taken_however_little_the_study_can_tell():
    few = [
        *arm_runs("lora r=4", 0.3, n=12, seeds=1, noise=0.3, **LARGE),
        *arm_runs("lora r=1", 0.2, n=12, seeds=1, noise=0.3, **SMALL),
    ]
    statistics = summarise([run("base", None, rows(12) - 0.5), *few])
    short = statistics.get("lora r=1").contrast("best", "rouge1")
    assert short is not None and short.p > 0.05  # else this tests nothing
    found = verdict(statistics)
    assert found.take == "lora r=4"
    assert (
        "Cheaper still and not told apart from the best, though more than 2 % short as measured: lora r=1"
        in found.words
    )


def test_what_full_fine_tuning_gains_and_costs_is_said_with_its_p():
    found = verdict(a_study(("lora r=4", 0.30, SMALL), ("full", 0.312, FULL)), margin=0.05)
    assert found.take == "lora r=4"
    assert "Full fine-tuning is better (+0.01" in found.words and "p = 0." in found.words
    assert "40 times the trainable parameters (40,000 against 1,000)" in found.words
    assert "8.00 times the disk space (4 MB against 0.5 MB)" in found.words
    assert "2.00 times the peak memory in training (300 MB against 150 MB)" in found.words
    assert "Inference with lora r=4 takes 1.20 times the base's time (1.00 times once merged)." in found.words


def test_where_full_fine_tuning_is_taken_its_price_beside_the_nearest_cheaper_arm_is_said():
    found = verdict(a_study(("lora r=1", 0.1, SMALL), ("lora r=4", 0.2, LARGE), ("full", 0.3, FULL)))
    assert found.take == "full" and "(the nearest, lora r=4, lacks 13 %)" in found.words
    assert "Beside lora r=4, the nearest cheaper arm, it costs 10 times the trainable parameters" in found.words
    assert "Inference" not in found.words  # the base's own layers: only noise differs


def test_a_method_that_cannot_be_merged_and_what_is_forgotten_are_said():
    forgets = {"general_ppl": 12.0, "general_ppl_base": 10.0}
    keeps = {"general_ppl": 9.9, "general_ppl_base": 10.0}
    apart = {key: value for key, value in SMALL.items() if key != "latency_merged_ms"}
    found = verdict(a_study(("prefix", 0.3, apart | keeps), ("full", 0.3, FULL | forgets)))
    assert "takes 1.20 times the base's time (it cannot be merged)." in found.words
    assert "changes by -1 % under prefix and by +20 % under full" in found.words


def test_without_full_fine_tuning_nothing_is_said_of_what_it_gains():
    found = verdict(a_study(("lora r=4", 0.3, SMALL), ("prefix", 0.1, SMALL)))
    assert "Full fine-tuning is not part of this study" in found.words and "costs" not in found.words


def test_where_everything_is_worse_than_the_base_the_base_is_kept():
    found = verdict(a_study(("lora r=4", -0.1, SMALL), ("full", -0.2, FULL)))
    assert found.take is None and found.head == "Keep the base"
    assert "nothing that was trained is better in ROUGE-1 than its 0.5" in found.words


def test_where_nothing_can_be_told_from_the_base_nothing_is_taken():
    def at(mean: float, seed: int):
        return rows(20, seed) - rows(20, seed).mean() + mean

    found = verdict(summarise([run("base", None, at(0.5, 7)), run("lora r=1", 0, at(0.53, 1))]))
    assert found.take is None and found.head.startswith("Take none of them yet")
    assert "the best, lora r=1 (0.5300), differs by +0.0300 (-" in found.words


def test_one_seed_says_that_small_differences_may_be_luck():
    found = verdict(a_study(("lora r=4", 0.3, SMALL), ("full", 0.31, FULL), seeds=1))
    assert "one seed an arm" in found.words and "may be luck" in found.words
    several = verdict(a_study(("lora r=4", 0.3, SMALL), ("full", 0.31, FULL), seeds=3))
    assert "may be luck" not in several.words and "200 test rows and 3 seeds an arm" in several.words


def test_arms_of_different_numbers_of_seeds_are_said_to_be_so():
    runs = [*arm_runs("lora r=4", 0.3, seeds=3), *arm_runs("full", 0.1, seeds=1)]
    assert "1 to 3 seeds an arm; arms with one seed have intervals over rows only" in verdict(summarise(runs)).words


def test_failed_runs_are_counted_and_named():
    runs = [
        the_base(),
        *arm_runs("lora r=4", 0.3),
        *arm_runs("full", 0.2, seeds=2),
        failed("full", 2),
        failed("prefix", 0),
    ]
    assert "2 of 7 runs failed and are not in this: full and prefix." in verdict(summarise(runs)).words


def test_where_every_run_failed_there_is_nothing_to_recommend():
    found = verdict(summarise([the_base(), failed("prefix", 0)]))
    assert found.take is None and found.sentences[1] == "1 of 1 run failed and is not in this: prefix."
    assert verdict(summarise([])).words == "No trained arm gave a figure, so there is nothing to recommend."


def test_one_arm_is_no_choice_and_without_a_base_no_gain_is_claimed():
    found = verdict(summarise(arm_runs("lora r=4", 0.3)))
    assert found.words.startswith("Only lora r=4 was trained, so there is nothing to choose from")
    assert "The base model was not measured" in found.words and "corrected" not in found.words


def test_less_perplexity_is_better():
    def losses(arm: str, nats: float, trainable: float) -> RunRecord:
        import numpy as np

        table = np.stack([np.random.default_rng(1).gamma(40, nats / 40, 80), np.ones(80)], axis=1)
        return run(arm, 0 if arm != "base" else None, Measured(table, "exp_ratio"), "perplexity", trainable=trainable)

    found = verdict(summarise([losses("base", 3.0, 0), losses("lora r=4", 2.0, 10), losses("full", 1.0, 100)]))
    assert (
        found.take == "full"
        and "the best of 2 arms, and no cheaper arm comes within 2 % of it (the nearest, lora r=4, lacks" in found.words
    )


def test_ties_go_to_faster_inference_then_faster_training_then_fewer_settings():
    slow, fast = SMALL | {"latency_merged_ms": None, "latency_ms": 30.0}, SMALL
    statistics = a_study(("lora r=4", 0.3, slow), ("olora r=4", 0.3, fast))
    assert verdict(statistics).take == "olora r=4"
    arm = statistics.get("lora r=4")
    faster = replace(arm, figures={**arm.figures, "tokens_per_second": replace(arm.figures["trainable"], mean=900.0)})
    slower = replace(arm, figures={**arm.figures, "tokens_per_second": replace(arm.figures["trainable"], mean=400.0)})
    assert cost(faster) < cost(slower) < cost(arm)  # what was not measured counts as slowest
    assert cost(arm) < cost(replace(arm, overrides={**arm.overrides, "lora.use_dora": True}))
    noise = replace(arm, figures={**arm.figures, "latency_ratio": replace(arm.figures["latency_ratio"], mean=1.51)})
    assert cost(noise) == cost(arm)


def test_another_metric_that_points_elsewhere_is_said():
    runs = [the_base(), *arm_runs("lora r=4", 0.3), *arm_runs("full", 0.1)]
    bleu = {"base": 5.0, "lora": 20.0, "full": 30.0}
    runs = [
        replace(
            one,
            measures=one.measures
            | {"bleu": Measured(one.measures["rouge1"].rows * [[0, 1]] + [[bleu[one.method], 0]], "mean")},
        )
        for one in runs
    ]
    found = verdict(summarise(runs))
    assert found.take == "lora r=4" and "By BLEU full would be ahead (30.00 against 20.00)." in found.words


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_same_statistics_give_the_same_words(seeds):
    arms = (("lora r=1", 0.1, SMALL), ("lora r=4", 0.3, LARGE), ("full", 0.31, FULL))
    first, second = verdict(a_study(*arms, seeds=seeds)), verdict(a_study(*arms, seeds=seeds))
    assert isinstance(first, Verdict) and first == second
    assert first.words.startswith(first.head) and "  " not in first.words and "None" not in first.words
