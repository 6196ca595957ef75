"""The page of a study is one sound file that holds every arm, loads nothing, and draws inside its pictures."""

from __future__ import annotations

import csv
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from lofi.study.latency_page import bars, latency_page, write_latency
from lofi.study.page import run_notes, study_page, write_outputs
from lofi.study.plots import frontier, further_plots, mean_curve, plots
from lofi.study.spec import Study, load_study
from lofi.study.statistics import RATIOS, summarise
from lofi.study.tables import FIGURE_COLUMNS, columns, result_rows
from study.made_records import LATENCY, arm_runs, failed, rows, run

HOSTILE = "<script>alert(\"x\")</script> & 'r'"
VOID = {"meta", "link", "br", "img", "input", "hr"}
SELF_CLOSED = {"circle", "rect", "polygon", "polyline", "line"}
STUDY = Study(
    base={"model": "a <model>", "data.train": "d/train.jsonl", "data.test": "d/test.jsonl", "train.max_steps": 40},
    grid={"method": ["full", "lora"], "lora.r": [1, 4], "train.seed": [0, 1, 2]},
    metrics=["rouge1"],
)
FIGURES = {
    "adapter_mb": 1.5, "peak_mb": 200.0, "tokens_per_second": 900.0, "train_seconds": 30.0, "tokens": 5000.0,
    "general_ppl": 11.0, "general_ppl_base": 10.0, **LATENCY,
}  # fmt: skip


def records(*extra: str):
    """Base, full, LoRA of three ranks and what else is named, with curves, and one run that failed."""
    base = run("base", None, rows(), general_ppl=10.0, general_ppl_base=10.0, latency_ms=20.0, latency_base_ms=20.0)
    arms = {"full": 60_000.0, "lora r=1": 500.0, "lora r=4": 2000.0, "lora r=16": 8000.0} | dict.fromkeys(extra, 900.0)
    found = [base]
    for place, (name, trainable) in enumerate(arms.items()):
        own = FIGURES | {"trainable": trainable, "peak_mb": 150.0 + 10 * place, "train_seconds": 20.0 + place}
        found += arm_runs(name, 0.1 + 0.02 * place, **own)
    for one in found[1:]:
        one.curve.extend((step, 3.0 / step + 0.1 * (one.seed or 0)) for step in range(1, 41, 3))
    return [*found, failed("prefix", 0, "the loss is not finite at step 4 <here>")]


class Sound(HTMLParser):
    """Checks that tags close in order, and gathers ids, attributes and the words of every table cell."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in SELF_CLOSED, f"<{tag}/> is no element without content"
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def sound(page: str) -> Sound:
    parser = Sound()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def the_page(*extra: str, **options) -> str:
    made = records(*extra)
    return study_page(STUDY, summarise(made), made, **options)


def test_the_page_is_well_formed_and_has_every_arm_in_its_table():
    found = sound(the_page("houlsby", "prompt"))
    for arm in ("base", "full", "lora r=1", "lora r=4", "lora r=16", "houlsby", "prompt", "prefix"):
        assert any(cell.startswith(arm) for cell in found.cells), arm
    assert sum(cell.startswith("prefix") and "1 failed" in cell for cell in found.cells) == 1


def test_the_page_says_what_it_takes_how_it_was_done_and_what_failed():
    page = the_page(output="out", notes=["budgets differ & more"])
    for part in (
        *("<strong>Take lora r=16</strong>: with 8,000", "take this one", "▲ base", "1.20"),
        *("the loss is not finite at step 4 &lt;here&gt;", "a &lt;model&gt;", "d/test.jsonl, 200 rows", "max_steps 40"),
        *("lofi compare study.yaml --output out", "budgets differ &amp; more", "torch ", "core", "5,000"),
        *("method: full, lora", "Student&#39;s t", "every paired difference"),
    ):
        assert part in page, part


def test_nothing_is_loaded_from_outside_and_light_and_dark_are_served():
    page = the_page("houlsby")
    assert not re.search(r"https?://|<link|<img|@import|url\(|\bsrc=|\bhref=", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    colours = {value for _, key, value in sound(page).attributes if key in ("fill", "stroke", "style")}
    assert not colours  # all from the page's own classes, which know dark


def test_a_hostile_name_is_only_a_name():
    page = the_page(HOSTILE)
    assert "alert(" in page and "<script>alert" not in page
    assert any(cell.startswith(HOSTILE) for cell in sound(page).cells)
    assert page.count("<script>") == 1


def test_the_table_is_sortable_and_plain_without_script():
    found = sound(the_page())
    heads = [(key, value) for tag, key, value in found.attributes if tag == "th"]
    assert ("aria-sort", "descending") in heads  # the metric, best first, as the server wrote it
    assert sum(key == "data-first" for key, _ in heads) == len(columns(summarise(records())))
    assert not any(tag == "button" for tag, _, _ in found.attributes)
    values = [value for tag, key, value in found.attributes if tag == "td" and key == "data-sort"]
    assert "60000.0" in values and "" in values
    assert "aria-sort" in the_page().partition("<script>")[2]  # the script says which way it sorted


def test_columns_without_a_figure_are_left_out_and_what_cannot_be_merged_says_so():
    heads = [column.head for column in columns(summarise(records()))]
    assert heads == ["arm", "ROUGE-1", *(head for _, head, *_ in FIGURE_COLUMNS)]
    bare = summarise([*arm_runs("lora r=4", 0.1), *arm_runs("houlsby", 0.1, latency_ms=1.0, latency_base_ms=1.0)])
    assert [column.head for column in columns(bare)] == ["arm", "ROUGE-1", "trainable", "latency"]
    merged = summarise(
        [*arm_runs("lora r=4", 0.2, **LATENCY), *arm_runs("prefix", 0.1, latency_ms=1.0, latency_base_ms=1.0)]
    )
    (cells,) = [column.cells for column in columns(merged) if column.head == "merged"]
    assert [cell.text for cell in cells] == ["1.00", "cannot"]


def test_a_fully_tuned_model_answers_as_the_base_does_whatever_two_clocks_say():
    noisy = LATENCY | {"latency_ms": 11.0, "latency_merged_ms": None}
    statistics = summarise([*arm_runs("full", 0.2, **noisy), *arm_runs("lora r=4", 0.1, **LATENCY)])
    (cells,) = [column.cells for column in columns(statistics) if column.head == "latency"]
    assert [cell.text for cell in cells] == ["as base", "1.20"]
    assert statistics.get("full").slowdown() == 1.0 == statistics.get("lora r=4").slowdown()


def test_where_less_is_better_the_axis_says_so():
    made = [run(f"lora r={r}", 0, rows() + r, "loss", trainable=10.0 * r) for r in (1, 2)]
    found = plots(summarise(made), made)
    assert [plot.title for plot in found] == ["Loss against trainable parameters", "Loss against rank"]
    assert all("loss (less is better)" in plot.svg for plot in found)
    assert "less is better" not in the_page().partition("<svg")[2]


def coordinates(svg: str):
    """Every coordinate of a picture with the limits of its viewBox."""
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    for key, value in re.findall(r' (x1|x2|y1|y2|cx|cy|x|y)="([^"]+)"', svg):
        yield float(value), width if "x" in key else height
    for x, anchor, words in re.findall(r'<text x="([^"]+)"[^>]*text-anchor="(\w+)"[^>]*>([^<]*)', svg):
        room = 7.0 * len(unescape(words))  # a character is about as wide
        left = float(x) - {"start": 0, "end": room, "middle": room / 2}[anchor]
        yield from ((left, width), (left + room, width))
    for points in re.findall(r'points="([^"]+)"', svg):
        for pair in points.split():
            yield from zip(map(float, pair.split(",")), (width, height), strict=True)


@pytest.mark.parametrize("extra", [(), tuple(f"houlsby bottleneck_size={size}" for size in range(20))])
def test_every_coordinate_lies_within_its_picture(extra):
    made = records(*extra)
    found = plots(summarise(made), made)
    assert len(found) >= 5 and further_plots(summarise(made)) == []
    for plot in found:
        assert all(-1 <= value <= limit + 1 for value, limit in coordinates(plot.svg)), plot.title
        sound(plot.svg)


def test_higher_is_drawn_higher_and_more_parameters_further_right():
    made = records()
    plot = plots(summarise(made), made)[0]
    places = dict(zip(*read_marks(plot.svg), strict=True))
    names = ["lora r=1", "lora r=4", "lora r=16"]
    assert [places[name][0] for name in names] == sorted(places[name][0] for name in names)
    assert [places[name][1] for name in names] == sorted((places[name][1] for name in names), reverse=True)
    steps = np.diff([places[name][0] for name in names])
    assert steps[0] == pytest.approx(steps[1], abs=0.3)  # a factor of four each: the axis is logarithmic


def read_marks(svg: str):
    """(names, (x, y)) of the arms of a scatter: the first two numbers of each mark's shape."""
    found = re.findall(r'<g class="mark[^>]*>(<[^>]*>)<title>([^:]*):', svg)
    numbers = [re.findall(r"-?\d+\.?\d*", shape.partition(" ")[2])[:2] for shape, _ in found]
    return [name for _, name in found], [tuple(map(float, pair)) for pair in numbers]


def test_the_frontier_is_what_no_cheaper_arm_beats():
    assert frontier([(1, 5), (2, 4), (3, 7), (3, 6), (4, 7), (0.5, 1)]) == [5, 0, 2]
    assert frontier([]) == []


def test_only_pictures_with_content_are_drawn():
    one = arm_runs("lora r=4", 0.1)
    assert plots(summarise(one), one) == [] and plots(summarise([]), []) == []
    two = [*one, *arm_runs("lora r=8", 0.2, trainable=2000.0)]
    assert [plot.title for plot in plots(summarise(two), two)] == [
        "ROUGE-1 against trainable parameters", "ROUGE-1 against rank",
    ]  # fmt: skip


def test_the_other_metrics_are_drawn_too():
    made = records()
    for one in made:
        if one.done:
            one.measures["bleu"] = one.measures["rouge1"]
    page = study_page(STUDY, summarise(made), made)
    assert "the other metrics" in page and "<h3>BLEU against trainable parameters</h3>" in page
    assert "<h3>BLEU against rank</h3>" in page and "the other metrics" not in the_page()
    sound(page)


def test_a_cost_that_hardly_differs_does_not_fill_the_picture():
    made = [*arm_runs("full", 0.2, peak_mb=1000.0, trainable=9.0), *arm_runs("lora r=4", 0.1, peak_mb=990.0)]
    (plot,) = [plot for plot in plots(summarise(made), made) if "memory" in plot.title]
    (_, places) = read_marks(plot.svg)
    assert abs(places[0][0] - places[1][0]) < 30


def test_many_arms_share_their_loss_curves_out_over_panels():
    made = records(*(f"houlsby bottleneck_size={size}" for size in range(20)))
    panels = [plot for plot in plots(summarise(made), made) if "loss" in plot.title]
    assert [plot.title.partition(": ")[2] for plot in panels] == [
        "one arm a method",
        "lora",
        "houlsby (1)",
        "houlsby (2)",
    ]
    assert sum(len(plot.legend) for plot in panels) == 24 and max(len(plot.legend) for plot in panels) <= 12
    assert all(len(re.findall("<polyline", plot.svg)) == 24 for plot in panels)


def test_a_curve_is_the_mean_over_seeds_where_all_have_a_finite_loss():
    assert mean_curve([[(1, 2.0), (2, 1.0), (3, np.nan)], [(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)]]) == [
        (1, 3.0),
        (2, 1.5),
    ]
    assert mean_curve([]) == []


def test_marks_that_stand_close_have_labels_that_do_not_run_into_each_other():
    made = records(*(f"lora r={r}" for r in range(20, 32)))
    svg = plots(summarise(made), made)[0].svg
    boxes = []
    for x, y, anchor, words in re.findall(r'<text x="(\S+)" y="(\S+)" text-anchor="(\w+)" class="label">([^<]*)', svg):
        width = 7.0 * len(words)
        left = float(x) - {"start": 0, "end": width, "middle": width / 2}[anchor]
        boxes.append((left, float(y) - 10, left + width, float(y) + 2))
    assert len(boxes) >= 4
    for place, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[place + 1 :])


def test_results_csv_reads_back_with_every_arm_and_figure(tmp_path):
    made = records(HOSTILE + ",\n")
    path = write_outputs(STUDY, made, tmp_path)
    assert path == tmp_path / "report.html" and sorted(p.name for p in tmp_path.iterdir()) == [
        "report.html",
        "results.csv",
    ]
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as handle:
        lines = {line["who"]: line for line in csv.DictReader(handle)}
    statistics = summarise(made)
    assert set(lines) == {arm.name for arm in statistics.arms}
    ours, line = statistics.get("lora r=4"), lines["lora r=4"]
    assert float(line["value"]) == ours.scores["rouge1"].value and float(line["high"]) == ours.scores["rouge1"].high
    assert float(line["p_full_corrected"]) == ours.contrast("full", "rouge1").corrected
    assert (line["trainable"], line["n"], line["runs"], line["method"]) == ("2000.0", "200", "3", "lora")
    assert all(float(line[name]) == ours.figure(name) for name in RATIOS)
    assert lines["base"]["p_base"] == "" and lines["prefix"]["value"] == "" and lines["prefix"]["failed"] == "1"


def test_result_rows_are_those_of_every_verb():
    found = {(row["who"], row["metric"]): row for row in result_rows(summarise(records()))}
    assert set(found["base", "rouge1"]) == {"who", "metric", "value", "low", "high", "n"}
    assert ("prefix", "rouge1") not in found


def test_the_study_on_the_page_is_a_file_that_asks_for_the_same(tmp_path):
    page = the_page()
    text = re.search(r"<pre>(.*?)</pre>", page, re.S)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'")
    assert yaml.safe_load(text)["grid"] == {"method": ["full", "lora"], "lora.r": [1, 4], "train.seed": [0, 1, 2]}
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    assert load_study(tmp_path / "study.yaml") == STUDY


def test_a_note_that_several_runs_leave_is_said_once():
    made = [*arm_runs("lora r=4", 0.1), failed("prefix", 0)]
    for one in made[:3]:
        one.notes.append("BLEU is sacrebleu's")
    for one in made[1:3]:
        one.notes.append("resumed <twice>")
    assert list(run_notes(made)) == ["BLEU is sacrebleu's", "lora-r=4-s1 and lora-r=4-s2: resumed <twice>"]
    assert "resumed &lt;twice&gt;" in study_page(STUDY, summarise(made), made)


def test_a_study_of_which_nothing_worked_still_has_a_page():
    page = study_page(STUDY, summarise([failed("prefix", 0)]), [failed("prefix", 0)])
    sound(page)
    assert "nothing to recommend" in page and "not finite" in page and "<svg" not in page


def latency_rows(**changes):
    return [
        {"who": who, "batch": batch, "sequence": 128, "ms": 20.0 * f, "low": 19.0 * f, "high": 23.0 * f}
        | {"ratio": f, "ratio_low": f - 0.01, "ratio_high": f + 0.01, **changes}
        for batch in (1, 4)
        for who, f in (("base", 1.0), ("lora", 1.18), (HOSTILE, 1.31))
    ]


def test_a_latency_study_has_a_block_for_each_setting_with_bars_as_long_as_its_times():
    page = latency_page(latency_rows(), {"title": "Latency of <m>", "rounds": 40})
    found = sound(page)
    assert page.count("<figure>") == 2 and "Batch 4, sequence 128" in page and "Latency of &lt;m&gt;" in page
    assert "alert(" in page and "<script" not in page
    assert not re.search(r"https?://|<link|@import|url\(", page)
    assert any(cell == "1.1801.170 to 1.190" for cell in found.cells)
    lengths = [float(length) for length in re.findall(r'<rect[^>]*width="([^"]+)"', bars(latency_rows()[:3]))]
    assert np.array(lengths) / lengths[0] == pytest.approx([1.0, 1.18, 1.31], abs=0.01)
    assert all(0 <= value <= limit for value, limit in coordinates(bars(latency_rows()[:3])))


def test_latency_without_intervals_and_its_csv(tmp_path):
    made = latency_rows(low=None, high=None, ratio_low=None, ratio_high=None)
    page = write_latency(made, {}, tmp_path).read_text(encoding="utf-8")
    assert "None" not in page and "whisker" not in re.search(r"<body>.*", page, re.S)[0]
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as handle:
        assert [line["who"] for line in csv.DictReader(handle)][:2] == ["base", "lora"]
