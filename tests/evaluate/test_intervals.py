"""Bootstrap intervals and paired tests: their coverage, their pairing, their seeds, and too little data."""

from __future__ import annotations

import numpy as np
import pytest

from lofi.errors import RequestError
from lofi.evaluate import intervals
from lofi.evaluate.intervals import bootstrap, exp_ratio, paired_test, ratio


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, low, high = bootstrap(values, n=4000)
    assert value == pytest.approx(values.mean(), abs=1e-12)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        _, low, high = bootstrap(rng.random(80) < 0.3, seed=trial, n=300)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_perplexity_weighs_tokens_not_rows():
    rows = np.array([[10.0, 10], [0.0, 90]])  # (loss, tokens)
    assert bootstrap(rows, exp_ratio).value == pytest.approx(np.exp(0.1), abs=1e-12)
    assert bootstrap(rows, ratio).value == pytest.approx(0.1, abs=1e-12)


def test_the_resampled_statistic_is_that_of_the_rows_drawn():
    """The naive form: index the rows, apply the statistic to their sum."""
    rows = np.random.default_rng(2).random((37, 2)) + 0.5
    weights = np.concatenate(list(intervals.resamples(37, 50, 7)))
    naive = [ratio(np.repeat(rows, row.astype(int), axis=0).sum(0)) for row in weights]
    assert weights.sum(1).tolist() == [37.0] * 50
    np.testing.assert_allclose(ratio(weights @ rows), naive, rtol=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(3).random(50)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_the_block_size_changes_no_draw(monkeypatch):
    whole = np.concatenate(list(intervals.resamples(11, 40, 0)))
    monkeypatch.setattr(intervals, "_BLOCK", 70)
    blocks = list(intervals.resamples(11, 40, 0))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_a_small_gain_on_every_row_is_seen_by_the_paired_test_though_the_intervals_overlap():
    rng = np.random.default_rng(5)
    base = rng.normal(0.5, 0.3, 200)
    adapter = base + rng.normal(0.02, 0.02, 200)
    found = paired_test(adapter, base)
    assert bootstrap(adapter).low < bootstrap(base).high
    assert found.difference == pytest.approx((adapter - base).mean(), abs=1e-12)
    assert 0 < found.low < found.difference < found.high
    assert found.p == pytest.approx(2 / 1001)


def test_no_difference_has_p_one_and_noise_is_seldom_significant():
    rng = np.random.default_rng(6)
    same = rng.random(60)
    assert paired_test(same, same) == (0.0, 0.0, 0.0, 1.0)
    found = [paired_test(rng.random(60), rng.random(60), seed=i, n=400).p < 0.05 for i in range(200)]
    assert np.mean(found) < 0.12


def test_turning_the_models_round_turns_the_sign_and_keeps_p():
    rng = np.random.default_rng(7)
    a, b = rng.random(40), rng.random(40)
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference == -other.difference
    assert one.p == other.p
    assert one.low == pytest.approx(-other.high, abs=1e-12)


def test_one_row_has_a_value_and_no_interval():
    assert bootstrap([0.25]) == (0.25, None, None)
    assert paired_test([1.0], [0.25]) == (0.75, None, None, None)


def test_a_ratio_of_nothing_is_zero():
    assert bootstrap(np.zeros((3, 2)), ratio) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("call", [lambda: bootstrap([]), lambda: paired_test([], [])])
def test_no_rows_is_a_request_error(call):
    with pytest.raises(RequestError, match="no rows"):
        call()


def test_a_paired_test_of_different_rows_is_refused():
    with pytest.raises(RequestError, match="3 and 2"):
        paired_test([1, 2, 3], [1, 2])
