"""`lofi resize` from the command line: what it says, what it writes, and what it refuses in one sentence."""

from __future__ import annotations

import json

import pytest

from lofi.cli.main import main


@pytest.fixture
def flags(finished, tmp_path) -> list[str]:
    return ["resize", "--adapter", str(finished), "--output", str(tmp_path / "small")]


def test_a_smaller_adapter_is_written_verified_and_described(flags, finished, small_model, data, tmp_path, capsys):
    more = ["--rank", "2", "--model", str(small_model), "--data", str(data / "train.jsonl")]
    assert main([*flags, *more, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {update["after"] for update in answer["updates"]} == {2}
    assert answer["measured_error"] == pytest.approx(answer["predicted_error"], rel=1e-5)
    assert 0 < answer["measured_error"] < answer["norm"]
    assert {"base", "adapter", "resized"} <= {row["who"] for row in answer["results"]}
    assert main(["verify", str(tmp_path / "small"), "--model", str(small_model), "--dtype", "fp32"]) == 0
    assert "golden prompts give the same" in capsys.readouterr().out


def test_people_read_ranks_errors_and_what_was_left_out(flags, tmp_path, capsys):
    assert main([*flags, "--energy", "0.9", "--same-rank"]) == 0
    said = capsys.readouterr().out
    for words in ("to 0.9 of the squared norm: rank 3 ->", "measured", "predicted", "golden prompts were left out"):
        assert words in said
    assert (tmp_path / "small" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "none of --rank, --energy and --min-kept given"),
        (["--rank", "2", "--energy", "0.5"], 2, "--rank and --energy of"),
        (["--rank", "3"], 2, "would change nothing"),
        (["--rank", "0"], 2, "rank is 0"),
        (["--min-kept", "0.9"], 2, "min-kept needs --model and --data"),
        (["--rank", "1", "--adapter", "nowhere"], 1, "does not exist"),
        (["--rank", "1", "--columns", "x"], 2, "--columns is 'x'"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(flags, words, code, sentence, tmp_path, capsys):
    assert main([*flags, *words]) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lofi: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "small").exists()


def test_an_output_that_exists_is_never_written_over(flags, tmp_path, capsys):
    assert main([*flags, "--rank", "1"]) == 0
    before = (tmp_path / "small" / "lofi.json").read_bytes()
    assert main([*flags, "--rank", "2"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
    assert (tmp_path / "small" / "lofi.json").read_bytes() == before
