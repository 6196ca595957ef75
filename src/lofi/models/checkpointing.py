"""Gradient checkpointing that keeps the adapter choice of the forward when activations are computed again.

Knows transformers' switches for it. Does not know adapters' forward: their room gives the context to restore.
Rejected: the reentrant form (needs inputs that require a gradient, and runs the recomputation without our context).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lofi.adapters.switch import checkpoint_contexts
from lofi.errors import ModelError


def enable(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them (about a third more time).

    Call it after add_adapter. Raises ModelError if the architecture has no checkpointed layers.
    Exact    gradients equal those without checkpointing; dropout repeats (the random state is restored)
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if "lofi_registry" in model.__dict__:
        options["context_fn"] = checkpoint_contexts(model)
    try:
        _switch_on(model, options)
    except ValueError:
        raise ModelError(
            f"{type(model).__name__} does not support gradient checkpointing; set train.gradient_checkpointing: false"
        ) from None


def _switch_on(model: nn.Module, options: dict[str, Any]) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.disable_input_require_grads()  # only the reentrant form needs gradients on frozen embeddings


def disable(model: nn.Module) -> None:
    """Keep activations again."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
