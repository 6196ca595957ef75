"""Tiny random models of the families that parity is proved for: odd sizes, weights large enough to matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lofi
from lofi.adapters.registry import adapter_tensors

V = 53
_SHARED = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_SHARED, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_ENCODER = {
    **_SHARED, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
_GEMMA = {**_DECODER, "head_dim": 8, "tie_word_embeddings": True}

# family -> (class of the config, class of the model, options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 4}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             {**_SHARED, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 44}),
    "opt": ("OPTConfig", "OPTForCausalLM",
            {**_SHARED, "hidden_size": 24, "ffn_dim": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**_SHARED, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_DECODER, "hidden_size": 32, "partial_rotary_factor": 0.5}),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           {"vocab_size": V, "d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
            "eos_token_id": 1, "decoder_start_token_id": 0}),
    "bert": ("BertConfig", "BertForSequenceClassification", _ENCODER),
    "bert_tags": ("BertConfig", "BertForTokenClassification", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification",
                   {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
}  # fmt: skip


def family_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of one family, the same one for the same seed, in evaluation mode."""
    import transformers

    config_class, model_class, options = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**options, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
            elif "bias" in name:
                parameter.normal_(0, 0.05)
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of a fixed batch (2, 9), through whatever class of model."""
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(9))
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def stir(model: nn.Module, name: str = "default", *, seed: int = 5) -> None:
    """Move every trainable tensor of an adapter, so that B is not zero and copies differ from their originals."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


def adapted(family: str, name: str = "default", *, seed: int = 0, **config: Any) -> Any:
    """A family's model with a stirred adapter of rank 3 and alpha 7."""
    model = family_model(family, seed=seed)
    lofi.add_adapter(model, lofi.LoraConfig(**{"r": 3, "lora_alpha": 7, **config}), name)
    stir(model, name)
    return model
