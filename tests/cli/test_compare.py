"""`lofi compare`: one command, a table, a page, one JSON object, and the exit codes."""

from __future__ import annotations

import json

import pytest
import yaml

from lofi.cli.main import main
from lofi.study.processes import in_process


@pytest.fixture
def study(tmp_path, small_model, data, monkeypatch):
    """Writes a study file of `grid` (two steps a run), done in this process; its path."""
    monkeypatch.setattr("lofi.study.run.in_children", lambda jobs: in_process)

    def write(**changes) -> str:
        base = {
            "model": str(small_model),
            "data": {"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl")},
            "lora": {"r": 3, "lora_alpha": 7},
            "train": {"max_steps": 2, "batch_tokens": 64, "learning_rate": 0.01, "dtype": "fp32"},
        }
        given = {"metrics": ["perplexity"], "grid": {"method": ["lora"]}}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"base": base} | given | changes))
        return str(path)

    return write


def test_a_study_prints_its_table_its_verdict_and_where_the_page_is(study, tmp_path, capsys):
    path, out = study(), tmp_path / "out"
    assert main(["compare", path, "--output", str(out)]) == 0
    told = capsys.readouterr()
    assert "arm" in told.out and "lora" in told.out and f"report: {out / 'report.html'}" in told.out
    assert "1 run, 1 to do" in told.err and "lora-s0: perplexity" in told.err
    assert main(["compare", path, "--output", str(out), "--json"]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert {row["who"] for row in answer["results"]} == {"base", "lora"}
    row = next(row for row in answer["results"] if row["who"] == "lora")
    assert set(row) >= {"who", "metric", "value", "low", "high", "n"} and row["n"] == 4
    assert [run["name"] for run in answer["runs"]] == ["base", "lora-s0"] and isinstance(answer["verdict"], str)
    assert answer["report"] == str(out / "report.html") and "1 finished before, 0 to do" in told.err


def test_a_failed_run_makes_the_exit_code_1_and_its_sentence_is_told(study, tmp_path, capsys):
    words = ["compare", study(), "grid.method=[lora, bitfit]", "--output", str(tmp_path / "out"), "--json"]
    assert main(words) == 1
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert [run["status"] for run in answer["runs"]] == ["done", "done", "failed"]
    assert "BitFit trains biases" in answer["runs"][2]["error"] and "bitfit-s0 cannot be done" in told.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.yaml"], "there is no study nothing.yaml"),
        (["grid.lora.r=[4]"], "there is no study among the words; give one study.yaml"),
        (["STUDY", "two.yaml"], "is a second study or no key=value; give one study.yaml"),
        (["STUDY", "grid.lora.rr=[4]"], "unknown key lora.rr; did you mean lora.r?"),
        (["STUDY", "grid={}"], "the grid is empty"),
        (["STUDY", "grid.method=[bitfit]"], "no run of this study can be done: BitFit trains biases"),
        (["STUDY", "metrics=[accuracy]"], "accuracy cannot be measured on data of kind sft"),
    ],
)
def test_a_wrong_request_is_one_sentence_exit_code_2_and_nothing_written(study, tmp_path, capsys, words, sentence):
    path, out = study(), tmp_path / "out"
    assert main(["compare", *(path if word == "STUDY" else word for word in words), "--output", str(out)]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.out == "" and not out.exists()


def test_ctrl_c_is_exit_code_130_with_what_to_do(study, tmp_path, capsys, monkeypatch):
    def stopped(tasks, said):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("lofi.study.run.in_children", lambda jobs: stopped)
    assert main(["compare", study(), "--output", str(tmp_path / "out")]) == 130
    assert "run the same lofi compare" in capsys.readouterr().err


def test_a_latency_study_is_timed_and_shown(study, tmp_path, small_model, capsys):
    path = tmp_path / "latency.yaml"
    spec = {"shape": str(small_model), "settings": [[1, 8]], "methods": ["lora"], "rounds": 2, "warm_up": 1}
    path.write_text(yaml.safe_dump({"kind": "latency", "latency": spec}))
    assert main(["compare", str(path), "--output", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["who"] for row in answer["results"]] == ["base", "lora"] and (tmp_path / "out/report.html").is_file()
