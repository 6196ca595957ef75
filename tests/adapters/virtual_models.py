"""Tiny random decoders for prefix and prompt tuning: one of each kind of attention module, odd sizes, qk-norm, GQA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lofi
from lofi.adapters.registry import adapter_tensors

V, P = 53, 5
_IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {**_IDS, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4}
_LLAMA = {
    **_IDS, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_PLAIN = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_WIDE = {**_LLAMA, "head_dim": 10}
_PAIR = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": V}

# family -> (class of the config, class of the model, options)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _WIDE),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _WIDE),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_WIDE, "query_pre_attn_scalar": 8, "sliding_window": 7,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 7}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM",
                {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "opt": ("OPTConfig", "OPTForCausalLM",
            {**_IDS, "hidden_size": 24, "ffn_dim": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
             "max_position_embeddings": 64, "word_embed_proj_dim": 24}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_PLAIN, "rotary_pct": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_IDS, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM",
               {**_IDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "falcon_tagger": ("FalconConfig", "FalconForTokenClassification",
                      {**_IDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           {**_PAIR, "d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 3, "num_heads": 4}),
    "bart": ("BartConfig", "BartForConditionalGeneration",
             {**_PAIR, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "bos_token_id": 2,
              "max_position_embeddings": 64, "forced_eos_token_id": None}),
}  # fmt: skip
DECODERS = tuple(MODELS)[: tuple(MODELS).index("bloom")]


def virtual_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of one family, the same one for the same seed, in evaluation mode."""
    import transformers

    config_class, model_class, options = MODELS[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**options, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    return model.eval()


def some_ids(rows: int = 2, length: int = 9, seed: int = 9) -> Tensor:
    """Fixed token ids (N, T), none of them special."""
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def stirred(model: nn.Module, config: Any, name: str = "default", *, seed: int = 5) -> Any:
    """The model with a new adapter, every trainable tensor of it moved."""
    lofi.add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model
