"""How a base is quantized: asked of an open model, of a model's config, and put in words.

Knows the frozen linears' kinds and the keys of bitsandbytes' `quantization_config`, in which quantized folders are
written. Reads no tensor. What another library quantized has no kind here; opening it is refused by the loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def quantization_of(model: nn.Module) -> str | None:
    """ "nf4", "fp4" or "int8" for a model with packed weights; None for a dense one."""
    for module in model.modules():
        if hasattr(module, "packed_shapes"):
            return str(getattr(module, "quant_type", module.kind))
    return None


def stored_quantization(config: Any) -> str | None:
    """The same of a transformers config (or its dict), which says how the folder's weights are written; None: dense.

    A format that is not bitsandbytes' is given by its own name ("gptq"), which no loader of lofi knows.
    """
    held = config.get("quantization_config") if isinstance(config, Mapping) else _held(config)
    if not held:
        return None
    told: Mapping[str, Any] = held if isinstance(held, Mapping) else held.to_dict()
    if told.get("quant_method") != "bitsandbytes":
        return str(told.get("quant_method", "unknown"))
    if told.get("load_in_8bit"):
        return "int8"
    return str(told.get("bnb_4bit_quant_type", "fp4")) if told.get("load_in_4bit") else None


def in_words(quantization: str | None) -> str:
    """ "an nf4 base", "a dense base"."""
    return "a dense base" if quantization is None else f"an {quantization} base"


def _held(config: Any) -> Any:
    return getattr(config, "quantization_config", None)
