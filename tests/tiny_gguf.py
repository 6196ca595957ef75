"""Tiny random models of every family that GGUF is written for, with a tokenizer trained on the spot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import lofi
from lofi.export.gguf_tokenizer import LLAMA3, QWEN2
from lofi.export.gguf_tokenizer_proof import TEXTS
from lofi.models.load import load_model

ROWS = 322  # embeddings: more than the tokenizer has ids
_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": ROWS, "bos_token_id": 1}
_GEMMA = {**_COMMON, "head_dim": 16}
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
_GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_COMMON, "tie_word_embeddings": False}),
    "llama-tied-biased": (
        "llama",
        {**_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 64, "head_dim": 16}),
    "qwen2": ("qwen2", {**_COMMON, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 16}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", {**_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _GLOBAL},
        },
    ),
    "gpt2": ("gpt2", {**_GPT2, "eos_token_id": 1}),
    "gpt2-untied": ("gpt2", {**_GPT2, "eos_token_id": 1, "n_inner": 100, "tie_word_embeddings": False}),
    "phi3": ("phi3", {**_COMMON, "rope_parameters": {**_LOCAL, "partial_rotary_factor": 0.5}}),
}
"""Name -> (model_type, config)."""
SPLITS: dict[str, Any] = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(True)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    "dbrx": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
}


@functools.cache
def byte_level(split: str = "gpt-2") -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens that splits text as llama.cpp's `split` does."""
    made = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    own = pre_tokenizers.ByteLevel(False, use_regex=split in ("gpt-2", "smollm"))
    made.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[split], own])
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(list(TEXTS) * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=special[1], bos_token=special[1], pad_token=special[0]
    )


def fallback(*, prefix: str = "prepend", merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE in small: bytes, letters, and every merge that its tokens allow."""
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *"abcdehlorw", "é"]
    made = ["▁h", "el", "ll", "▁he", "ell", "hel", "▁hel", "lo", "▁w", "or", "wor", "▁wor"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *made]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    if merges is None:
        halves = [(t, cut) for t in made for cut in range(1, len(t))]
        merges = [(t[:cut], t[cut:]) for t, cut in halves if t[:cut] in vocabulary and t[cut:] in vocabulary]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if prefix == "prepend":
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif prefix == "none":
        built.normalizer = replace
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> Path:
    """Write the tiny model `name` (config overridden) with norms, biases and weights that are all random."""
    kind, values = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **config}))
    for key, parameter in model.named_parameters():
        spread = 0.3 if parameter.ndim == 1 else 0.15
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * spread + float("norm" in key and "gemma" not in kind))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_level("qwen2" if "qwen" in kind else "gpt-2").save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, config: Any, *, spread: float = 0.1) -> Any:
    """Save a random adapter for `base` and give the open model that carries it."""
    model = load_model(base, dtype="float32", device="cpu")
    lofi.add_adapter(model, config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * spread)
    lofi.save_adapter(model, folder)
    return model.eval()
