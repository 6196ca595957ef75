"""Which keys a token may attend to, where every row has a length of its own.

Knows a model's kinds of attention from its config, as transformers does: one kind for all layers, or one of
`layer_types` a layer. transformers takes a mask of four dimensions as it is, and a dict of them for models with layer
types, so no model needs code of its own here. Additive masks of the model's dtype: what eager attention adds and what
fused attention would make of a boolean one, once a forward instead of once a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lofi.errors import ModelError

_KNOWN = ("full_attention", "sliding_attention")


class Masks:
    """Masks of one model, by the positions of its tokens."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        _check_implementation(config)
        self.window = getattr(config, "sliding_window", None) or 0
        self.kinds = _kinds(config)
        """Its layers' kinds of attention; one or two of them."""
        self.dtype = model.dtype
        self.hidden = torch.finfo(self.dtype).min
        self.places = torch.arange(0, device=model.device)

    def __call__(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Masks (n, 1, T, L) for tokens at positions (n, T) over the first L positions of their rows."""
        if len(self.places) < length:
            self.places = torch.arange(2 * length, device=self.places.device)
        places, own = self.places[:length], positions[:, None, :, None]
        made = {kind: self._mask(kind, places, own) for kind in self.kinds}
        return made if len(made) > 1 else made[self.kinds[0]]

    def _mask(self, kind: str, places: Tensor, own: Tensor) -> Tensor:
        hidden = places > own  # (n, 1, T, L)
        if kind == "sliding_attention":
            hidden |= places <= own - self.window
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, self.hidden)


def _kinds(config: Any) -> list[str]:
    stated = getattr(config, "layer_types", None)
    if not stated:
        return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    kinds = sorted(set(stated))
    strange = [kind for kind in kinds if kind not in _KNOWN]
    if strange:
        raise ModelError(
            f"a {config.model_type} model has layers of {strange[0]}, and the engine serves full and sliding attention "
            "only: serve it with vLLM (lofi export --to vllm)"
        )
    return kinds


def _check_implementation(config: Any) -> None:
    name = getattr(config, "_attn_implementation", None) or "eager"
    if name not in ("sdpa", "eager"):
        raise ModelError(
            f"the model attends by {name!r}, which takes no mask a row: load it with attn_implementation='sdpa'"
        )
