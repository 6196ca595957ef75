"""How a base is quantized: asked of an open model, of a model's config, and put in words."""

from __future__ import annotations

from typing import Any

from torch import nn


def quantization_of(model: nn.Module) -> str | None:
    """ "nf4", "fp4" or "int8" for a model with packed weights; None for a dense one."""
    for module in model.modules():
        if hasattr(module, "packed_shapes"):
            return str(getattr(module, "quant_type", module.kind))
    return None


def held_quantization(config: Any, where: str) -> str | None:
    """The same of a transformers config, which says how the folder's weights are written.

    Raises  ModelError for weights that another library packed
    """
    from lofi.models.quantization import held_kind

    held = getattr(config, "quantization_config", None)
    return held_kind(held if held is None or isinstance(held, dict) else held.to_dict(), where)


def in_words(quantization: str | None) -> str:
    """ "an nf4 base", "a dense base"."""
    return "a dense base" if quantization is None else f"an {quantization} base"
