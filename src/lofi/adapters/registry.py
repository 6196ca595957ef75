"""The adapters of one model: a plain record on the root module, and the views that other rooms read.

`model.lofi_registry` is the only state beside the adapted modules themselves. It is an ordinary object, not a module:
parameters live, move and are saved with the modules they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lofi.adapters.config import AdapterConfig
from lofi.adapters.methods import virtual_length
from lofi.adapters.surgery import Part, own_tensors
from lofi.adapters.switch import Switch, active_adapters
from lofi.errors import AdapterFileError, TargetError

if TYPE_CHECKING:
    from lofi.adapters.report import AttachReport


@dataclass
class Adapter:
    """One adapter of a model: what was asked for, what it matched, and its parts by module path."""

    name: str
    config: AdapterConfig
    parts: dict[str, Part]
    report: AttachReport


@dataclass
class Registry:
    """Every adapter of one model, the shared switch, and what `unload` must restore."""

    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    required_grad: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of the base's parameters before the first adapter froze them."""


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The model's adapters by name; {} for a model without."""
    registry: Registry | None = model.__dict__.get("lofi_registry")
    return registry.adapters if registry is not None else {}


def adapter_of(model: nn.Module, name: str) -> Adapter:
    """One adapter by name; TargetError names the nearest where there is none."""
    held = adapters_of(model)
    if name not in held:
        near = get_close_matches(name, held, n=1)
        known = ", ".join(map(repr, held)) or "none"
        hint = f"did you mean {near[0]!r}?" if near else "add_adapter or load_adapter makes one."
        raise TargetError(f"no adapter {name!r} in this model (it has {known}); {hint}")
    return held[name]


def virtual_positions(model: nn.Module) -> int:
    """Positions of the model's context that the active adapters' virtual tokens take."""
    held = adapters_of(model)
    return sum(virtual_length(held[name].config) for name in active_adapters(model))


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The live tensors that one adapter trains, sorted, keyed "<module path>.<tensor name>"."""
    return _named(model, name, lambda part: dict(part.named_parameters()))


def exported_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What a saved folder holds of one adapter, keyed like `adapter_tensors`: the same tensors for most methods."""
    return _named(model, name, lambda part: part.exported())


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What a checkpoint holds of one adapter: `adapter_tensors` and what they are counted from (A0 and B0)."""
    return _named(model, name, lambda part: part.state())


def _named(model: nn.Module, name: str, held: Callable[[Part], dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = adapter_of(model, name).parts
    named = {f"{path}.{key}": tensor for path, part in parts.items() for key, tensor in held(part).items()}
    return dict(sorted(named.items()))


def load_adapter_tensors(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Copy values into what one adapter trains, strictly: nothing is copied unless everything fits.

    Raises AdapterFileError naming every missing, extra or mis-shaped tensor.
    """
    _copy(adapter_tensors(model, name), name, tensors)


def load_adapter_state(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """`load_adapter_tensors` for all that `adapter_state` gives."""
    _copy(adapter_state(model, name), name, tensors)


@torch.no_grad()
def _copy(live: dict[str, Tensor], name: str, tensors: dict[str, Tensor]) -> None:
    faults = [f"missing {key}" for key in sorted(live.keys() - tensors.keys())]
    faults += [f"unexpected {key}" for key in sorted(tensors.keys() - live.keys())]
    faults += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(live[key].shape)}"
        for key in sorted(live.keys() & tensors.keys())
        if tensors[key].shape != live[key].shape
    ]
    if faults:
        shown = "; ".join(faults[:5])
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise AdapterFileError(
            f"the tensors do not fit adapter {name!r}: {shown}{more}; was it made for another model?"
        )
    for key, value in tensors.items():
        live[key].copy_(value)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the base alone, under their original names, tied ones once."""
    return dict(own_tensors(model))


def trainable_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) elements; a parameter used twice counts once, a packed one the elements it stands for."""
    packed = packed_elements(model)
    counts = [(p.requires_grad, packed.get(id(p), p.numel())) for p in model.parameters()]
    return sum(n for trains, n in counts if trains), sum(n for _, n in counts)


def packed_elements(model: nn.Module) -> dict[int, int]:
    """id of a parameter that holds codes -> how many elements of a weight they stand for."""
    return {
        id(module.get_parameter(name)): math.prod(shape)
        for module in model.modules()
        for name, shape in getattr(module, "packed_shapes", {}).items()
    }


def trainable_line(model: nn.Module) -> str:
    """The counts as PEFT words them: `trainable params: N || all params: N || trainable%: X`."""
    trainable, total = trainable_counts(model)
    return f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / max(total, 1)}"


def print_trainable_parameters(model: nn.Module) -> None:
    """Print `trainable_line` to standard output."""
    print(trainable_line(model))


def registry_of(model: nn.Module) -> Registry:
    """The model's registry, made on first use."""
    made: Any = model.__dict__.get("lofi_registry")
    if made is None:
        made = Registry()
        model.lofi_registry = made
    return made
