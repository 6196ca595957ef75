"""What a study is refused before anything trains: one sentence a run, the others untouched."""

from __future__ import annotations

import json

import pytest

from lofi.errors import DataError
from lofi.study.check import check
from lofi.study.grid import expand


def refused(study, tmp_path) -> dict[str, str]:
    """Run -> its sentence, each a single line."""
    found = check(study, expand(study), tmp_path).refused
    assert not any("\n" in sentence for sentence in found.values())
    return found


def test_a_study_that_can_be_done_is_not_refused_and_its_files_are_known(study, tmp_path, rows):
    asked = study({"method": ["full", "lora", "houlsby"]}, general=rows["general"])
    found = check(asked, expand(asked), tmp_path)
    assert found.refused == {}
    assert set(found.files) == {rows["train"], rows["test"], rows["general"]}
    assert not list(tmp_path.iterdir())


def test_a_method_that_the_model_cannot_take_is_refused_alone(study, tmp_path):
    found = refused(study({"method": ["bitfit", "lora"]}), tmp_path)
    assert list(found) == ["bitfit-s0"] and "biases, but this LlamaForCausalLM has none" in found["bitfit-s0"]


def test_targets_that_the_model_has_not_are_refused_alone(study, tmp_path):
    found = refused(study({"lora.target_modules": [["q_proj"], ["c_attn"]]}), tmp_path)
    assert list(found) == ["lora-targets-c_attn-s0"] and "c_attn" in found["lora-targets-c_attn-s0"]


def test_a_value_that_is_no_recipe_is_refused_alone(study, tmp_path):
    assert list(refused(study({"lora.r": [0, 4]}, base={"lora.r": 1}), tmp_path)) == ["lora-r0-s0"]


def test_a_metric_that_the_rows_cannot_give_is_refused(study, tmp_path, rows):
    data = {"data.train": rows["labelled"], "data.test": rows["labelled"]}
    found = refused(study(base=data, metrics=["rouge"]), tmp_path)
    assert set(found) == {"full-s0", "lora-s0"}
    assert "rouge cannot be measured on data of kind classification: use any of accuracy" in found["lora-s0"]


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ({"data.test": None}, "data.test and data.validation are missing; give rows to judge on"),
        ({"data.test": "none.jsonl"}, "none.jsonl does not exist"),
        ({"data.train": "none.jsonl"}, "none.jsonl does not exist"),
        ({"train.early_stopping": 2}, "train.early_stopping needs validation rows"),
        ({"model": "./no-such-model"}, "no-such-model"),
    ],
)
def test_what_is_missing_is_told_once_for_every_run(study, tmp_path, base, sentence):
    found = refused(study(base=base), tmp_path)
    assert len(found) == 2 and all(sentence in told for told in found.values())


def test_rows_to_judge_on_must_be_of_the_kind_that_is_trained(study, tmp_path, rows):
    found = refused(study(base={"data.test": rows["labelled"]}, metrics=None), tmp_path)
    assert "holds classification rows but" in found["full-s0"]


def test_a_general_text_is_for_language_models_and_must_be_there(study, tmp_path, rows):
    data = {"data.train": rows["labelled"], "data.test": rows["labelled"]}
    found = refused(study(base=data, metrics=["accuracy"], general=rows["general"]), tmp_path)
    assert "whose perplexity this SEQ_CLS model cannot tell; leave general out" in found["lora-s0"]
    with pytest.raises(DataError, match=r"nothing.txt does not exist"):
        check(study(general="nothing.txt"), [], tmp_path)


def test_half_written_runs_are_refused_by_folder(study, tmp_path):
    asked = study({"lora.r": [2, 3, 4, 5]})
    torn, foreign, empty = (tmp_path / "runs" / f"lora-r{r}-s0" / "training" for r in (2, 3, 4))
    for folder in (torn, foreign, empty):
        folder.mkdir(parents=True)
    (torn / "chosen.json").write_text("{")
    (foreign / "letter.txt").write_text("x")
    found = refused(asked, tmp_path)
    assert list(found) == ["lora-r2-s0", "lora-r3-s0"]
    for name, told in found.items():
        assert f"{name} holds an unreadable half-written run (" in told
        assert told.endswith("; remove that folder and run the study again")


def test_a_run_whose_weights_are_gone_without_a_record_is_refused(study, tmp_path):
    folder = tmp_path / "runs" / "lora-r2-s0" / "training"
    folder.mkdir(parents=True)
    asked = study({"lora.r": [2]})
    recipe = expand(asked)[0].recipe

    (folder / "chosen.json").write_text(json.dumps({"recipe": recipe.values()}))
    (folder / "result.json").write_text(json.dumps({"metrics": {}}))
    assert "was trained, but its weights are gone" in refused(asked, tmp_path)["lora-r2-s0"]
