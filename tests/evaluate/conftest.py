"""Tiny models with weights big enough that their answers differ, and a text format without a tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 67


def shaken(model, seed: int = 0, scale: float = 0.25):
    """Random matrices far from the usual small ones: different inputs then lead to different tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **sizes, **changes)
    return shaken(LlamaForCausalLM(config))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return shaken(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ids)))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, tie_word_embeddings=False, **sizes)
    return shaken(T5ForConditionalGeneration(config), scale=0.6)


FAMILIES = {"llama": llama, "gpt2": gpt2, "t5": t5}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """A tiny random model of each family."""
    return FAMILIES[request.param]()


@pytest.fixture
def tiny_llama():
    """Makes tiny random llamas: tiny_llama(**config changes)."""
    return llama


@pytest.fixture
def letters():
    """A text format in which every character is a token; ids 5 and 9 end an answer."""
    return SimpleNamespace(
        stop_ids=[5, 9],
        encode_prompt=lambda prompt: [ord(letter) % 50 + 10 for letter in prompt],
        decode=lambda ids: " ".join(map(str, ids)),
    )
