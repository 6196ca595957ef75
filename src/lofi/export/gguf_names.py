"""What a model's tensors are called in a GGUF file, and how each one is turned on its way there.

Knows, for every family that lofi exports: GGUF's name of each tensor, and where llama.cpp keeps it in another form
than transformers: rows of q and k for rotary pairs that lie side by side, norms with their one added, weights (I, O).
Does not know the numbers of the architecture (gguf_numbers.py), nor how a tensor is stored (gguf_file.py).
Rejected: the name table of the gguf package, which maps what merely looks alike; here a tensor without a place is an
error, so that no file is written that lacks one.
Source: the tensor names of GGUF's specification, and what llama.cpp's loaders of these architectures ask for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from lofi.errors import ModelError

_GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PRE_NORM = {**_ATTENTION, **_GATED_MLP, "post_attention_layernorm": "ffn_norm"}
_SANDWICH = {
    **_ATTENTION,
    **_GATED_MLP,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, as GGUF names and turns its tensors."""

    model_type: str
    model_class: str
    architecture: str
    """general.architecture of the file."""
    block: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    biases: frozenset[str] = frozenset()
    """What may have a bias; llama.cpp reads no other."""
    turns: Mapping[str, str] = field(default_factory=dict)
    """GGUF's name without block and suffix -> interleave_q, interleave_k, transpose or one_more."""
    layers: str = "layers"
    ignored: tuple[str, ...] = (r"(.+\.)?rotary_emb\.inv_freq",)


_INTERLEAVED = {"attn_q": "interleave_q", "attn_k": "interleave_k"}
_NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm", "output_norm")
_ONE_MORE = dict.fromkeys(_NORMS, "one_more")
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_PHI3 = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM", "llama", _PRE_NORM, turns=_INTERLEAVED,
            biases=_QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
        ),
        Family("mistral", "MistralForCausalLM", "llama", _PRE_NORM, turns=_INTERLEAVED),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", _PRE_NORM, biases=_QKV),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", {**_PRE_NORM, **_HEAD_NORMS}),
        Family("gemma", "GemmaForCausalLM", "gemma", _PRE_NORM, turns=_ONE_MORE),
        Family("gemma2", "Gemma2ForCausalLM", "gemma2", _SANDWICH, turns=_ONE_MORE),
        Family("gemma3_text", "Gemma3ForCausalLM", "gemma3", {**_SANDWICH, **_HEAD_NORMS}, turns=_ONE_MORE),
        Family("phi3", "Phi3ForCausalLM", "phi3", _PHI3),
        Family(
            "gpt2", "GPT2LMHeadModel", "gpt2", _GPT2, layers="h",
            outside={"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"},
            biases=frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"}),
            turns=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transpose"),
            ignored=(r"(.+\.)?attn\.(bias|masked_bias)",),
        ),
    )
}  # fmt: skip


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model's config.json.

    Raises  ModelError for an architecture that lofi cannot write exactly, naming those that it can
    """
    kind = str(config.get("model_type"))
    known = ", ".join(FAMILIES)
    if kind not in FAMILIES:
        near = get_close_matches(kind, FAMILIES, n=1)
        hint = f"; the nearest is {near[0]}, which is another one" if near else ""
        raise ModelError(
            f"{where} is a {kind} model, and GGUF is written for {known}{hint}; serve it with lofi or vLLM instead"
        )
    family = FAMILIES[kind]
    named = (config.get("architectures") or [family.model_class])[0]
    if named != family.model_class:
        raise ModelError(
            f"{where} is a {named}, and GGUF is written for the {family.model_class} of {kind}, which generates text; "
            "export a causal language model"
        )
    return family


@dataclass(frozen=True)
class Place:
    """Where one tensor goes: its name in the GGUF file and how it is turned ("" as it is)."""

    name: str
    turn: str


def place_of(family: Family, key: str) -> Place | None:
    """GGUF's place of a checkpoint key of this family; None where it has none."""
    path, _, suffix = key.rpartition(".")
    path = path.removeprefix("transformer.").removeprefix("model.")
    block = re.fullmatch(rf"{family.layers}\.(\d+)\.(.+)", path)
    name = family.block.get(block[2]) if block else family.outside.get(path)
    if name is None or suffix not in ("weight", "bias") or (suffix == "bias" and name not in family.biases):
        return None
    turn = family.turns.get(name, "")
    if suffix == "bias" and turn == "transpose":
        turn = ""
    return Place(f"blk.{block[1]}.{name}.{suffix}" if block else f"{name}.{suffix}", turn)


def is_ignored(family: Family, key: str) -> bool:
    """Whether the key is a buffer that both sides compute themselves."""
    return any(re.fullmatch(pattern, key) for pattern in family.ignored)


@dataclass(frozen=True)
class Heads:
    """How many heads the rows of q and of k belong to."""

    q: int
    k: int

    def of(self, turn: str) -> int:
        """The heads that an interleaving turn splits rows into."""
        return self.q if turn == "interleave_q" else self.k


def turned(tensor: Tensor, turn: str, heads: Heads) -> Tensor:
    """A tensor of transformers as llama.cpp keeps it.

    interleave_q/k  rows of each head (K,): first half f, second half s, become f0 s0 f1 s1 ...: llama.cpp rotates
                    neighbours, transformers rotates element i with element i + K/2
    one_more        float32 of 1 + w: Gemma's norms multiply by that
    transpose       (I, O) -> (O, I)
    Exact           a permutation, or the sum that the model itself makes in float32
    """
    if turn.startswith("interleave"):
        count = heads.of(turn)
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])  # (H, 2, K/2, I)
        return halves.transpose(1, 2).reshape(tensor.shape)
    if turn == "transpose":
        return tensor.t()
    if turn == "one_more":
        return tensor.to(torch.float32) + 1
    return tensor
