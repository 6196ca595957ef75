"""Tiny random models of many families, made in memory: odd sizes, heads that do not divide evenly by accident."""

from __future__ import annotations

from typing import Any

import torch

V = 97  # vocabulary of every tiny model


def _llama_like(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": V, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, **more,
    }  # fmt: skip


_GEMMA = {"head_dim": 8, "tie_word_embeddings": True}
_EXPERTS = {"intermediate_size": 40, "num_local_experts": 3, "num_experts_per_tok": 2}
_ROUTER_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
_T5 = {
    "vocab_size": V, "d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.1,
}  # fmt: skip
_BART = {
    "vocab_size": V, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_BERT = {
    "vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
    "max_position_embeddings": 64,
}  # fmt: skip

# family -> (config class, options)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _llama_like()),
    "llama_tied": ("LlamaConfig", _llama_like(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", _llama_like()),
    "qwen3": ("Qwen3Config", _llama_like(head_dim=8)),
    "gemma": ("GemmaConfig", _llama_like(**_GEMMA)),
    "gemma2": ("Gemma2Config", _llama_like(**_GEMMA, final_logit_softcapping=3.0, query_pre_attn_scalar=8)),
    "gemma3": ("Gemma3TextConfig", _llama_like(**_GEMMA, query_pre_attn_scalar=8, sliding_window=4)),
    "mistral": ("MistralConfig", _llama_like(sliding_window=5)),
    "mixtral": ("MixtralConfig", _llama_like(**_EXPERTS)),
    "mixtral_router_loss": ("MixtralConfig", _llama_like(**_EXPERTS, **_ROUTER_LOSS)),
    "gpt2": ("GPT2Config", {"vocab_size": V, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", {"vocab_size": V, "hidden_size": 24, "ffn_dim": 44, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", {"vocab_size": V, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "t5": ("T5Config", _T5),
    "t5_untied": ("T5Config", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartConfig", _BART),
    "phi": ("PhiConfig", _llama_like(hidden_size=32, partial_rotary_factor=0.5)),
    "cohere": ("CohereConfig", _llama_like(tie_word_embeddings=True, logit_scale=0.0625)),
    "granite": ("GraniteConfig", _llama_like(logits_scaling=7.0, embedding_multiplier=3.0)),
    "hyperclovax": ("HyperCLOVAXConfig", _llama_like(logits_scaling=0.4)),
    "bert": ("BertConfig", _BERT),
    "distilbert": ("DistilBertConfig", {"vocab_size": V, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 44}),
}  # fmt: skip
_AUTO = {
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "distilbert": "AutoModelForMaskedLM",
}


def config(family: str, **changes: Any) -> Any:
    """A fresh config of one family."""
    import transformers

    name, options = FAMILIES[family]
    return getattr(transformers, name)(**{**options, **changes})


def model(family: str, *, seed: int = 0, head: str | None = None, **changes: Any) -> Any:
    """A random model with weights large enough to matter, in evaluation mode."""
    import transformers

    auto = head or _AUTO.get(family.split("_")[0], "AutoModelForCausalLM")
    torch.manual_seed(seed)
    made = getattr(transformers, auto).from_config(config(family, **changes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
        if isinstance(getattr(made, "final_logits_bias", None), torch.Tensor):
            made.final_logits_bias.normal_(0, 1.0)
    return made.eval()
