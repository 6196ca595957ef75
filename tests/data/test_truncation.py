"""Where a long text is cut: arithmetic that must never reach what is trained."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lofi.data.truncation import cut_region, windows


@given(st.integers(0, 60), st.integers(1, 40), st.integers(2, 80), st.integers(0, 20))
def test_a_cut_leaves_max_length_tokens_all_of_the_trained_part_and_some_context(context, trained, max_length, head):
    length = context + trained
    if length <= max_length:
        return
    region = cut_region(length, context, max_length, min(head, context))
    if region is None:
        assert trained + 1 > max_length or context == 0
        return
    start, stop = region
    assert 0 <= start < stop <= context
    assert length - (stop - start) == max_length
    assert context - (stop - start) >= 1


def test_the_head_stays_when_there_is_room_and_bos_when_there_is_little():
    assert cut_region(100, 90, 50, 4) == (4, 54)
    assert cut_region(100, 90, 16, 4) == (1, 85)  # six context tokens left: BOS and the last five


@given(st.integers(2, 300), st.integers(2, 40))
def test_windows_predict_every_token_but_the_first_exactly_once(length, max_length):
    predicted = [place for start, stop in windows(length, max_length) for place in range(start + 1, stop)]
    assert predicted == list(range(1, length))
    assert all(2 <= stop - start <= max_length for start, stop in windows(length, max_length))
