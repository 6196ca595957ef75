"""The row cache: where it writes, how it grows within its budget, who sits where, and which prefixes are shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi.serve.cache import BLOCK, RowCache, Span
from lofi.serve.prefix import LEAST, common, longest
from lofi.serve.row import Kept

H, K, WIDE = 3, 5, 7
ALL = slice(None)


def span(first: int, rows: int, length: int, positions: list[int]) -> Span:
    """One token of each of some neighbouring rows."""
    return Span(first, rows, length, (torch.arange(rows) + first, ALL, torch.tensor(positions)), None)


def states(rows: int, width: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, H, width, K, generator=generator), torch.randn(rows, H, width, WIDE, generator=generator)


def filled(rows: int = 4, tokens: int = 4 * BLOCK, layers: int = 2) -> RowCache:
    """A cache whose every position says which row, layer and position it is."""
    cache = RowCache(rows=rows, tokens=tokens)
    for layer in range(layers):
        cache.aim(span(0, 1, 1, [0]))
        cache.update(*states(1), layer)
    for layer, held in enumerate(cache.layers):
        for tensor in (held.keys, held.values):
            place = torch.arange(tensor.shape[0])[:, None] * 1000 + torch.arange(tensor.shape[2]) + layer * 0.5
            tensor.copy_(place[:, None, :, None].expand_as(tensor))
    return cache


def test_one_token_a_row_is_written_at_its_own_position():
    cache = filled()
    keys, values = states(2)
    cache.aim(span(1, 2, 9, [8, 3]))
    seen_keys, seen_values = cache.update(keys, values, 1)
    assert seen_keys.shape == (2, H, 9, K) and seen_values.shape == (2, H, 9, WIDE)
    assert torch.equal(seen_keys[0, :, 8], keys[0, :, 0]) and torch.equal(seen_values[1, :, 3], values[1, :, 0])
    assert (seen_keys[0, :, :8] == torch.arange(8)[:, None] + 1000.5).all()  # the rest is as it was
    assert (cache.layers[0].keys[1] == torch.arange(BLOCK)[:, None] + 1000).all()  # and so is the other layer


def test_of_a_chunk_only_the_given_tokens_are_written():
    cache = filled()
    keys, values = states(2, width=3)
    row, token = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
    into = (row + 2, ALL, torch.tensor([4, 5, 6, 9]))
    cache.aim(Span(2, 2, 12, into, (row, ALL, token)))
    seen, _ = cache.update(keys, values, 0)
    assert torch.equal(seen[0, :, 4:7], keys[0]) and torch.equal(seen[1, :, 9], keys[1, :, 0])
    assert (seen[1, :, 10] == 3010).all()  # the second row's filling went nowhere


@given(
    wishes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5 * BLOCK)), min_size=1, max_size=8),
    tokens=st.integers(1, 12),
)
@settings(deadline=None, max_examples=40)
def test_rows_and_positions_share_one_budget_and_what_fits_stays(wishes, tokens):
    cache = filled(rows=5, tokens=tokens * BLOCK)
    rows, length = cache.rows, cache.length
    for count, longest_row in wishes:
        if not cache.fits(count, longest_row):
            continue
        rows, length = min(rows, cache.rows), min(length, cache.length)
        cache.reserve(count, longest_row)
        assert cache.rows >= count and cache.length >= longest_row
        assert cache.rows * cache.length == cache.capacity <= cache.tokens
        rows, length = min(rows, cache.rows), min(length, cache.length)
        kept = cache.layers[1].keys[:rows, 0, :length, 0]
        assert (kept == torch.arange(rows)[:, None] * 1000 + torch.arange(length) + 0.5).all()
        assert cache.layers[1].keys.shape == (cache.rows, H, cache.length, K)


def test_what_does_not_fit_is_said_before():
    cache = RowCache(rows=3, tokens=4 * BLOCK)
    assert cache.fits(3, BLOCK) and cache.fits(2, 2 * BLOCK) and cache.fits(1, 4 * BLOCK)
    assert not cache.fits(4, 1) and not cache.fits(3, BLOCK + 1) and not cache.fits(1, 4 * BLOCK + 1)


def test_rows_are_copied_exchanged_and_wiped_up_to_a_length():
    cache = filled()
    cache.swap(0, 2, 4)
    cache.copy(1, 3, 2)
    cache.wipe(1)
    tensor = cache.layers[0].values[:, 1, :6, 2]
    assert tensor.tolist() == [
        [2000, 2001, 2002, 2003, 4, 5], [0] * 6, [0, 1, 2, 3, 2004, 2005], [1000, 1001, 3002, 3003, 3004, 3005],
    ]  # fmt: skip


def test_what_was_never_written_is_finite():
    cache = RowCache(rows=4, tokens=4 * BLOCK)
    cache.aim(span(0, 1, 1, [0]))
    cache.update(*states(1), 0)
    cache.reserve(1, 3 * BLOCK)
    assert cache.layers[0].keys.isfinite().all() and cache.layers[0].values.isfinite().all()


def test_a_position_is_as_many_bytes_as_its_layers_hold():
    assert filled(layers=2).bytes_per_token == 2 * H * (K + WIDE) * 4


@given(
    one=st.lists(st.integers(0, 1), max_size=30),
    other=st.lists(st.integers(0, 1), max_size=30),
    limit=st.integers(0, 30),
)
def test_the_common_beginning_is_that_of_a_plain_count(one, other, limit):
    pairs = list(zip(one, other, strict=False))[:limit]
    assert common(one, other, limit) == next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


PROMPT = list(range(40))


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([("law", PROMPT, 40)], (0, 39)),  # never the last token: it is the first step's input
        ([("law", PROMPT, 20)], (0, 20)),  # what has keys and values, not what was said
        ([("law", [*PROMPT[:12], 99], 13), ("law", PROMPT[:30], 30)], (1, 30)),
        ([("news", PROMPT, 40), (None, PROMPT, 40)], None),  # another adapter's are other values
        ([("law", PROMPT[: LEAST - 1] + [99] * 9, 16)], None),
        ([], None),
    ],
)
def test_a_prefix_is_taken_from_the_same_adapter_and_the_longest(kept, expected):
    rows = [Kept(key, tokens, length, 0) for key, tokens, length in kept]
    assert longest(PROMPT, "law", rows) == expected
