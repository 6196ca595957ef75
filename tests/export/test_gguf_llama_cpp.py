"""llama.cpp itself reads our files: logits, greedy tokens and token ids, with and without an adapter.

Skipped without llama-cpp-python, which is built from source for minutes and is no dependency of lofi. To run them:
`pip install llama-cpp-python` here, or LOFI_LLAMA_CPP=/path/to/a/python that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

import lofi
from lofi.export.gguf_adapter import write_adapter_gguf
from lofi.export.gguf_model import write_model_gguf
from lofi.export.gguf_tokenizer_proof import TEXTS
from lofi.models.load import load_model, load_tokenizer
from tiny_gguf import FAMILIES, ROWS, SPLITS, adapted, byte_level, fallback, tiny

PEER = Path(__file__).resolve().parents[1] / "llama_cpp_peer.py"
# llama.cpp looks its GELU up in a table of float16; everything else is float32 sums in another order
_TABLE, _SUMS = 5e-3, 1e-4
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 256,
}
ROPES = {
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "yarn-with-its-own-factor": ("qwen3", {"rope_parameters": {**_YARN, "attention_factor": 1.3}}),
    "longrope": (
        "phi3",
        {"rope_parameters": _LONG, "max_position_embeddings": 512, "original_max_position_embeddings": 256},
    ),
}


@pytest.fixture(scope="module")
def python() -> str:
    named = os.environ.get("LOFI_LLAMA_CPP")
    if named is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed; set LOFI_LLAMA_CPP to a Python that has it")
    return named or sys.executable


def prompts(vocabulary: int, length: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (2, length), generator=draw).tolist()


def said(python: str, *files: Path, ids=(), texts=(), room: int = 256, new: int = 0) -> dict:
    job = json.dumps({"ids": list(ids), "texts": list(texts), "room": room, "new": new})
    command = [python, str(PEER), *map(str, files)]
    done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@torch.no_grad()
def compare(python: str, model, *files: Path, within: float, length: int = 40, room: int = 256, new: int = 8) -> None:
    """Logits at every position, and the greedy continuation, of llama.cpp and of transformers."""
    ids = prompts(model.config.vocab_size, length)
    theirs = said(python, *files, ids=ids, room=room, new=new)
    for prompt, logits, greedy in zip(ids, theirs["logits"], theirs["greedy"], strict=True):
        mine = model(torch.tensor([prompt])).logits[0]
        assert mine.std() > 0.3
        torch.testing.assert_close(torch.tensor(logits), mine, atol=within, rtol=0)
        if new:
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert out[0, len(prompt) :].tolist() == greedy


def bound(family: str) -> float:
    return _TABLE if family.startswith(("gemma", "gpt2")) else _SUMS


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_what_the_model_says_with_and_without_an_adapter(family, python, tmp_path):
    base = tiny(family, tmp_path / "base")
    write_model_gguf(base, tmp_path / "m.gguf", dtype="f32")
    compare(python, load_model(base, dtype="float32"), tmp_path / "m.gguf", within=bound(family))
    tied = load_model(base).config.tie_word_embeddings
    targets = "all-linear" if tied else r".*(_proj|c_attn|c_proj|c_fc|embed_tokens|wte|lm_head)"
    config = lofi.LoraConfig(r=5, lora_alpha=7, use_rslora=True, target_modules=targets)
    model = adapted(base, tmp_path / "a", config)
    write_adapter_gguf(tmp_path / "a", base, tmp_path / "a.gguf")
    compare(python, model, tmp_path / "m.gguf", tmp_path / "a.gguf", within=bound(family))


@pytest.mark.parametrize("name", ROPES)
def test_llama_cpp_rotates_as_the_model_does(name, python, tmp_path):
    family, config = ROPES[name]
    base = tiny(family, tmp_path / "base", **config)
    write_model_gguf(base, tmp_path / "m.gguf", dtype="f32")
    model = load_model(base, dtype="float32")
    compare(python, model, tmp_path / "m.gguf", within=_SUMS, length=100)
    if name == "longrope":  # in a room beyond the original context it takes the long factors, as the model does there
        compare(python, model, tmp_path / "m.gguf", within=_SUMS, length=300, room=512, new=0)


def texts() -> list[str]:
    draw = random.Random(0)
    letters = "aAbB 's'll  \n\t019.,!?-_éạ汉😀<>|{}"
    return [*TEXTS, *("".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(150))]


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_tokenizes_as_the_byte_level_tokenizer_does(split, python, tmp_path):
    base = tiny("llama", tmp_path / "base")
    byte_level(split).save_pretrained(base)
    write_model_gguf(base, tmp_path / "m.gguf")
    tokenizer = load_tokenizer(base)
    theirs = said(python, tmp_path / "m.gguf", texts=texts())["ids"]
    assert len(tokenizer) < ROWS and theirs == [tokenizer(text)["input_ids"] for text in texts()]


@pytest.mark.parametrize("prefix", ["prepend", "none", "always"])
def test_llama_cpp_tokenizes_as_byte_fallback_does(prefix, python, tmp_path):
    base, tokenizer = tiny("llama", tmp_path / "base"), fallback(prefix=prefix)
    if prefix != "always":  # which looks at the space before each piece of text
        tokenizer.add_tokens([AddedToken("ab", normalized=False), AddedToken("ll", normalized=False)])
    tokenizer.save_pretrained(base)
    write_model_gguf(base, tmp_path / "m.gguf")
    asked = [*texts(), "before</s>after 12", "<s>hello</s>world hello"]
    asked = [text for text in asked if prefix != "always" or (not text.startswith(" ") and "ab " not in text)]
    theirs = said(python, tmp_path / "m.gguf", texts=asked)["ids"]
    assert theirs == [load_tokenizer(base)(text)["input_ids"] for text in asked]


def test_llama_cpp_tokenizes_as_sentencepiece_does_and_tells_the_story(shared, python, tmp_path):
    folder = shared / "models" / "stories260k"
    write_model_gguf(folder, tmp_path / "m.gguf", dtype="f32")
    compare(python, load_model(folder, dtype="float32"), tmp_path / "m.gguf", within=_SUMS)
    tokenizer = load_tokenizer(folder)
    assert said(python, tmp_path / "m.gguf", texts=texts())["ids"] == [tokenizer(t)["input_ids"] for t in texts()]


def test_llama_cpp_runs_the_shipped_model_with_an_adapter(lofi_tiny, python, tmp_path):
    write_model_gguf(lofi_tiny, tmp_path / "m.gguf", dtype="f32")
    compare(python, load_model(lofi_tiny, dtype="float32"), tmp_path / "m.gguf", within=_SUMS)
    config = lofi.LoraConfig(
        r=6, lora_alpha=9, use_rslora=True, rank_pattern={"k_proj": 5}, alpha_pattern={"v_proj": 4}
    )
    model = adapted(lofi_tiny, tmp_path / "a", config, spread=0.05)
    write_adapter_gguf(tmp_path / "a", lofi_tiny, tmp_path / "a.gguf")
    compare(python, model, tmp_path / "m.gguf", tmp_path / "a.gguf", within=_SUMS)
    tokenizer = load_tokenizer(lofi_tiny)
    assert said(python, tmp_path / "m.gguf", texts=texts())["ids"] == [tokenizer(t)["input_ids"] for t in texts()]
