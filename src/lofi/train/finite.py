"""The watch for numbers that are no longer numbers: which tensor, which batch, which rows of the file.

Costs nothing while all is well: the loss is looked at once a micro-batch and the gradients through their global norm,
which clipping computes anyway. Only when something is wrong is the guilty tensor searched.
Rejected: skipping the batch and going on (the peers' default): the logged loss is then not the loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.errors import NonFiniteError
from lofi.files.atomic import write_json


def bad_gradient(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The first gradient that holds NaN or infinity, by the name of its parameter."""
    for name, gradient in named:
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return name
    return None


@torch.no_grad()
def bad_activation(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Run the batch once more and name the first tensor that is not finite: a weight, else a module's output."""
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            return f"the weight {name}"
    found: list[str] = []
    hooks = [m.register_forward_hook(_catcher(name, found)) for name, m in model.named_modules() if not _has_child(m)]
    try:
        with contextlib.suppress(RuntimeError, ValueError, TypeError):  # what fails here is not what is asked about
            model(**{k: v for k, v in inputs.items() if k != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {found[0]}" if found else "the loss"


def _has_child(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not hasattr(module, "adapters")


def _catcher(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return look


def stop(what: str, *, step: int, rows: list[str], folder: str | Path, inputs: dict[str, Any] | None) -> NonFiniteError:
    """The error for `what`, after writing the batch into `nonfinite.json` in the run folder.

    The file holds  step, tensor, rows, and the batch's integer inputs
    """
    where = f" on {_few(rows)}" if rows else ""
    dumped = Path(folder) / "nonfinite.json"
    held = {k: v.tolist() for k, v in (inputs or {}).items() if isinstance(v, Tensor) and not v.is_floating_point()}
    write_json(dumped, {"step": step, "tensor": what, "rows": rows, "inputs": held})
    return NonFiniteError(
        f"{what} is not a finite number at step {step}{where} (the batch is in {dumped}); "
        "look at those rows, or lower the learning rate or use dtype fp32"
    )


def _few(rows: list[str], most: int = 3) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more


def finite(value: float | Tensor) -> bool:
    """Whether a number (or a scalar tensor) is neither NaN nor infinite."""
    return bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
