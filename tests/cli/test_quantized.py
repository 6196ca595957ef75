"""Quantized bases at the command line: quantize, train, evaluate, verify, inspect, and every way to ask wrongly."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from lofi.cli.main import main

SHORT = ("train.max_steps=4", "train.batch_tokens=64", "train.learning_rate=0.01", "lora.r=3", "lora.lora_alpha=12")


def asked(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def said(capsys):
    """Run a command line that must fail; its exit code and its one sentence."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        sentences = [line for line in err.splitlines() if line.startswith("lofi: ")]
        assert out == "" and len(sentences) == 1, err
        return code, sentences[0]

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory, small_model) -> Path:
    """small_model quantized to nf4 by the command line."""
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    assert main(["quantize", "--model", str(small_model), "--to", "nf4", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def damaged(packed, tmp_path) -> Path:
    """A copy of the quantized folder that a test may spoil."""
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, small_model, data) -> Path:
    """The run folder of a short QLoRA run."""
    folder = tmp_path_factory.mktemp("runs") / "qlora"
    flags = ["--model", str(small_model), "--data", str(data), "--output", str(folder), "--dtype", "fp32"]
    assert main(["train", *flags, "--method", "qlora", *SHORT]) == 0
    return folder


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantize_writes_a_folder_that_answers_and_says_what_it_cost(kind, capsys, small_model, data, tmp_path):
    rows = data / "validation.jsonl"
    found = asked(
        capsys, "quantize", "--model", small_model, "--to", kind, "--output", tmp_path / "q", "--data", rows
    )
    metrics = {(row["who"], row["metric"]): row["value"] for row in found["results"]}
    assert 0 < metrics[kind, "mean_logit_error"] < metrics[kind, "max_logit_error"]
    assert {"dense", kind} == {who for who, metric in metrics if metric == "loss"}
    assert found["bytes_after"] < found["bytes_before"] and found["quantization"]["packed_weights"] == 14
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (small_model / "tokenizer.json").read_bytes()
    answer = asked(capsys, "generate", "--model", tmp_path / "q", "--prompt", "count to 3", "--max-new-tokens", 4)
    assert answer["answers"][0]["tokens"] <= 4


def test_inspect_counts_what_a_quantized_folder_stands_for(capsys, small_model, packed):
    dense, folder = asked(capsys, "inspect", small_model), asked(capsys, "inspect", packed)
    would = asked(capsys, "inspect", small_model, "--quantization", "nf4")["quantization"]
    for key in ("parameters", "trainable_at_r16", "linears", "tied", "head"):
        assert folder[key] == dense[key], key
    assert dense["quantization"] is None
    assert folder["quantization"] | {"stored": False} == would
    held = folder["quantization"]
    assert held["kind"] == "nf4" and held["stored"] and held["dense_linears"] == {"embed_tokens": 1}
    assert held["packed_parameters"] + held["dense_parameters"] == folder["parameters"]
    assert 4.1 < held["bits_per_packed_parameter"] < 4.3
    assert main(["inspect", str(packed)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "nf4 with double quantization: 14 weights" in text and "not quantized: " in text


def test_a_qlora_run_is_verified_on_the_quantization_that_it_was_trained_on(capsys, said, qlora, small_model, packed):
    assert json.loads((qlora / "adapter" / "lofi.json").read_text())["base"]["quantization"] == "nf4"
    assert asked(capsys, "verify", qlora)["same"]
    assert asked(capsys, "verify", qlora, "--model", packed)["same"]  # quantized already: the same weights
    assert asked(capsys, "verify", qlora, "--model", small_model, "--quantization", "nf4")["same"]
    capsys.readouterr()
    code = main(["verify", str(qlora), "--quantization", "none"])
    err = capsys.readouterr().err
    assert code == 1 and "(recorded on an nf4 base, replayed on a dense base)" in err
    assert "adapter was trained on an nf4 base and is loaded on a dense base" in err


def test_evaluate_and_generate_take_a_quantization_and_warn_where_it_is_another(capsys, small_model, data, qlora):
    flags = ["--model", small_model, "--adapter", qlora]
    found = {}
    for kind in ("nf4", "int8"):
        rows = asked(
            capsys, "evaluate", *flags, "--data", data, "--metrics", "perplexity", "--quantization", kind
        )["results"]
        found[kind] = {row["who"]: row["value"] for row in rows}
        assert found[kind]["qlora"] < found[kind]["base"]
    assert found["nf4"] != found["int8"]
    ask = ["generate", *map(str, flags), "--prompt", "count to 3", "--max-new-tokens", "3"]
    for kind, warned in (("nf4", False), ("int8", True)):
        capsys.readouterr()
        assert main([*ask, "--quantization", kind]) == 0
        assert ("warning: " in capsys.readouterr().err) == warned


def test_the_next_command_asks_on_the_same_quantization(capsys, small_model, data, tmp_path):
    flags = ["--model", small_model, "--data", data, "--output", tmp_path / "run", "--quantization", "int8"]
    assert main([*map(str, ["train", *flags, *SHORT])]) == 0
    out, err = capsys.readouterr()
    assert "--quantization int8" in out and "quantization: int8 (method lora)" in err
    assert main([*map(str, ["train", *flags, *SHORT, "--resume"])]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("method=qlora", "quantization=int8"), "use method int8-lora, or leave quantization out"),
        (("method=full", "quantization=nf4"), "quantized weights cannot train"),
        (("--method", "qlroa"), "did you mean qlora?"),
        (("--quantization", "nf5"), "did you mean nf4?"),
        (("--quantization", "fp4"), "expected one of nf4, int8"),
    ],
)
def test_a_contradictory_method_is_refused_before_anything_is_written(words, told, said, small_model, data, tmp_path):
    code, sentence = said("train", "--model", small_model, "--data", data, "--output", tmp_path / "o", *words)
    assert code == 2 and told in sentence and not (tmp_path / "o").exists()


def test_a_quantized_folder_is_not_trained_in_full_nor_quantized_again(said, packed, data, tmp_path):
    flags = ["--model", packed, "--output", tmp_path / "o"]
    code, sentence = said("train", *flags, "--data", data, "--method", "full")
    assert code == 2 and "nf4-quantized weights, which cannot train; use method qlora" in sentence
    code, sentence = said("train", *flags, "--data", data, "--method", "int8-lora")
    assert code == 2 and "holds nf4-quantized weights; use method qlora" in sentence
    for kind in ("nf4", "int8"):
        code, sentence = said("quantize", *flags, "--to", kind)
        assert code == 2 and "holds nf4-quantized weights already" in sentence
    code, sentence = said("generate", "--model", packed, "--quantization", "int8", "--prompt", "x")
    assert code == 2 and "nf4" in sentence and "int8" in sentence
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--to", "nf5"), "did you mean nf4?"),
        (("--to", "gguf"), "expected nf4 or int8"),
        (("--to", "int8", "--no-double-quant"), "--double-quant is about nf4"),
        (("--to", "nf4", "--threshold", "6"), "--threshold is about int8"),
        (("--to", "int8", "--threshold", "-1"), "threshold is -1.0, expected the magnitude"),
        (("--to", "nf4", "--skip", "q_porj"), "did you mean q_proj?"),
        (("--to", "nf4", "--skip", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"), "no linear layer"),
    ],
)
def test_a_wrong_request_to_quantize_is_one_sentence(flags, told, said, small_model, tmp_path):
    code, sentence = said("quantize", "--model", small_model, "--output", tmp_path / "o", *flags)
    assert code == 2 and told in sentence and not (tmp_path / "o").exists()


def test_an_output_that_is_something_else_is_left_alone(said, small_model, packed, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("x")
    code, sentence = said("quantize", "--model", small_model, "--to", "nf4", "--output", tmp_path / "o")
    assert code == 1 and "thesis.tex" in sentence and "choose a new or empty folder" in sentence
    code, sentence = said("quantize", "--model", small_model, "--to", "nf4", "--output", small_model)
    assert code == 2 and "choose another output" in sentence


# what a folder may hold that cannot be loaded: asked of every verb that opens a model


def rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def another_library(folder: Path) -> None:
    edit_config(folder, lambda held: (held.clear(), held.update(quant_method="gptq", bits=4)))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def short_codes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-3].clone()}))


def no_scales(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{WEIGHT}.absmax"))


def odd_dtype(folder: Path) -> None:
    edit_config(folder, lambda held: held.update(bnb_4bit_compute_dtype="int4"))


def neither(folder: Path) -> None:
    edit_config(folder, lambda held: held.update(load_in_4bit=False, _load_in_4bit=False))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_library, "gptq-quantized weights"),
        (cut, "is cut short"),
        (short_codes, f"{WEIGHT} has"),
        (no_scales, f"{WEIGHT} lacks absmax"),
        (odd_dtype, "int4"),
        (neither, "neither nf4, fp4 nor int8"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_sentence_from_every_verb(change, told, said, damaged, data, tmp_path):
    change(damaged)
    out = tmp_path / "o"
    for words in (
        ("generate", "--model", damaged, "--prompt", "x"),
        ("train", "--model", damaged, "--data", data, "--output", out, "--method", "qlora"),
        ("evaluate", "--model", damaged, "--data", data, "--metrics", "perplexity"),
        ("quantize", "--model", damaged, "--to", "nf4", "--output", out),
    ):
        code, sentence = said(*words)
        assert code == 2, (words, sentence)
        assert told in sentence or (words[0] == "quantize" and "already" in sentence), words
    assert not out.exists()


@pytest.mark.parametrize("words", [("--dtype", "int4"), ("--dtype", "fp64"), ("--quantization", "nf5")])
def test_a_dtype_or_quantization_that_cannot_be_is_one_sentence(words, said, small_model):
    quantized = () if "--quantization" in words else ("--quantization", "nf4")
    code, sentence = said("generate", "--model", small_model, "--prompt", "x", *quantized, *words)
    assert code == 2 and words[1] in sentence


def test_a_full_disk_leaves_no_quantized_folder(said, lofi_tiny, tmp_path):
    """A file size limit refuses writes exactly as a full disk does (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, sentence = said("quantize", "--model", lofi_tiny, "--to", "nf4", "--output", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "the disk is full" in sentence
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_quantized_folder(lofi_tiny, tmp_path, capsys):
    def interrupt() -> None:
        while not list(tmp_path.glob(".o.lofi-new-*/*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["quantize", "--model", str(lofi_tiny), "--to", "nf4", "--output", str(tmp_path / "o")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
