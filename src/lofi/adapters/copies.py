"""What trains besides A and B trains copies: whole modules (`modules_to_save`, task heads) and single biases.

The frozen original keeps its place and its bits; the copy is a float32 master, so a bf16 base trains without rounding
its updates away, and its output is cast to what the original would have returned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.surgery import Adapted, Part, named_base_modules, own_class
from lofi.errors import TargetError


class ModuleCopy(Part):
    """A trainable copy of one module, run in its place."""

    kind = "copy"

    def __init__(self, module: nn.Module):
        super().__init__()
        if holds_codes(module):
            raise TargetError(
                f"modules_to_save names a {type(module).__name__} whose weight is quantized, and codes cannot be "
                "trained in full; adapt it as a target module, or keep it dense with skip_modules"
            )
        self.copy = _bare_copy(module).float().requires_grad_(True)

    @staticmethod
    def alone(module: Any, parts: list[Any]) -> list[Any]:
        """The one part that may replace this module.

        Raises  TargetError if several would, or if another active adapter acts inside what is replaced
        """
        what = own_class(type(module)).__name__
        if len(parts) > 1:
            raise TargetError(
                f"{len(parts)} active adapters each replace the same {what} in full, "
                "and two replacements do not add up; activate one of them"
            )
        active = set(module.switch.current())
        if len(active) > 1 and any(isinstance(m, Adapted) and active & m.adapters.keys() for m in _inside(module)):
            raise TargetError(
                f"one active adapter replaces a {what} in full and another adapts modules inside it, "
                "which do not add up; activate one of them"
            )
        return parts

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (part,) = ModuleCopy.alone(module, parts)
        frozen = next(module.parameters()).dtype
        args, kwargs = _cast(args, torch.float32), _cast(kwargs, torch.float32)
        return _cast(part.copy(*args, **kwargs), frozen)

    def changes(self) -> list[str]:
        return [name for name, _ in self.copy.named_parameters()]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return self.copy.get_parameter(tensor_name).detach().to(base.dtype)


class BiasShift(Part):
    """A trained copy of a module's bias, in whose place it stands; around other parts, y + (b' - b).

    The module's own forward runs with the trained bias, so step 0 is exactly the base and a merge changes nothing.
    """

    kind = "bias"
    order = 1

    def __init__(self, module: Any):
        super().__init__()
        self.bias = nn.Parameter(module.bias.detach().float().clone())

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        frozen = module.bias
        if getattr(base, "__self__", None) is not module:  # another part already stands around the module's forward
            y = base(*args, **kwargs)  # (..., O)
            return y + sum(part.bias - frozen.float() for part in parts).to(y.dtype)
        first, *others = parts
        bias = first.bias
        for part in others:
            bias = bias + (part.bias - frozen.float())
        return _with_bias(module, bias.to(frozen.dtype)).forward(*args, **kwargs)

    def changes(self) -> list[str]:
        return ["bias"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return self.bias.detach().to(base.dtype)


def _with_bias(module: Any, bias: Tensor) -> Any:
    """A stand-in for the module that shares all but its bias; the module itself may be running in other threads."""
    cls: Any = own_class(type(module))
    stand_in = cls.__new__(cls)
    stand_in.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": bias}}
    return stand_in


def shiftable(module: nn.Module) -> bool:
    """Whether the module owns a bias vector over its output's last dimension: linears and normalisations do."""
    bias = module._parameters.get("bias")
    weight = module._parameters.get("weight")
    return bias is not None and bias.ndim == 1 and weight is not None and weight.ndim <= 2


def holds_codes(module: nn.Module) -> bool:
    """Whether a weight of the module, or inside it, is quantized."""
    return any(hasattr(inner, "packed_shapes") for inner in module.modules())


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy without the adapters of others; configs are shared, so that a later change of theirs is seen here too."""
    shared = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    made = copy.deepcopy(module, shared)
    for inner in list(made.modules()):
        if isinstance(inner, Adapted):
            del inner.adapters, inner.switch
            inner.__class__ = own_class(type(inner))
    return made


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for name, inner in named_base_modules(module) if name)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value
