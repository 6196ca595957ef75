"""The report is one page that needs nothing else, and shows exactly what it was given."""

from __future__ import annotations

import json
import re

from lofi.recipe import make_recipe
from lofi.report.page import choices_of, figure, figure_table, settings_of, write_report

FIGURES = [
    {"who": "base", "metric": "rouge1", "value": 0.2, "low": 0.1, "high": 0.3, "n": 50},
    {"who": "first", "metric": "rouge1", "value": 0.41, "low": 0.4, "high": 0.42, "n": 50},
    {"who": "first", "metric": "bleu", "value": 37.25, "low": None, "high": None, "n": 48},
]


def a_run(folder):
    recipe = make_recipe({"model": "m # odd: name", "data": {"train": "t"}, "output": "o"}, ["lora.r=8"])
    (folder / "recipe.yaml").write_text(recipe.resolved_yaml(), encoding="utf-8")
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo'  # torn by a kill
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    chosen = {"choices": {"dtype": "bf16", "micro_rows": None, "why": {"dtype": "<fast here>"}}, "format": 1}
    (folder / "chosen.json").write_text(json.dumps(chosen), encoding="utf-8")


def test_the_page_holds_everything_it_was_given(tmp_path):
    a_run(tmp_path)
    path = write_report(
        tmp_path,
        title="runs/first & friends",
        figures=FIGURES,
        notes=["overfitting after step 2"],
        proofs=["all tensors moved"],
        samples=[[("Hỏi: ", "context"), ("đáp <b>", "trained"), ("pad × 3", "pad"), ("old", "cut")]],
        tables={"Three questions": [{"question": "how many?", "sql": "SELECT 1"}]},
        log=["a line"],
    )
    page = path.read_text(encoding="utf-8")
    for part in (
        *("runs/first &amp; friends", "0.4100 (0.4000 to 0.4200)", "37.25", "overfitting after step 2"),
        *("all tensors moved", '<span class="trained">đáp &lt;b&gt;</span>', '<span class="cut">old</span>'),
        *("SELECT 1", "a line", "<svg", "&lt;fast here&gt;", "m # odd: name", "command line", "lora.r"),
    ):
        assert part in page, part
    assert "<b>" not in page


def test_the_page_loads_nothing_and_serves_light_and_dark(tmp_path):
    a_run(tmp_path)
    page = write_report(tmp_path, title="t", figures=FIGURES).read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|https?://|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_an_empty_folder_still_gives_a_page(tmp_path):
    page = write_report(tmp_path, title="nothing yet").read_text(encoding="utf-8")
    assert "nothing yet" in page
    assert "<svg" not in page


def test_figures_stand_a_metric_a_line_and_a_speaker_a_column():
    table = figure_table(FIGURES)
    assert table["who"] == ["base", "first"]
    assert table["lines"][0] == ("rouge1", "50", ["0.2000 (0.1000 to 0.3000)", "0.4100 (0.4000 to 0.4200)"])
    assert table["lines"][1] == ("bleu", "48", ["", "37.25"])
    assert figure({"value": None}) == "none"


def test_settings_keep_values_that_look_like_comments(tmp_path):
    a_run(tmp_path)
    found = {key: (value, origin) for key, value, origin in settings_of(tmp_path / "recipe.yaml")}
    assert found["model"] == ("'m # odd: name'", "command line")
    assert found["lora.r"] == ("8", "command line")
    assert found["train.seed"] == ("0", "default")


def test_only_choices_that_were_made_are_listed():
    record = {"choices": {"dtype": "bf16", "micro_rows": None, "why": {"dtype": "fast"}}}
    assert choices_of(record) == [("dtype", "bf16", "fast")]
    assert choices_of({}) == []
