"""What of a transformers model can be packed and what is left dense: linears, stacked experts, heads, norms.

Reads a model and, for norms, changes how they are held. Does not know formats or loading (quantizer.py).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lofi.adapters.experts import is_experts
from lofi.models.bitsandbytes_format import packed_modules
from lofi.models.facts import backbone, class_task
from lofi.quant.experts import FrozenExperts


def widen_norms(model: nn.Module) -> None:
    """Hold the weights of normalisations in float32 and compute them so; what they return keeps the model's dtype."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if own and "norm" in type(module).__name__.lower() and own[0].dtype != torch.float32:
            module.lofi_narrow = own[0].dtype
            module.float()
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow)


def _widen(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].float(), *args[1:]


def _narrow(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(module.lofi_narrow)


def packable_linears(model: nn.Module) -> dict[str, Any]:
    """The dense linears by path, those of a class of their own left out: what they compute is not known."""
    return {path: m for path, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}


def packable_experts(model: nn.Module) -> dict[str, Any]:
    """The modules of stacked experts that follow transformers' interface, by path."""
    return {path: m for path, m in model.named_modules() if is_experts(m) and not isinstance(m, FrozenExperts)}


def stacked_weights(module: Any) -> list[str]:
    """Names of a module's own 3-D parameters of several matrices: stacked experts, dense ones."""
    own = module._parameters.items()
    return [name for name, p in own if p is not None and p.ndim == 3 and p.is_floating_point() and "proj" in name]


def dense_patterns(model: nn.Module) -> list[str]:
    """Patterns that match every linear that is dense and none that is packed, as transformers reads skip_modules."""
    packed = list(packed_modules(model))
    names = []
    for path in (path for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)):
        taken = not all(should_convert_module(other, [path]) for other in packed)  # "fc" would take "layers.0.fc" too
        names.append(f"^{re.escape(path)}$" if taken else path)
    return names


def linear_shape(linear: Any) -> tuple[int, int]:
    """(O, I) of a dense linear or Conv1D."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def kept_heads(model: Any) -> list[str]:
    """Poolers, and what a classifier has outside its backbone: new or trained in full, so never packed."""
    poolers = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    if class_task(type(model).__name__, False) not in ("SEQ_CLS", "TOKEN_CLS"):
        return poolers
    body = backbone(model)
    return poolers + [name for name, child in model.named_children() if child is not body]
