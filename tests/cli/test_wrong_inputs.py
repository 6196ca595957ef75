"""Every wrong input of the issue's list: one clear sentence, exit code 1 or 2, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from lofi.cli.main import main


@pytest.fixture
def said(capsys):
    """Run a command line; its exit code and its one sentence."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert out == "", "a failure says nothing on stdout"
        sentence = [line for line in err.splitlines() if line.startswith("lofi: ")]
        assert len(sentence) == 1, err
        return code, sentence[0]

    return run


@pytest.fixture
def request_for(small_model, data, tmp_path):
    """The words of a sound `lofi train` for a test to spoil: `request_for(model=...)`, then overrides."""

    def words(*overrides: str, model: object = None, rows: object = None) -> list[str]:
        flags = ["--model", model or small_model, "--data", rows or data, "--output", tmp_path / "out"]
        return ["train", *map(str, flags), "train.max_steps=2", "train.batch_tokens=64", *overrides]

    return words


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", "did you mean train.learning_rate?"),
        ("method=lorra", "did you mean lora?"),
        ("method=houlsbi", "did you mean houlsby"),
        ("quantization=nf5", "did you mean nf4?"),
        ("lora.r=0", "r is 0"),
        ("train.learning_rate=-0.1", "train.learning_rate is -0.1, expected a number above 0"),
        ("lora.target_modules=[q_porj]", "q_proj"),
        ("lora.target_modules=[q_proj, v_porj]", "v_proj"),
        ("train.max_length=3", "raise train.max_length"),
        ("data.columns={prompt: promt}", "promt"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(said, request_for, tmp_path, override, words):
    code, sentence = said(*request_for(override))
    assert code == 2
    assert words in sentence
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_one_misspelt_key_exits_2_naming_the_key_and_its_line(said, tmp_path):
    path = tmp_path / "first.yaml"
    path.write_text("model: m\ndata: {train: t.jsonl}\noutput: o\ntrain:\n  learning_rat: 1\n")
    code, sentence = said("train", path)
    assert code == 2
    assert f"{path}:5: unknown key train.learning_rat; did you mean train.learning_rate?" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "compl', ":2"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n', ":2"),
        ('{"question": "a", "reply": "b"}\n', "question"),
    ],
)
def test_bad_data_names_the_file_and_the_line(said, request_for, tmp_path, text, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    code, sentence = said(*request_for(rows=path))
    assert code == 2
    assert "rows.jsonl" in sentence
    assert words in sentence


def test_a_missing_data_file_is_named_with_its_neighbour(said, request_for, data):
    code, sentence = said(*request_for(rows=data / "trian.jsonl"))
    assert code == 2
    assert "train.jsonl" in sentence


@pytest.mark.parametrize("model", ["nowhere/at/all", "smal"])
def test_a_missing_model_is_named(said, request_for, small_model, model):
    code, sentence = said(*request_for(model=small_model.parent / model))
    assert code == 2
    assert "there is no model folder" in sentence


def test_a_misspelt_metric_is_told_before_a_model_is_loaded(said, data):
    code, sentence = said("evaluate", "--model", "nowhere", "--data", data, "--metrics", "rogue")
    assert code == 2
    assert "rouge" in sentence


def test_merge_requests_that_cannot_be_met_are_refused(said, small_model, finished, tmp_path):
    flags = ["merge", "--model", small_model, "--adapter", finished, "--output", tmp_path / "merged"]
    assert "into is 'nf5', which a merge does not know; did you mean nf4?" in said(*flags, "--into", "nf5")[1]
    assert "did you mean compensated?" in said(*flags, "--into", "nf4", "--rounding", "compensate")[1]
    assert "a dense merge has one rounding" in said(*flags, "--rounding", "nearest")[1]
    assert "was not trained on an nf4 or int8 base" in said(*flags, "--onto", "dequantized")[1]
    assert "--data" in said(*flags, "--min-kept", "0.9")[1]
    assert said(*flags, "--min-kept", "7", "--data", "x")[0] == 2
    assert not (tmp_path / "merged").exists()


def replaced(folder: Path, change) -> None:
    """Rewrite an adapter's tensors after `change` had them."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def no_tensor(tensors):
    tensors.pop(sorted(tensors)[0])


def nan(tensors):
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def zero(tensors):
    for key in tensors:
        tensors[key].zero_()


@pytest.mark.parametrize(("change", "words"), [(no_tensor, "missing"), (nan, "NaN"), (zero, "changes nothing")])
def test_a_damaged_adapter_is_refused(said, small_model, adapter, change, words):
    replaced(adapter, change)
    code, sentence = said("generate", "--model", small_model, "--adapter", adapter, "--prompt", "x")
    assert code == 1
    assert words.lower() in sentence.lower()


def test_a_missing_or_truncated_adapter_is_refused(said, small_model, adapter):
    asked = ["generate", "--model", small_model, "--prompt", "x", "--adapter"]
    assert "does not exist" in said(*asked, adapter / "none")[1]
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, sentence = said(*asked, adapter)
    assert code == 1
    assert "truncated" in sentence


def test_a_rank_that_contradicts_the_file_is_refused(said, small_model, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    code, sentence = said("generate", "--model", small_model, "--adapter", adapter, "--prompt", "x")
    assert code == 1
    assert "r=5" in sentence


def test_another_base_is_refused(said, lofi_tiny, finished):
    code, sentence = said("generate", "--model", lofi_tiny, "--adapter", finished, "--prompt", "x")
    assert code == 1
    assert "another base" in sentence


def test_a_full_disk_loses_nothing_that_was_there(said, request_for, tmp_path):
    """A file size limit refuses writes exactly as a full disk does (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, sentence = said(*request_for("lora.r=64"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "the disk is full" in sentence
    assert not (tmp_path / "out" / "adapter").exists()


def test_ctrl_c_leaves_a_checkpoint_and_resume_goes_on(request_for, tmp_path, capsys):
    words = [word for word in request_for("train.max_steps=60") if word != "train.max_steps=2"]
    journal = tmp_path / "out" / "metrics.jsonl"

    def interrupt() -> None:
        while not (journal.is_file() and '"loss"' in journal.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(words) == 130
    assert "--resume" in capsys.readouterr().err
    assert list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
