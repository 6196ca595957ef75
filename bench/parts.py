"""Of what the memory of a model in NF4 is made: bytes of its tensors by what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CODES, SCALES, EMBEDDINGS, REST, ADAPTERS = (
    "base codes", "absmax and tables", "embeddings and head", "norms and others", "adapters",
)  # fmt: skip


def component_bytes(model: Any) -> dict[str, int]:
    """Bytes by component, every tensor counted once; lofi's buffers and bitsandbytes' quantization states alike."""
    sizes = dict.fromkeys((CODES, SCALES, EMBEDDINGS, REST, ADAPTERS), 0)
    seen: set[int] = set()
    for component, tensor in _tensors(model):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            sizes[component] += tensor.nbytes
    return sizes


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield _component(name, parameter), parameter.data
        state = getattr(parameter, "quant_state", None)
        for part in _of_state(state) if state is not None else ():
            yield SCALES, part
    for name, buffer in model.named_buffers():
        scale = any(word in name.rpartition(".")[2] for word in ("absmax", "quant_map", "nested"))
        yield SCALES if scale else REST, buffer


def _of_state(state: Any) -> Iterator[Tensor]:
    for held in (state, getattr(state, "state2", None)):
        yield from (getattr(held, name) for name in ("absmax", "code", "offset") if _is_tensor(held, name))


def _is_tensor(holder: Any, name: str) -> bool:
    return isinstance(getattr(holder, name, None), Tensor)


def _component(name: str, parameter: Tensor) -> str:
    if "lora_" in name:
        return ADAPTERS
    if parameter.dtype in (torch.uint8, torch.int8):
        return CODES
    return EMBEDDINGS if "embed_tokens" in name or "lm_head" in name else REST


def gradient_bytes(model: Any) -> int:
    """Bytes of all gradients that are there now."""
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
