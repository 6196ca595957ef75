"""The demo's road, short: every step runs, the folder holds what is said, and a foreign folder is never touched."""

from __future__ import annotations

import json
import shlex

import pytest

import lofi
from lofi.cli.output import Output
from lofi.demo import recipe, run


def test_a_folder_that_is_no_demos_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(lofi.RequestError, match=r"is no demo's folder"):
        run.run(output=tmp_path, seed=0, out=Output(True))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def short(monkeypatch, goal: float) -> None:
    monkeypatch.setattr(recipe, "TRAIN_ROWS", 320)
    monkeypatch.setattr(recipe, "TEST_ROWS", 4)
    monkeypatch.setattr(run, "GOALS", {"seen": goal, "unseen": goal})


def test_the_whole_road_leaves_adapter_merged_model_figures_and_page_and_may_be_run_again(tmp_path, monkeypatch):
    short(monkeypatch, 0.0)
    for _ in range(2):
        answer = run.run(output=tmp_path / "demo", seed=0, out=Output(True))
    rows = {(row["who"], row["metric"]): row for row in answer["results"]}
    for metric in ("execution_accuracy", "execution_accuracy_unseen", "exact_match", "rougeL"):
        assert {rows[who, metric]["n"] for who in ("base", "lora")} == {4}
    assert (tmp_path / "demo" / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "demo" / "merged" / "model.safetensors").is_file()
    assert "lofi demo" in (tmp_path / "demo" / "run" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8")) == answer
    assert any("golden prompts say the same" in proof for proof in answer["proofs"])


def test_missing_a_goal_is_a_failed_proof(tmp_path, monkeypatch):
    short(monkeypatch, 1.01)
    with pytest.raises(lofi.ProofError, match="execution accuracy on seen schemas"):
        run.run(output=tmp_path / "demo", seed=0, out=Output(True))


def test_the_closing_lines_are_commands_that_name_the_adapter_after_its_folder(tmp_path):
    from lofi.cli.flags import named_adapters

    paths = run.Paths(tmp_path / "my demo.2")
    paths.adapter.mkdir(parents=True)
    (paths.adapter / "adapter_config.json").write_text("{}")
    lines = run._places(paths, paths.run / "report.html")
    words = shlex.split(next(line for line in lines if line.startswith("serve:")).removeprefix("serve:"))
    assert words[:4] == ["lofi", "serve", "--model", "demo:model"]
    assert named_adapters(words[5:]) == {"my_demo_2": paths.adapter}
    assert any("lofi generate --model demo:model --adapter " in line for line in lines)
