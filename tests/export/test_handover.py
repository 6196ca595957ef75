"""Handing over: what may be ordered, where it may be written, and what the folders say."""

from __future__ import annotations

import json

import pytest
import torch

import lofi
from lofi.adapters.registry import adapter_tensors, load_adapter_tensors
from lofi.errors import LofiError, RequestError
from lofi.export import instructions
from lofi.export.handover import MADE_BY, Order, check, export
from lofi.files.adapter_folder import save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory, lofi_tiny):
    """A small Llama with lofi-tiny's tokenizer."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "small"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=16,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lofi_tiny / name, folder / name)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A function that saves a random adapter, without a text format on record."""

    def make(name="words", config=None, record=None):
        model = lofi.load_model(base, dtype="fp32", device="cpu")
        torch.manual_seed(7)
        lofi.add_adapter(model, config or lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"]))
        values = {key: 0.3 * torch.randn_like(tensor) for key, tensor in adapter_tensors(model).items()}
        load_adapter_tensors(model, "default", values)
        return save_adapter(model, tmp_path / name, record=record)

    return make


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"to": "tensorrt"}, "--to is tensorrt, expected one of merged, vllm, gguf, ollama"),
        ({"to": "gguf", "only": "both"}, "--only is both"),
        ({"to": "vllm", "dtype": "f16"}, "--dtype is of --to gguf and ollama"),
        ({"to": "merged", "only": "model"}, "--only is of --to gguf and ollama"),
        ({"to": "gguf", "max_rank": 8}, "--max-rank is of --to vllm; leave it out with --to gguf"),
        ({"to": "gguf", "template": "x"}, "--template is of --to ollama"),
    ],
)
def test_an_order_that_cannot_be_is_refused(order, words):
    with pytest.raises(RequestError, match=words):
        Order(**order)


def test_a_merged_folder_is_a_model_with_instructions(adapter, tmp_path):
    report = export(adapter(), tmp_path / "out", Order(to="merged"))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "lofi_merge.json", "README.md", MADE_BY} <= names
    assert json.loads((tmp_path / "out" / "lofi_merge.json").read_text())["output"] == str(tmp_path / "out")
    assert not any("lofi-new" in line for line in report.lines())
    read = (tmp_path / "out" / "README.md").read_text()
    assert "lofi verify" in read and "vllm serve" in read


def test_a_folder_handed_over_may_be_written_anew_and_others_not(adapter, tmp_path):
    folder, out = adapter(), tmp_path / "out"
    export(folder, out, Order(to="vllm"))
    export(folder, out, Order(to="vllm"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(LofiError, match=r"holds thesis\.txt, which is no part of a hand-over"):
        export(folder, foreign, Order(to="vllm"))
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_what_is_given_is_never_written_into(adapter, base, tmp_path):
    folder = adapter()
    for output in (folder, folder / "out", base, tmp_path):
        with pytest.raises(RequestError, match="choose another"):
            export(folder, output, Order(to="vllm"))


def test_nothing_is_left_where_a_hand_over_fails(adapter, tmp_path):
    config = lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], use_dora=True)
    folder = adapter("dora", config)
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="DoRA"):
        export(folder, tmp_path / "out", Order(to="vllm"))
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_what_was_there(adapter, tmp_path, monkeypatch):
    folder, out = adapter(), tmp_path / "out"
    export(folder, out, Order(to="vllm"))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lofi.export.handover.write_text", full)
    with pytest.raises(LofiError, match="the disk is full"):
        export(folder, out, Order(to="vllm"))
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_base_that_nobody_names_is_asked_for(adapter, base, tmp_path):
    folder = adapter()
    record = json.loads((folder / "lofi.json").read_text())
    record["base"]["path"] = None
    (folder / "lofi.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match="does not say where its base is; give it with --model"):
        export(folder, tmp_path / "out", Order(to="merged"))
    assert export(folder, tmp_path / "out", Order(to="merged"), model=base).base == str(base)
    assert "not at hand" in " ".join(check(folder, Order(to="ollama")).notes)


def test_checking_writes_nothing_and_names_what_would_be_refused(adapter, base, tmp_path):
    config = lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], trainable_token_indices=[4])
    folder = adapter("rows", config)
    before = set(tmp_path.rglob("*"))
    assert "rows of its own" in check(folder, Order(to="vllm")).refusals[0]
    assert not check(folder, Order(to="merged")).refusals
    assert set(tmp_path.rglob("*")) == before
    houlsby = adapter("houlsby", lofi.HoulsbyConfig(bottleneck_size=3))
    for to in ("merged", "gguf", "ollama", "vllm"):
        assert check(houlsby, Order(to=to)).refusals, to


def test_what_writes_no_text_is_refused_before_anything_is_merged(base, tmp_path):
    model = lofi.load_model(base, dtype="fp32", device="cpu", task="SEQ_CLS", num_labels=3)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False))
    folder = save_adapter(model, tmp_path / "classifier")
    for to in ("gguf", "ollama"):
        with pytest.raises(RequestError, match=r"its task is SEQ_CLS.*--to merged"):
            export(folder, tmp_path / "out", Order(to=to))
        assert "SEQ_CLS" in check(folder, Order(to=to)).refusals[0]
    assert not check(folder, Order(to="merged")).refusals


def test_the_commands_for_vllm_name_base_rank_and_adapter(tmp_path):
    words = instructions.vllm_command("my name", "org/base", 32, template=False)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert "my name=./adapter" in words and "--chat-template" not in words
    script = instructions.script(words)
    assert "'my name=./adapter'" in script and script.startswith("#!/bin/sh\n")
    text = instructions.vllm("my name", "org/base", words, 32)
    for flag in ("--tensor-parallel-size", "--data-parallel-size", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "--enable-lora"):
        assert flag in text
    assert "--endpoint-model 'my name'" in text
