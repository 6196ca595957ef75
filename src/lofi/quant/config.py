"""What a user chooses about a quantized base; the transformers side of these configs is in models/quantization.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lofi.errors import RecipeError

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class NF4Options:
    """4-bit NormalFloat with or without double quantization."""

    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    """dtype of the products: weights are dequantized to it and activations cast."""
    block: int = 64
    skip_modules: Sequence[str] | None = None
    """Modules that stay dense, beside heads and tied weights: names or suffixes."""
    norms_in_float32: bool = False
    """Keep norm weights in float32, as k-bit training recipes do; transformers' norms compute in float32 anyway."""

    def __post_init__(self) -> None:
        _check_dtype(self.compute_dtype)
        if not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise RecipeError(f"block is {self.block}, expected an even number of weights to a scale, such as 64")


@dataclass(frozen=True)
class Int8Options:
    """LLM.int8(): row-wise int8 codes, activations of magnitude >= threshold in 16 bits (0: none are set apart)."""

    threshold: float = 6.0
    compute_dtype: str = "bfloat16"
    skip_modules: Sequence[str] | None = None
    norms_in_float32: bool = False

    def __post_init__(self) -> None:
        _check_dtype(self.compute_dtype)
        if not self.threshold >= 0:
            raise RecipeError(
                f"threshold is {self.threshold}, expected the magnitude from which activations stay in 16 bits: 6.0 as "
                "published, or 0 for none"
            )


def _check_dtype(name: str) -> None:
    if name not in COMPUTE_DTYPES:
        near = get_close_matches(str(name), COMPUTE_DTYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMPUTE_DTYPES)}."
        raise RecipeError(f"compute_dtype is '{name}', which weights cannot be dequantized to; {hint}")
