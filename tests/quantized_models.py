"""An open model made quantized in place, for rooms whose tests need such a base and not the way it is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.linear import Int8Linear, NF4Linear


def quantized(model: Any, kind: str, *, sampled: bool = True) -> Any:
    """The model with every linear under its layers in 4 or 8 bits; `sampled` False as a folder made elsewhere is."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            made = (
                Int8Linear.from_dense(module, Int8Options())
                if kind == "int8"
                else NF4Linear.from_dense(module, NF4Options(double_quant=kind == "nf4"))
            )
            if not sampled:
                made.dense_sample = None
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
    return model
