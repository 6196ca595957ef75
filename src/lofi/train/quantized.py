"""The quantized base of a run: what the recipe asks for, what the model folder is already, and whether they agree.

Knows recipes, configs and frozen linears' sizes. Does not load: `to_load` is what load_model is to be asked for.
Rejected: quantizing a second time what is quantized already (dequantize, then quantize: both roundings, silently).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lofi.errors import RecipeError
from lofi.files.quantized import held_quantization
from lofi.recipe import Recipe
from lofi.recipe.sections import method_over

_BOOKS = {"nf4": ("nf4", "fp4"), "int8": ("int8",)}  # what a folder may hold where the recipe asks for a quantization


@dataclass(frozen=True)
class Wanted:
    """How the base will be quantized: `kind` once it is loaded, `to_load` what load_model is asked to make of it."""

    kind: str | None = None
    to_load: str | None = None
    why: str = ""


def wanted(recipe: Recipe, config: Any) -> Wanted:
    """What the recipe and the model's config make together; a folder that is quantized already is taken as it is.

    Raises  RecipeError for a quantized folder that the method cannot train over, or that is quantized otherwise;
            ModelError for one that another library packed
    """
    stored, asked = held_quantization(config, recipe.model), recipe.quantization
    if stored is None:
        return Wanted(asked, asked, f"method {recipe.method}" if asked else "")
    if not recipe.trains_adapter:
        raise RecipeError(
            f"method is full, but {recipe.model} holds {stored}-quantized weights, which cannot train; "
            f"use method {method_over(stored)}, or give the dense model"
        )
    if asked is not None and stored not in _BOOKS[asked]:
        raise RecipeError(
            f"method {recipe.method} over {asked} was asked for, but {recipe.model} holds {stored}-quantized weights; "
            f"use method {method_over(stored)}, or give the dense model"
        )
    return Wanted(stored, None, "as the model folder is written")


def workspace_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of the one dense copy that products with packed weights go through; 0 for a dense model."""
    shapes = [shape for m in model.modules() if hasattr(m, "packed_shapes") for shape in m.packed_shapes.values()]
    return max((torch.Size(shape).numel() for shape in shapes), default=0) * itemsize


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers as they are stored, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
