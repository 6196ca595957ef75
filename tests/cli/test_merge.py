"""`lofi merge` from the command line: into quantized forms, compared, and refused with one sentence."""

from __future__ import annotations

import json

import pytest

from lofi.cli.main import main


@pytest.fixture
def flags(finished, small_model, data, tmp_path) -> list[str]:
    words = [
        "--model",
        small_model,
        "--adapter",
        finished,
        "--output",
        tmp_path / "out",
        "--data",
        data / "train.jsonl",
    ]
    return ["merge", *map(str, words)]


def test_into_nf4_says_how_it_was_rounded_and_what_it_kept(flags, tmp_path, capsys):
    assert main([*flags, "--into", "nf4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["into"], answer["onto"]) == ("nf4", "auto") and answer["rounding"] in ("nearest", "compensated")
    assert "calibrated on" in answer["road"] or answer["rounding"] == "nearest"
    assert {"merged", "nf4, nearest", "nf4, compensated"} <= {row["who"] for row in answer["results"]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert json.loads((tmp_path / "out" / "lofi_merge.json").read_text())["road"] == answer["road"]


def test_people_see_the_forms_side_by_side(flags, capsys):
    assert main([*flags, "--into", "int8", "--rounding", "nearest", "--compare"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any("rounded nearest to int8" in line for line in said)
    forms = [line.strip().partition(":")[0] for line in said if line.startswith("  ")]
    assert sorted(forms) == ["dense", "int8, compensated", "int8, nearest", "nf4, compensated", "nf4, nearest"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--into", "nf5"], "did you mean nf4?"),
        (["--into", "nf4", "--rounding", "nearst"], "did you mean nearest?"),
        (["--rounding", "stochastic"], "a dense merge has one rounding"),
        (["--onto", "dequantized"], "was not trained on an nf4 or int8 base"),
        (["--into", "nf4", "--min-kept", "1.5"], "expected a share above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(flags, words, sentence, tmp_path, capsys):
    assert main([*flags, *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lofi: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "out").exists()
