"""Packing and grouping on lengths: every index once, no limit broken, the seed decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lofi.data.bins import best_fit, by_length, choose_length

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(LENGTHS, st.integers(0, 30), st.integers(0, 9))
def test_bins_hold_every_index_once_and_never_more_than_the_limit(lengths, spare, seed):
    limit = max(lengths) + spare
    bins = best_fit(lengths, limit, seed=seed)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= limit for one in bins)
    assert bins == best_fit(lengths, limit, seed=seed)
    half_full = [one for one in bins if 2 * sum(lengths[index] for index in one) <= limit]
    assert len(half_full) <= 1  # two half-empty bins would have been one


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=60), st.integers(1, 300))
def test_padded_groups_hold_every_index_once_within_the_limit(sides, most):
    groups = by_length(sides, most, seed=3)
    assert sorted(index for one in groups for index in one) == list(range(len(sides)))
    for one in groups:
        width = max(sides[index][0] for index in one) + max(sides[index][1] for index in one)
        assert len(one) == 1 or len(one) * width <= most
    assert groups == by_length(sides, most, seed=3)


def test_best_fit_fills_the_fullest_bin_that_has_room():
    bins = best_fit([6, 5, 4, 3], 9, seed=0)
    assert sorted(sorted(one) for one in bins) == [[0, 3], [1, 2]]


def test_another_seed_gives_another_order():
    lengths = [5] * 40
    assert best_fit(lengths, 10, seed=0) != best_fit(lengths, 10, seed=1)
    assert by_length([(5, 0)] * 40, 10, seed=0) != by_length([(5, 0)] * 40, 10, seed=1)


def test_too_long_an_example_is_our_mistake():
    with pytest.raises(ValueError, match="a length of 9 does not fit a bin of 8"):
        best_fit([9], 8, seed=0)


def test_the_shortest_bin_that_fills_well_is_chosen():
    assert choose_length([64] * 32, 1024, seed=0) == 64
    assert choose_length([60, 40, 20] * 100, 1024, seed=0) == 60
    assert choose_length([50, 30] * 200, 1024, seed=0) > 50
    assert choose_length([700, 3], 512, seed=0) == 700
