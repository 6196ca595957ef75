"""What architectures do to their logits after the output head: scales, soft caps, a bias.

Knows the names under which transformers' configs state it. Does not judge: `loss.py` proves a candidate equal to the
model's own loss before using it. Rejected: a table by architecture name, which would be wrong for every fine-tuned
class and silent about new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitTransform:
    """The steps between the output head and the loss, with their description in words."""

    words: str
    steps: tuple[Step, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:  # (N, V) -> (N, V)
        for step in self.steps:
            logits = step(logits)
        return logits


def candidates(model: nn.Module) -> Iterator[LogitTransform]:
    """The transforms that the model's config suggests, the likeliest first, plain logits last.

    z' = z * scale · z' = z / scale · z' = cap * tanh(z / cap) · z' = z + bias
    Shapes  logits (N, V) -> (N, V)
    """
    bias = _bias(model)
    cap = _soft_cap(model)
    scales = list(_scales(model))
    for scale in [*scales, None] if scales else [None]:
        named = [part for part in (scale, cap, bias) if part is not None]
        if named:
            yield LogitTransform(" then ".join(words for words, _ in named), tuple(step for _, step in named))
    yield LogitTransform("plain logits")


def _number(model: nn.Module, key: str) -> float | None:
    config = model.config
    for owner in (config, getattr(config, "text_config", None), getattr(config, "decoder", None), model):
        value = getattr(owner, key, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _scales(model: nn.Module) -> Iterator[tuple[str, Step]]:
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        value = _number(model, key)
        if value is not None:
            yield f"{key} * {value:g}", lambda z, by=value: z * by
    value = _number(model, "logits_scaling")
    if value is not None:
        yield f"logits_scaling / {value:g}", lambda z, by=value: z / by
        yield f"logits_scaling * {value:g}", lambda z, by=value: z * by


def _soft_cap(model: nn.Module) -> tuple[str, Step] | None:
    cap = _number(model, "final_logit_softcapping")
    if cap is None:
        return None
    return f"soft cap {cap:g}", lambda z: torch.tanh(z / cap) * cap


def _bias(model: nn.Module) -> tuple[str, Step] | None:
    bias = getattr(model, "final_logits_bias", None)
    if not isinstance(bias, Tensor):
        return None
    return "final_logits_bias", lambda z: z + model.final_logits_bias.to(z.device)
