"""Which examples share a row or a batch: packing into bins and grouping by length, on lengths alone.

Plain integers, so the properties are easy to test: every index exactly once, no bin over its limit, the same seed the
same result. Rejected: one bin as long as the whole batch (attention over a row costs its length squared).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

SAMPLE = 10_000  # lengths that are enough to judge a bin length by
GOOD_FILL = 0.98  # a bin length that fills this share is taken; longer bins only cost attention


def best_fit(lengths: Sequence[int], limit: int, *, seed: int) -> list[list[int]]:
    """Best-fit decreasing: each index, longest first (ties shuffled), into the fullest bin that still takes it.

    Raises  ValueError: a length over `limit`
    """
    if lengths and max(lengths) > limit:
        raise ValueError(f"a length of {max(lengths)} does not fit a bin of {limit}")
    bins: list[list[int]] = []
    free: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # keys of `free`, sorted
    for index in _shuffled(range(len(lengths)), lengths, seed):
        place = bisect_left(rooms, lengths[index])
        if place < len(rooms):
            room = rooms[place]
            chosen = free[room].pop()
            if not free[room]:
                del free[room], rooms[place]
        else:
            room, chosen = limit, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - lengths[index]
        if left not in free:
            free[left] = []
            insort(rooms, left)
        free[left].append(chosen)
    random.Random(seed).shuffle(bins)
    return bins


def choose_length(lengths: Sequence[int], most: int, *, seed: int) -> int:
    """The shortest bin length of a few candidates up to `most` that fills 98 %, else the fullest.

    Candidates: the longest example, its small multiples, and powers of two; judged on a seeded sample of the lengths.
    Short bins cost less attention; only when they would waste room is a longer one worth it.
    """
    longest = max(lengths)
    sample = lengths if len(lengths) <= SAMPLE else random.Random(seed).sample(lengths, SAMPLE)
    wider = [longest * times for times in (2, 3, 4)] + [1 << power for power in range(31)]
    candidates = sorted({longest, max(longest, most), *(length for length in wider if longest < length <= most)})
    fullest, best = -1.0, longest
    for length in candidates:
        fill = sum(sample) / (length * len(best_fit(sample, length, seed=seed)))
        if fill >= GOOD_FILL:
            return length
        if fill > fullest:
            fullest, best = fill, length
    return best


def by_length(sides: Sequence[tuple[int, int]], most: int, *, seed: int) -> list[list[int]]:
    """Groups of similar length whose padded size is at most `most` (one example at least).

    sides  tokens of the encoder's and the decoder's side (0 without a decoder); each side is padded to its own longest,
           so the padded size is count * (longest first side + longest second side)
    """
    groups: list[list[int]] = []
    widths = (0, 0)
    for index in _shuffled(range(len(sides)), [sum(pair) for pair in sides], seed):
        wider = (max(widths[0], sides[index][0]), max(widths[1], sides[index][1]))
        if groups and (len(groups[-1]) + 1) * sum(wider) <= most:
            groups[-1].append(index)
            widths = wider
        else:
            groups.append([index])
            widths = sides[index]
    random.Random(seed).shuffle(groups)
    return groups


def _shuffled(indices: Sequence[int], lengths: Sequence[int], seed: int) -> list[int]:
    """Longest first, equal lengths in an order the seed decides."""
    order = list(indices)
    random.Random(seed).shuffle(order)
    return sorted(order, key=lambda index: -lengths[index])
