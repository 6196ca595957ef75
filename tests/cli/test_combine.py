"""`lofi combine` from the command line: the sum in three ways, and what it refuses in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lofi.cli.main import main


@pytest.fixture
def second(finished, tmp_path):
    """Another adapter of the same base: the first with its B's negated and halved."""
    folder = shutil.copytree(finished / "adapter", tmp_path / "second")
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {key: tensor * -0.5 if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def flags(finished, second, tmp_path) -> list[str]:
    parts = ["--adapter", f"a={finished}", "--adapter", f"b={second}"]
    return ["combine", *parts, "--output", str(tmp_path / "sum")]


def test_the_sum_is_exact_and_any_model_of_the_base_takes_it(flags, small_model, tmp_path, capsys):
    assert main([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["weights"] == [1.0, 1.0] and answer["how"] == "concat"
    assert {update["after"] for update in answer["updates"]} == {6}
    assert answer["predicted_error"] == 0.0 and answer["measured_error"] < 1e-6 * answer["norm"]
    words = ["generate", "--model", str(small_model), "--adapter", str(tmp_path / "sum"), "--prompt", "count to 3"]
    assert main([*words, "--max-new-tokens", "2"]) == 0


def test_half_an_adapter_and_its_negated_half_cancel(flags, tmp_path, capsys):
    assert main([*flags, "--weights", "0.5,1", "--how", "concat", "--json"]) == 0
    tensors = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    for key, a in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            assert torch.allclose(b.double() @ a.double(), torch.zeros(b.shape[0], a.shape[1]).double(), atol=1e-7)
            assert b.abs().max() > 1e-4


def test_people_read_the_sum_its_error_and_that_there_are_no_cross_terms(flags, capsys):
    assert main([*flags, "--weights", "0.7,0.3", "--how", "svd", "--rank", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("0.7 x a + 0.3 x b by SVD to rank 2", "against the exact sum", "no cross terms", "written to"):
        assert words in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--weights", "0.7"], "1 weights for 2 adapters"),
        (["--weights", "0.7,x"], "--weights is '0.7,x', expected a number for each adapter"),
        (["--weights", "0.7,0"], "weights holds 0.0"),
        (["--how", "liner"], "did you mean linear?"),
        (["--how", "svd"], "svd needs a rank"),
        (["--rank", "3"], "rank goes with svd"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(flags, words, sentence, tmp_path, capsys):
    assert main([*flags, *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lofi: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "sum").exists()


def test_damaged_single_and_missing_adapters_are_refused(finished, second, tmp_path, capsys):
    out = ["--output", str(tmp_path / "sum")]
    assert main(["combine", "--adapter", str(finished), *out]) == 2
    assert "combining takes two or more" in capsys.readouterr().err
    assert main(["combine", "--adapter", str(finished), "--adapter", str(tmp_path / "none"), *out]) == 1
    assert "does not exist" in capsys.readouterr().err
    tensors = load_file(second / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, second / "adapter_model.safetensors", {"format": "pt"})
    assert main(["combine", "--adapter", f"a={finished}", "--adapter", f"b={second}", *out]) == 1
    assert "NaN or infinity" in capsys.readouterr().err
