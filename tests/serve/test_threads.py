"""How many threads a step takes is what was measured, and fewer where more bring little."""

from __future__ import annotations

import time

import pytest
import torch

from lofi.serve.threads import fastest


@pytest.fixture(autouse=True)
def _as_it_was():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stepping(monkeypatch, seconds):
    """A step that takes seconds[threads], on a clock of its own."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += seconds[torch.get_num_threads()]

    return step


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 4.0, 2: 3.0, 4: 2.0}, 4),
        ({1: 2.0, 2: 3.0, 4: 4.0}, 1),
        ({1: 4.0, 2: 2.0, 4: 1.95}, 2),
        ({1: 1.0, 2: 0.99, 4: 0.5}, 4),
    ],
)
def test_the_fastest_number_is_taken_and_fewer_where_more_bring_little(monkeypatch, seconds, chosen):
    assert fastest(stepping(monkeypatch, seconds), 4) == chosen
    assert torch.get_num_threads() == 4


def test_a_number_that_is_no_power_of_two_is_tried_too(monkeypatch):
    assert fastest(stepping(monkeypatch, {1: 4.0, 2: 3.0, 3: 1.0}), 3) == 3


def test_with_one_thread_nothing_is_tried():
    assert fastest(lambda: pytest.fail("tried"), 1) == 1


def test_a_step_that_fails_leaves_the_threads_as_they_were():
    torch.set_num_threads(2)

    def step():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fastest(step, 2)
    assert torch.get_num_threads() == 2
