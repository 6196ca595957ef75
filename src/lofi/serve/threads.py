"""How many threads a step of decoding takes: measured on the model when the engine starts.

A step of a small model is many short products, and waking a second thread for each of them can cost more than it
brings. Measured in the thread that will run the steps: OpenMP gives each thread workers of its own, and once there are
more of them than cores they sleep between products. Knows a step, not what it does.
Rejected: a rule by the model's size (where it turns depends on the machine, and on who else works there).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 9
_SECONDS = 1.0
"""Large models take long and differ clearly: after two rounds no new one begins past this."""
_CLEARLY = 0.95
"""More threads must be this much faster: those that are not needed serve the clients."""


def fastest(step: Callable[[], object], most: int) -> int:
    """The number of threads, 1 to `most`, with which `step` is fastest; fewer where it hardly matters.

    torch is left with `most` threads.
    """
    choices = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
    if len(choices) == 1:
        return most
    try:
        seconds = _measured(step, choices)
    finally:
        torch.set_num_threads(most)
    best = choices[0]
    for more in choices[1:]:
        if seconds[more] < _CLEARLY * seconds[best]:
            best = more
    return best


def _measured(step: Callable[[], object], choices: list[int]) -> dict[int, float]:
    """Median seconds of a step by the number of threads, taken in turn so that what else runs disturbs all alike."""
    seconds: dict[int, list[float]] = {threads: [] for threads in choices}
    begun = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= 2 and time.perf_counter() - begun > _SECONDS:
            break
        for threads in choices:
            torch.set_num_threads(threads)
            step()  # the first with a new number starts or ends threads
            start = time.perf_counter()
            step()
            seconds[threads].append(time.perf_counter() - start)
    return {threads: statistics.median(taken) for threads, taken in seconds.items()}
