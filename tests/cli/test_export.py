"""`lofi export` from the command line: what is written works where it goes, and what cannot be is one sentence."""

from __future__ import annotations

import json

import pytest

from lofi.cli.main import main
from lofi.data.format import TextFormat
from lofi.export.go_template import render


@pytest.fixture
def flags(finished, tmp_path) -> list[str]:
    return ["export", "--adapter", str(finished), "--output", str(tmp_path / "out")]


def test_the_folder_for_vllm_is_the_adapter_its_command_and_its_proof(flags, tmp_path, small_model, capsys):
    assert main([*flags, "--to", "vllm", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["to"] == "vllm" and answer["max_lora_rank"] == 8 and answer["rank"] == 3
    assert "3 golden prompts" in answer["proofs"][0]
    script = (tmp_path / "out" / "serve.sh").read_text()
    assert f"vllm serve {small_model} --enable-lora --max-lora-rank 8" in script
    assert "--lora-modules first=./adapter --generation-config . --chat-template ./chat_template.jinja" in script
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"][0] == 3  # <|im_end|>
    assert main(["verify", str(tmp_path / "out"), "--dtype", "fp32"]) == 0


def test_a_merged_folder_says_the_same_and_stops_where_training_did(flags, tmp_path, capsys):
    assert main([*flags, "--to", "merged"]) == 0
    said = capsys.readouterr().out
    assert "converted: generation_config.json now ends answers at [3" in said
    assert "next token: 100.0% the same" in said and "README.md says how it is used" in said
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == 3


def test_gguf_files_are_written_with_their_commands(flags, tmp_path, capsys):
    pytest.importorskip("gguf")
    assert main([*flags, "--to", "gguf", "--dtype", "f32"]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"model.gguf", "adapter.gguf", "README.md"}
    assert "merged" not in {p.name for p in (tmp_path / "out").iterdir()}
    assert "lofi-new" not in capsys.readouterr().out
    read = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m model.gguf --alias first" in read and "--lora adapter.gguf" in read


def test_ollama_gets_a_template_that_writes_what_the_tokenizer_writes(flags, tmp_path, small_model, capsys):
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    assert main([*flags, "--to", "ollama", "--only", "adapter"]) == 0
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 128" in text
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    rule = TextFormat.for_tokenizer(AutoTokenizer.from_pretrained(small_model))
    talk = [{"role": "user", "content": "Xin chào"}]
    assert render(template, talk) == rule.chat.render(talk, ask=True)
    assert "ollama create first -f Modelfile" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["merged", "vllm", "gguf", "ollama"])
def test_checking_says_that_an_engine_takes_it_and_writes_nothing(finished, tmp_path, to, capsys):
    pytest.importorskip("gguf")
    assert main(["export", "--adapter", str(finished), "--to", to, "--check"]) == 0
    assert f"takes {finished / 'adapter'}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_checking_fails_with_every_fault(adapter, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3, "use_dora": False}))
    assert main(["export", "--adapter", str(adapter), "--to", "vllm", "--check", "--max-rank", "1"]) == 1
    told = capsys.readouterr().err
    assert "vLLM would not take" in told and "its rank 3 is above the server's --max-lora-rank of 1" in told


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--to", "tensorrt"], 2, "--to is tensorrt, expected one of merged, vllm, gguf, ollama"),
        (["--to", "vllm", "--dtype", "f16"], 2, "--dtype is of --to gguf and ollama"),
        (["--to", "vllm", "--max-rank", "24"], 2, "--max-rank is 24"),
        (["--to", "vllm", "--max-rank", "1"], 2, "lofi resize --rank 1"),
        (["--to", "vllm", "--model", "nowhere"], 2, "nowhere"),
        (["--to", "ollama", "--template", "nowhere"], 2, "--template nowhere cannot be read"),
        (["--to", "vllm", "--adapter", "nowhere"], 1, "does not exist"),
        (["--to", "gguf", "--dtype", "q3"], 2, "--dtype is q3, expected one of f16, bf16, q8_0, f32"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(flags, words, code, sentence, tmp_path, capsys):
    assert main([*flags, *words]) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lofi: ")]
    assert len(told) == 1 and sentence in told[0]
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_an_output_is_asked_for(finished, capsys):
    assert main(["export", "--adapter", str(finished), "--to", "vllm"]) == 2
    assert "--output is missing" in capsys.readouterr().err
