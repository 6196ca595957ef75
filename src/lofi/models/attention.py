"""Which attention trains faster on this machine: torch's fused kernel, or plain matrix products.

On a CPU in bf16 the backward pass of `scaled_dot_product_attention` costs several times its forward: for rows of 64 to
512 tokens plain products ("eager") take a quarter to a half of the time, from 1,024 on twice, and in float32 they never
win (`python -m bench attention` measures where they cross). They keep the scores of every head, so they are chosen only
where those are small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

SHORT_ROW = 512
"""Tokens up to which plain products are faster in bf16 on a CPU."""
SCORE_BYTES = 8
"""Kept for the backward pass per score: its softmax in float32 and in the model's dtype, and the mask's share."""
MEMORY_SHARE = 0.1
"""Share of the free memory that scores may take."""


class Attention(NamedTuple):
    """transformers' name of an attention implementation, and why it was chosen."""

    name: str
    reason: str


def choose_attention(
    model: Any, *, compute: torch.dtype, row_tokens: int, forward_tokens: int, free_bytes: int
) -> Attention:
    """The attention to train this model with, on the device that it is on.

    compute is the dtype of the products, row_tokens the longest row T, forward_tokens the tokens M of one forward pass;
    scores take M T heads layers SCORE_BYTES. Any implementation but transformers' default is the user's own choice and
    stays.
    """
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    device = next(model.parameters()).device.type
    if name != "sdpa" or device != "cpu":
        return Attention(name, "the model's own")
    if compute != torch.bfloat16 or row_tokens > SHORT_ROW:
        return Attention(name, f"the fused kernel wins on a CPU but for bf16 rows of at most {SHORT_ROW} tokens")
    scores = forward_tokens * row_tokens * _heads(model.config) * SCORE_BYTES
    if scores > MEMORY_SHARE * free_bytes:
        return Attention(name, f"plain products would keep {scores / 2**30:.1f} GiB of scores")
    return Attention("eager", f"rows of up to {row_tokens} tokens: plain products train faster on a CPU")


def set_attention(model: Any, name: str) -> None:
    """Have this model instance use an attention implementation by transformers' name, if it does not already."""
    if getattr(model.config, "_attn_implementation", None) not in (None, name):
        model.set_attn_implementation(name)


def _heads(config: Any) -> int:
    """Attention heads of all layers together; a generous guess where the config has other names."""
    layers = _first(config, ("num_hidden_layers", "n_layer", "num_layers"))
    return layers * _first(config, ("num_attention_heads", "n_head", "num_heads"))


def _first(config: Any, names: tuple[str, ...]) -> int:
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 32)
