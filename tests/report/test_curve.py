"""The loss curve: what is drawn is what metrics.jsonl says."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from lofi.report.curve import HEIGHT, LEFT, RIGHT, WIDTH, loss_curve, points, ticks

ROWS = [
    {"step": 0, "eval_loss": 4.0},
    {"step": 1, "loss": 3.5},
    {"step": 5, "loss": 2.0},
    {"step": 9, "loss": float("nan")},
    {"step": 10, "loss": 1.0},
    {"step": 10, "eval_loss": 1.5},
]


def lines_of(svg: str) -> dict[str, list[tuple[float, float]]]:
    root = ET.fromstring(svg)
    return {
        line.get("class"): [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in root.iter("polyline")
    }


def test_each_series_has_its_finite_points_in_order():
    found = lines_of(loss_curve(ROWS))
    assert [len(found["training"]), len(found["validation"])] == [3, 2]
    assert points(ROWS, "loss") == [(1, 3.5), (5, 2.0), (10, 1.0)]


def test_a_lower_loss_is_drawn_lower_and_a_later_step_further_right():
    line = lines_of(loss_curve(ROWS))["training"]
    assert [x for x, _ in line] == sorted({x for x, _ in line})
    assert [y for _, y in line] == sorted({y for _, y in line})


def test_every_point_is_inside_the_picture_and_the_scale_is_linear():
    found = lines_of(loss_curve(ROWS))
    assert all(LEFT <= x <= WIDTH - RIGHT and 0 <= y <= HEIGHT for line in found.values() for x, y in line)
    (_, top), (_, middle), (_, bottom) = found["training"]
    assert (middle - top) / (bottom - top) == pytest.approx(1.5 / 2.5, abs=0.01)


def test_no_loss_gives_no_curve():
    assert loss_curve([]) == ""
    assert loss_curve([{"step": 1, "loss": float("inf")}, {"loss": 1.0}, {"step": 2}]) == ""


def test_a_single_point_and_a_flat_loss_are_drawn():
    assert 'class="training"' in loss_curve([{"step": 1, "loss": 0.0}])
    assert lines_of(loss_curve([{"step": s, "loss": 2.0} for s in (1, 2)]))["training"]


def test_colours_come_from_the_page_and_nothing_from_outside():
    svg = loss_curve(ROWS)
    assert not re.search(r"(?:href|src|url\(|#[0-9a-f]{3})", svg)


@pytest.mark.parametrize(("low", "high"), [(0, 4.2), (0, 7), (0, 1234), (0.001, 0.0057), (-3, 2)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value in found)
    step = found[1] - found[0]
    assert float(f"{step:.0e}".partition("e")[0]) in (1, 2, 5)
    assert all(b - a == pytest.approx(step) for a, b in itertools.pairwise(found))
