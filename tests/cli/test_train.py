"""`lofi train`: from words and flags to a recipe, and a short run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lofi.cli.main import main
from lofi.cli.train import closing_lines, recipe_from, splits_of
from lofi.errors import DataError, RecipeError


def test_flags_alone_make_a_recipe_with_the_files_of_a_folder(data):
    recipe = recipe_from(["lora.r=4"], {"model": "m", "output": "o", "train.seed": 7}, str(data))
    assert (recipe.model, recipe.output, recipe.train.seed, recipe.lora.r) == ("m", "o", 7, 4)
    assert recipe.data.validation == str(data / "validation.jsonl")
    assert recipe.origins["lora.r"] == recipe.origins["data.train"] == "command line"


def test_flags_and_words_replace_what_a_recipe_says(tmp_path, data):
    path = tmp_path / "first.yaml"
    path.write_text("model: m\ndata: {train: other.jsonl}\noutput: o\ntrain: {seed: 1}\n")
    recipe = recipe_from([str(path), "train.seed=2"], {"model": "n"}, str(data / "train.jsonl"))
    assert (recipe.model, recipe.train.seed, recipe.data.train) == ("n", 2, str(data / "train.jsonl"))
    assert recipe.origins["output"] == "file"


@pytest.mark.parametrize("words", [["a.yaml", "b.yaml"], ["train.epochs", "=3"], []])
def test_words_that_are_no_request_are_refused(words):
    with pytest.raises(RecipeError):
        recipe_from(words, {}, None)


def test_a_value_with_odd_letters_survives_the_command_line():
    recipe = recipe_from([], {"model": "thư mục: #1", "output": "o'o"}, "a, b.jsonl")
    assert (recipe.model, recipe.output, recipe.data.train) == ("thư mục: #1", "o'o", "a, b.jsonl")


def test_a_folder_without_training_rows_or_with_two_of_a_kind_is_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no training file"):
        splits_of(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("")
    assert splits_of(str(tmp_path)) == {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(DataError, match=r"both train\.jsonl and train\.csv"):
        splits_of(str(tmp_path))


@pytest.mark.parametrize(("method", "merges"), [("lora", True), ("last-layers", True), ("houlsby", False)])
def test_a_merge_is_proposed_only_where_one_can_be(data, method, merges):
    recipe = recipe_from([], {"model": "m", "method": method, "output": "runs/o"}, str(data))
    result = SimpleNamespace(adapter="runs/o/adapter", output="runs/o")
    lines = closing_lines(recipe, result, Path("page"))
    assert any("lofi merge" in line for line in lines) == merges
    assert any("lofi evaluate --model m --adapter runs/o" in line for line in lines)


def test_a_run_folder_holds_what_the_design_promises(finished):
    for name in ("recipe.yaml", "adapter/adapter_config.json", "adapter/lofi.json", "metrics.jsonl", "report.html"):
        assert (finished / name).is_file(), name
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert (recipe["train"]["max_steps"], recipe["lora"]["r"]) == (4, 3)
    page = (finished / "report.html").read_text()
    assert "count to" in page
    assert "<svg" in page


def test_resume_of_a_finished_run_is_exit_0_and_says_so(finished, small_model, data, capsys):
    before = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    words = ["train.max_steps=4", "train.batch_tokens=64", "train.learning_rate=0.01", "lora.r=3", "lora.lora_alpha=12"]
    flags = ["--model", str(small_model), "--data", str(data), "--output", str(finished), "--dtype", "fp32"]
    assert main(["train", *flags, *words, "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["already_finished"] is True
    assert {"who", "metric", "value"} <= set(said["results"][0])
    assert "finished already" in err
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_finished_run_is_not_overwritten(finished, small_model, data, capsys):
    assert main(["train", "--model", str(small_model), "--data", str(data), "--output", str(finished)]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_full_fine_tuning_under_json_is_one_object_and_the_model_can_be_asked(small_model, data, tmp_path, capsys):
    flags = ["--model", str(small_model), "--data", str(data), "--output", str(tmp_path / "full"), "--dtype", "fp32"]
    words = ["method=full", "train.max_steps=2", "train.batch_tokens=64", "train.learning_rate=1e-3"]
    assert main(["train", *flags, *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["adapter"], said["model"]) == (None, str(tmp_path / "full" / "model"))
    assert "count to" in (tmp_path / "full" / "report.html").read_text()
    asked = ["generate", "--model", said["model"], "--prompt", "count to 3", "--max-new-tokens", "3", "--json"]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["who"] == "base"


def test_a_merge_from_the_command_line_keeps_what_was_learned(finished, small_model, data, tmp_path, capsys):
    flags = ["--model", str(small_model), "--adapter", str(finished), "--output", str(tmp_path / "merged")]
    assert main(["merge", *flags, "--data", str(data / "test.jsonl"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"who", "metric", "value", "low", "high", "n"} <= set(said["results"][0])
    assert (tmp_path / "merged" / "model.safetensors").is_file()
