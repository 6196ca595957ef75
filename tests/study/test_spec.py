"""A study file: what it may say, and one sentence with its line for each thing that it may not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from lofi.errors import RecipeError
from lofi.study.spec import load_study

GOOD = {
    "base": {"model": "m", "data": {"train": "a.jsonl", "test": "b.jsonl"}, "train": {"epochs": 1}},
    "grid": {"method": ["full", "lora"], "lora.r": [4, 16], "seed": [0, 1]},
    "metrics": ["rouge", "perplexity"],
}


@pytest.fixture
def study(tmp_path):
    """Loads a study from values (or text) and words."""

    def load(values=None, *words, text=None):
        path = tmp_path / "study.yaml"
        path.write_text(text if text is not None else yaml.safe_dump(values if values is not None else GOOD))
        return load_study(path, words)

    return load


def refused(study, *given, **more) -> str:
    with pytest.raises(RecipeError) as told:
        study(*given, **more)
    return str(told.value)


def test_nested_and_dotted_keys_mean_the_same_and_seed_is_train_seed(study):
    nested = study(GOOD | {"grid": {"method": ["full", "lora"], "lora": {"r": [4, 16]}, "train.seed": [0, 1]}})
    assert nested == study()
    assert nested.base == {"model": "m", "data.train": "a.jsonl", "data.test": "b.jsonl", "train.epochs": 1}
    assert nested.grid == {"method": ["full", "lora"], "lora.r": [4, 16], "train.seed": [0, 1]}


def test_a_list_of_lists_is_a_list_of_values(study):
    found = study(GOOD | {"grid": {"lora.target_modules": [["q_proj"], ["q_proj", "v_proj"]]}})
    assert found.grid["lora.target_modules"] == [["q_proj"], ["q_proj", "v_proj"]]


def test_arms_are_named_combinations(study):
    arms = [{"name": "q", "lora.target_modules": ["q_proj"], "lora": {"r": 8}}, {"name": "plain"}]
    found = study(GOOD | {"grid": {"seed": [0]}, "arms": arms})
    assert [arm.name for arm in found.arms] == ["q", "plain"]
    assert found.arms[0].overrides == {"lora.target_modules": ["q_proj"], "lora.r": 8}


def test_words_replace_values_and_a_recipes_key_belongs_to_the_base(study):
    found = study(None, "train.epochs=2", "grid.lora.r=[3]", "evaluate.rows=5", "metrics=[bleu]", "keep=all")
    assert found.base["train.epochs"] == 2 and found.grid["lora.r"] == [3]
    assert found.evaluate.rows == 5 and found.metrics == ["bleu"] and found.keep == "all"


def test_the_model_may_come_from_the_grid(study):
    base = {key: value for key, value in GOOD["base"].items() if key != "model"}
    assert study(GOOD | {"base": base, "grid": {"model": ["a", "b"]}}).grid == {"model": ["a", "b"]}
    assert "model is missing" in refused(study, GOOD | {"base": base})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base: {model: m}\ngrit: {}", "study.yaml:2: unknown key grit; did you mean grid?"),
        ("train: {epochs: 1}", "study.yaml:1: train is a recipe's key; put it under base, or under grid with a list"),
        ("base: {model: m}\ngrid:\n  lora.rank: [4]", "study.yaml:3: unknown key lora.rank"),
        ("base:\n  train: {epoch: 1}\ngrid: {method: [lora]}", "study.yaml:2: unknown key train.epoch; did you mean"),
        ("grid:\n  lora.r: []", "study.yaml:2: grid.lora.r is an empty list, so there is no run"),
        ("grid:\n  lora.r: 4", "study.yaml:2: grid.lora.r is 4, expected a list of values, such as [4]"),
        ("grid:\n  lora.r: [4, 8, 4]", "study.yaml:2: grid.lora.r is a list with 4 twice; keep one"),
        ("grid: {lora: [1]}", "study.yaml:1: grid.lora is a section; name one of its keys"),
        ("base: {output: x}\ngrid: {method: [lora]}", "study.yaml:1: base.output: a study's runs have no output"),
        ("arms: [{lora.r: 3}]", "study.yaml:1: arm 1 has no name"),
        ("arms: [{name: base}]", "study.yaml:1: the arm's name 'base' is the name of the untouched model"),
        ("arms: [{name: a}, {name: a}]", "study.yaml:1: the arm's name 'a' is given twice"),
        ("arms: [{name: a, seed: 1}]", "study.yaml:1: seed belongs in the grid"),
        ("arms: 3", "study.yaml:1: arms is 3, expected a list such as [{name: q, lora.r: 4}]"),
        ("grid: {lora.r: [2]}\narms: [{name: a, lora.r: 3}]", "lora.r is set by the arm a and varied by the grid"),
        ("base: {model: m}\ngrid: {}", "the grid is empty, so there is nothing to compare"),
        ("grid: [1]", "study.yaml:1: grid is [1], expected a section"),
        ("metrics: [roug]\ngrid: {method: [lora]}", "study.yaml:1: there is no metric roug; did you mean rouge?"),
        ("metrics: []\ngrid: {method: [lora]}", "study.yaml:1: metrics is an empty list"),
        ("evaluate: {row: 3}\ngrid: {method: [lora]}", "study.yaml:1: unknown key evaluate.row; did you mean evalu"),
        ("evaluate: {rows: 0}\ngrid: {method: [lora]}", "study.yaml:1: evaluate.rows is 0, expected a number at least"),
        ("keep: some\ngrid: {method: [lora]}", "study.yaml:1: keep is 'some', expected one of adapters, all"),
        ("latency: {rounds: 3}\ngrid: {seed: [1]}", "latency is not read by a study of kind quality; leave it out"),
        ("kind: latency\ngrid: {seed: [1]}", "grid is not read by a study of kind latency; leave it out"),
        ("- 1", "study.yaml holds no study; expected keys such as base, grid and metrics"),
        ("base: {", "this is no YAML"),
    ],
)  # fmt: skip
def test_what_a_study_may_not_say_is_one_sentence_with_its_line(study, text, sentence):
    told = refused(study, text=text)
    assert sentence in told and "\n" not in told


def test_a_base_that_is_no_recipe_is_told_with_its_line(study):
    text = "base:\n  model: m\n  data: {train: a}\n  train:\n    epochs: -1\ngrid: {method: [lora]}"
    assert "study.yaml:5: train.epochs is -1, expected a number above 0" in refused(study, text=text)


def test_all_faults_are_told_together(study):
    told = refused(study, text="grid:\n  lora.r: 4\n  lora.rr: [1]\nbass: {}")
    assert "3 faults" in told and all(line in told for line in ("line 2:", "line 3:", "line 4:"))


def test_a_word_for_a_key_that_the_grid_varies_is_refused(study):
    assert "lora.r is varied by the grid; write grid.lora.r=[...]" in refused(study, None, "lora.r=4")
    assert "seed is varied by the grid" in refused(study, None, "seed=4")


def test_a_missing_file_is_told_as_a_study(tmp_path):
    with pytest.raises(RecipeError, match="there is no study"):
        load_study(tmp_path / "none.yaml")


def test_reading_a_study_loads_no_torch():
    code = "import sys, lofi.study.spec, lofi.study.grid; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
