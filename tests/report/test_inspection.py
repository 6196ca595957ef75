"""Figures of an adapter as data, SVG and page: every number is where it belongs, and nothing comes from outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lofi.adapters.algebra import Amplification
from lofi.errors import RequestError
from lofi.report.drawings import Heat, Lines, number, svg
from lofi.report.inspection import _thinned, by_layer, drawings_of, place_of, table_of, write_inspection
from lofi.report.spectrum import Update

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "lm_head",
)


def updates(beside: Amplification | None = None) -> list[Update]:
    return [Update(name, (5, 7), 3, 2.0, (3.0 + n, 1.0, 0.5), beside=beside) for n, name in enumerate(NAMES)]


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("self_attn.q_proj", "3")),
        ("encoder.block.1.layer.0.SelfAttention.q", ("encoder layer.0.SelfAttention.q", "1")),
        ("h.11.attn.c_attn", ("attn.c_attn", "11")),
        ("lm_head", ("lm_head", "")),
        ("model.embed_tokens", ("model.embed_tokens", "")),
    ],
)
def test_a_path_is_a_kind_of_module_in_a_layer(path, place):
    assert place_of(path) == place


def test_a_map_has_layers_in_order_and_a_hole_where_nothing_is_adapted():
    heat = by_layer({name: float(n) for n, name in enumerate(NAMES)}, "title")
    assert list(heat.columns) == ["", "0", "10"] and list(heat.rows) == ["q_proj", "up_proj", "lm_head"]
    assert heat.values == [[None, 0.0, 1.0], [None, None, 2.0], [3.0, None, None]] and heat.top == 3.0


def test_with_a_base_the_norm_is_relative_and_amplification_is_drawn():
    plain, beside = drawings_of(updates()), drawings_of(updates(Amplification(1.0, 0.5, 0.1, 10.0)))
    assert plain[0].title == "Norm of the update"
    assert [drawing.title for drawing in beside][:2] == [
        "Norm of the update relative to the weight",
        "Amplification factor",
    ]
    assert beside[1].values[0] == [None, 2.0, 2.0]
    assert table_of(updates(Amplification(1.0, 0.5, 0.1, 10.0)))[0]["amplification"] == "2"
    assert drawings_of([]) == []


def test_the_svg_is_well_formed_and_tells_every_number():
    heat = Heat("a <b>", ["r & s"], ["1", "2"], [[0.25, None]], 1.0, across="j")
    drawn = ElementTree.fromstring(svg(heat))
    assert [title.text for title in drawn.iter("title")] == ["r & s, 1: 0.25"]
    assert [rect.get("fill-opacity") for rect in drawn.iter("rect") if rect.get("class") == "heat"] == ["0.250"]
    lines = ElementTree.fromstring(svg(Lines("s", {"m": [1.0, 0.1, 0.0], "n": [1.0]}, across="direction")))
    points = [line.get("points").split() for line in lines.iter("polyline")]
    assert [len(each) for each in points] == [2, 1]  # zero has no logarithm
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points[0])
    assert x0 < x1 and y0 < y1


def test_numbers_are_short():
    assert [number(value) for value in (0.0, 0.123, 1.0, 12.34, 1234.5)] == ["0.00", ".12", "1.00", "12.3", "1.23e+03"]


def test_large_grids_are_thinned_to_their_ends():
    assert _thinned(5) == [1, 2, 3, 4, 5]
    assert _thinned(64)[0] == 1 and _thinned(64)[-1] == 64 and len(_thinned(64)) == 16


def test_a_page_escapes_what_it_shows_and_stands_alone(tmp_path):
    where = write_inspection(
        tmp_path / "page.html",
        "a <script>",
        drawings_of(updates()),
        facts={"base": "<i>"},
        notes=["5 < 6"],
        tables={"modules": table_of(updates())},
    )
    text = where.read_text()
    assert "a &lt;script&gt;" in text and "&lt;i&gt;" in text and "5 &lt; 6" in text
    assert not re.search(r"https?:|<script|url\(|@import", text)
    assert text.count("<svg") == len(drawings_of(updates()))


def test_another_ending_or_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"ends in \.html or \.png"):
        write_inspection(tmp_path / "page.svg", "t", [], facts={})
    with pytest.raises(RequestError, match="nothing to draw"):
        write_inspection(tmp_path / "page.png", "t", [], facts={})
    assert list(tmp_path.iterdir()) == []
