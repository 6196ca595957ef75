"""Rows as rectangles: every row once, within the budget, padded on the side asked for."""

from __future__ import annotations

import random

from lofi.evaluate.batching import grouped, padded


def test_every_row_is_in_one_group_and_no_group_exceeds_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
        budget, extra = rng.randint(1, 150), rng.randint(0, 10)
        groups = grouped(lengths, batch_tokens=budget, extra=extra)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[index] for index in group)
            assert len(group) == 1 or len(group) * (longest + extra) <= budget


def test_the_longest_rows_come_first_so_that_too_little_memory_shows_at_once():
    assert grouped([1, 9, 4, 9, 2], batch_tokens=18) == [[1, 3], [2, 4, 0]]


def test_padding_goes_to_the_side_asked_for_and_the_mask_knows_it():
    ids, mask = padded([[3, 4], [5]], fill=7)
    assert (ids.tolist(), mask.tolist()) == ([[3, 4], [5, 7]], [[1, 1], [1, 0]])
    ids, mask = padded([[3, 4], [5], []], fill=7, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[3, 4], [7, 5], [7, 7]], [[1, 1], [0, 1], [0, 0]])
