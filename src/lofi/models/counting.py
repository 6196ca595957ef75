"""Parameter arithmetic without weights: models built from their config on torch's meta device.

Knows how to build such a model and count it. What an adapter would add is asked of add_adapter itself, run on the
meta model, so that the count cannot disagree with training. Does not know files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import AdapterConfig
from lofi.adapters.registry import trainable_counts
from lofi.models.facts import check_task
from lofi.models.load import _HEADS


@dataclass(frozen=True)
class Count:
    """Trainable and all parameters, adapters included, as PEFT prints them."""

    trainable: int
    all: int

    @property
    def percent(self) -> float:
        """100 * trainable / all."""
        return 100 * self.trainable / self.all

    def __str__(self) -> str:
        return f"trainable params: {self.trainable} || all params: {self.all} || trainable%: {self.percent}"


def meta_model(config: Any, task: str = "CAUSAL_LM") -> nn.Module:
    """The transformers model of a config without memory for its weights (every parameter on the meta device)."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, _HEADS[check_task(task)]).from_config(config)
        _part_head(model)
    return model


def _part_head(model: Any) -> None:
    """Give T5 1.1 and FLAN-T5 the output head of their own that their files hold.

    transformers ties every T5 that is not read from files; that a config said otherwise survives only as
    `scale_decoder_outputs`.
    """
    head = model.get_output_embeddings()
    scaled = getattr(model.config, "scale_decoder_outputs", True)
    if not scaled and head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once; a packed weight counts the elements that its codes stand for."""
    return trainable_counts(model)[1]


def count_adapter(config: Any, adapter: AdapterConfig, task: str = "CAUSAL_LM") -> Count:
    """What an adapter would train in a model of this config, by attaching it to the model on the meta device."""
    model = meta_model(config, task)
    add_adapter(model, adapter)
    return Count(*trainable_counts(model))


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Parameters of LoRA at rank r on weights of these (out, in) shapes: sum of r * (out + in)."""
    return sum(r * (rows + columns) for rows, columns in shapes)
