"""The numbers of an architecture as GGUF's metadata states them: sizes, epsilons, rotary frequencies, windows.

Knows what llama.cpp assumes where its metadata has no key for it (activation, attention scale, which layers slide), so
a model that differs there is refused instead of written wrongly. Where llama.cpp attends to everything and the model
through a window, the context length is cut to the window: up to there both are the same.
Does not know tensors or files. `config` is transformers' config object, its defaults filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lofi.errors import ModelError
from lofi.export.gguf_names import Family, Heads

_ACTIVATIONS = {
    "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
    "gemma": ("gelu_pytorch_tanh", "gelu_new", "gelu"),  # Gemma's checkpoints say gelu and mean the tanh form
    "gemma2": ("gelu_pytorch_tanh", "gelu_new"),
    "gemma3_text": ("gelu_pytorch_tanh", "gelu_new"),
}
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # every such layer attends to everything, the others through the window


@dataclass(frozen=True)
class Numbers:
    """Metadata of one architecture, and the tensors that follow from its numbers alone."""

    values: dict[str, Any]
    """Key below the architecture's name -> value; int is written as uint32, float as float32."""
    heads: Heads
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def numbers_of(family: Family, config: Any, where: str) -> Numbers:
    """The metadata of a model.

    Raises  ModelError where the model computes something that llama.cpp's loader of this architecture does not
    """
    _check(family, config, where)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    context, notes = _context(family, config)
    values: dict[str, Any] = {
        "vocab_size": int(config.vocab_size),
        "context_length": context,
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": _feed_forward(config),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    if family.model_type == "gpt2":
        values["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
        return Numbers(values, Heads(heads, kv_heads), {}, notes)
    values |= {
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": size,
        "attention.value_length": size,
    }
    values |= _windows(family, config)
    rope, tensors = _rotary(family, config, size, where)
    return Numbers(values | rope, Heads(heads, kv_heads), tensors, notes)


def _feed_forward(config: Any) -> int:
    if hasattr(config, "intermediate_size"):
        return int(config.intermediate_size)
    return int(config.n_inner or 4 * config.hidden_size)


def _check(family: Family, config: Any, where: str) -> None:
    """Refuse what the file could not say."""
    faults = [*_activation_faults(family, config), *_gpt2_faults(config), *_gemma_faults(family, config)]
    if getattr(config, "use_bidirectional_attention", None):
        faults.append("use_bidirectional_attention is true, llama.cpp attends to the past alone")
    if family.model_type == "phi3" and _size(config) * config.num_attention_heads != config.hidden_size:
        faults.append("head_dim times heads is not hidden_size")
    if faults:
        raise ModelError(
            f"{where} cannot be written as GGUF: llama.cpp's {family.architecture} differs from it "
            f"({'; '.join(faults)}); serve it with lofi or vLLM instead"
        )


def _size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _activation_faults(family: Family, config: Any) -> list[str]:
    known = _ACTIVATIONS.get(family.model_type, ("silu", "swish"))
    names = ("hidden_activation", "hidden_act", "activation_function")
    held = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return [] if held in known else [f"its activation is {held}, expected {known[0]}"]


def _gpt2_faults(config: Any) -> list[str]:
    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    if config.model_type != "gpt2":
        return []
    return [f"{name} is {not value}" for name, value in wanted.items() if bool(getattr(config, name, value)) != value]


def _gemma_faults(family: Family, config: Any) -> list[str]:
    faults = []
    if family.model_type in _PERIOD:
        # llama.cpp knows the 27B sizes by their number of layers and divides by hidden_size / heads there
        large = config.num_hidden_layers == (46 if family.model_type == "gemma2" else 62)
        wanted = config.hidden_size // config.num_attention_heads if large else config.head_dim
        if config.query_pre_attn_scalar != wanted:
            faults.append(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, expected {wanted}")
        if list(config.layer_types) != _pattern(_PERIOD[family.model_type], config.num_hidden_layers):
            faults.append(f"layer_types are not every {_PERIOD[family.model_type]}th full, the others sliding")
    if family.model_type == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        faults.append("it caps no logits")
    if family.model_type == "gemma3_text" and config.attn_logit_softcapping is not None:
        faults.append("it caps attention logits")
    if family.model_type in ("gemma", "gemma2") and not config.tie_word_embeddings:
        faults.append("its embeddings are not tied")
    return faults


def _pattern(period: int, layers: int) -> list[str]:
    return ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(layers)]


def _context(family: Family, config: Any) -> tuple[int, tuple[str, ...]]:
    """(context length to state, notes)."""
    length = int(config.max_position_embeddings)
    if family.model_type == "phi3" and config.rope_parameters.get("rope_type") == "longrope":
        return _short(config, length)
    if family.model_type in _PERIOD or not _slides(config):
        return length, ()
    window = int(config.sliding_window)
    if window >= length:
        return length, ()
    said = f"context length {length} is cut to the sliding window {window}: llama.cpp has none for this architecture"
    return window, (said,)


def _short(config: Any, length: int) -> tuple[int, tuple[str, ...]]:
    """LongRoPE's factors: the model chooses them by the length of the text, llama.cpp by the room it is given."""
    original = _original(config.rope_parameters, config)
    said = f"context length {length} is stated as {original}, where the short rotary factors hold"
    return original, (f"{said}: with more (-c) llama.cpp uses the long ones for short texts too, the model does not",)


def _original(rope: Mapping[str, Any], config: Any) -> int:
    held = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(held or config.max_position_embeddings)


def _slides(config: Any) -> bool:
    if getattr(config, "sliding_window", None) is None:
        return False
    types = getattr(config, "layer_types", None)
    return types is None or "sliding_attention" in types


def _windows(family: Family, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if family.model_type in _PERIOD:
        values["attention.sliding_window"] = int(config.sliding_window)
    if family.model_type == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if family.model_type in _PERIOD and config.final_logit_softcapping is not None:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def _rotary(family: Family, config: Any, size: int, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors) of the rotary embedding."""
    rope: Mapping[str, Any] = config.rope_parameters
    values: dict[str, Any] = {}
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _unknown(where, f"{local.get('rope_type')} on its sliding layers")
        values["rope.freq_base_swa"] = float(local["rope_theta"])
        rope = rope["full_attention"]
    turning = int(size * float(rope.get("partial_rotary_factor") or 1.0))
    if turning != size and family.model_type != "phi3":
        raise _unknown(where, f"partial_rotary_factor {rope['partial_rotary_factor']}")
    values |= {"rope.dimension_count": turning, "rope.freq_base": float(rope["rope_theta"])}
    kind = str(rope.get("rope_type", "default"))
    scaled, tensors = _scaling(kind, rope, config, turning, where)
    return values | scaled, tensors


def _scaling(
    kind: str, rope: Mapping[str, Any], config: Any, turning: int, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
    if kind == "llama3" and config.model_type in ("llama", "mistral"):
        return {}, {"rope_freqs.weight": llama3_divisors(rope, turning)}
    if kind == "yarn" and config.model_type != "gemma3_text" and not _odd_yarn(rope):
        return _yarn(rope, config), {}
    if kind == "longrope" and config.model_type == "phi3":
        return _longrope(rope, config)
    raise _unknown(where, f"{kind} with these numbers" if kind == "yarn" else kind)


def _unknown(where: str, kind: str) -> ModelError:
    return ModelError(
        f"{where} scales its rotary embedding by {kind}, which llama.cpp does not know for this architecture; "
        "serve it with lofi or vLLM instead"
    )


def _odd_yarn(rope: Mapping[str, Any]) -> bool:
    """Whether it differs from the form that is compiled into llama.cpp, which reads neither betas nor mscale."""
    betas = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    mscale = any(rope.get(key) for key in ("mscale", "mscale_all_dim"))
    return mscale or rope.get("truncate") is False or betas != (32, 1)


def _yarn(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071); llama.cpp itself multiplies by 0.1 ln(factor) + 1, so only what differs is stated."""
    original = _original(rope, config)
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    stated = rope.get("attention_factor")
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    return values | ({} if stated is None else {"rope.scaling.attn_factor": float(stated) / own})


def llama3_divisors(rope: Mapping[str, Any], size: int) -> Tensor:
    """What each rotary frequency is divided by, (K/2,) float32: 1 for short waves, `factor` for long ones.

    lambda = 2 pi theta^(2i/K); between original/high and original/low the frequency is a blend, as in Llama 3.1
    (arXiv 2407.21783, sec. 3.2 names the method; the numbers are those of its config)
    """
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponent  # (K/2,)
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).to(torch.float32)


def _longrope(rope: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LongRoPE (arXiv 2402.13753): two lists of divisors, the long one beyond the original context."""
    original = _original(rope, config)
    ratio = float(rope.get("factor") or config.max_position_embeddings / original)
    stated = rope.get("attention_factor")
    own = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    values = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(own if stated is None else stated),
    }
    names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
    return values, {name: torch.tensor(rope[key], dtype=torch.float32) for name, key in names.items()}
