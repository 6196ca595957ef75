"""Merging in memory: W = W0 + s B A, summed in float32 and rounded once, beside a base that stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.attach import unload
from lofi.adapters.registry import adapter_of, adapters_of
from lofi.errors import TargetError


@torch.no_grad()
def merged_weights(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """(base tensor name, new value) for every base tensor that the adapter changes, one at a time.

    W = W0 + (alpha / r) B A   LoRA (arXiv 2106.09685), sec. 4.1
    A quantized weight counts as the dense one that its codes stand for.
    Dtypes  summed in float32 (float64 for a float64 base), rounded once to the base tensor's own dtype
    Raises  TargetError for an adapter that no weight can hold
    """
    refuse_unmergeable(model, name)
    for path, part in adapter_of(model, name).parts.items():
        module = model.get_submodule(path)
        for tensor_name in part.changes():
            yield f"{path}.{tensor_name}", part.merged(tensor_name, dense_tensor(module, tensor_name))


def refuse_unmergeable(model: nn.Module, name: str = "default") -> None:
    """Raise TargetError, with the remedy, if a part of the adapter is nothing that a weight can hold."""
    for path, part in adapter_of(model, name).parts.items():
        if part.unmergeable is not None:
            raise TargetError(unmergeable(f"adapter {name!r}", f"{part.unmergeable} ({path})"))


def unmergeable(what: str, reason: str) -> str:
    """The sentence that refuses a merge."""
    return f"{what} cannot be merged, because {reason}; serve it unmerged: load_adapter, or --adapter beside the base"


def dense_tensor(module: Any, tensor_name: str) -> Tensor:
    """One tensor of a module as numbers: dequantized where the module holds codes."""
    if tensor_name in getattr(module, "packed_shapes", {}):
        return module.dense_weight() if tensor_name == "weight" else module.dense_parameter(tensor_name)
    return module.get_parameter(tensor_name)


def merge_in_memory(model: nn.Module, name: str = "default", *, inplace: bool = False) -> nn.Module:
    """A plain model with the adapter merged in: new tensors where it changed something, the rest shared.

    A quantized linear that the adapter changed becomes a dense one. The given model stays as it was; `inplace=True`
    consumes it instead (its other adapters are unloaded). A weight that was tied to an unchanged one is untied, in the
    config too, so that saving keeps both.
    Raises  TargetError for an adapter that no weight can hold; nothing is then changed
    """
    refuse_unmergeable(model, name)
    values = dict(merged_weights(model, name))
    plain = model if inplace else _shallow_copy(model)
    for other in list(adapters_of(plain)):
        unload(plain, other)
    for key, value in values.items():
        path, _, tensor_name = key.rpartition(".")
        module: Any = plain.get_submodule(path)
        if tensor_name in getattr(module, "packed_shapes", {}):
            module = _unpack(plain, path, module)
        required = module._parameters[tensor_name].requires_grad
        module._parameters[tensor_name] = nn.Parameter(value, requires_grad=required)
    _untie(plain, values)
    return plain


def _unpack(plain: nn.Module, path: str, module: Any) -> Any:
    """Put the dense form of a quantized module in its place."""
    parent, _, child = path.rpartition(".")
    dense = module.to_dense()
    setattr(plain.get_submodule(parent), child, dense)
    return dense


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    required = {id(p): p.requires_grad for p in model.parameters()}
    plain = copy.deepcopy(model, shared)
    registry = plain.__dict__.get("lofi_registry")
    if registry is not None:  # shared parameters must not be thawed by the copy's unload
        registry.required_grad = {}
    assert all(p.requires_grad == required[id(p)] for p in model.parameters())
    return plain


def _untie(plain: Any, values: dict[str, Tensor]) -> None:
    """After a merge, weights that transformers believes tied may differ: then say so in the model and its config."""
    tied: dict[str, str] = getattr(plain, "all_tied_weights_keys", None) or {}
    parted = {
        target: source
        for target, source in tied.items()
        if (target in values or source in values) and not _same(plain, target, source)
    }
    if not parted:
        return
    plain.all_tied_weights_keys = {t: s for t, s in tied.items() if t not in parted}
    config = getattr(plain, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "tie_word_embeddings", None):
            part.tie_word_embeddings = False  # type: ignore[union-attr]
    others = [t for t in plain.all_tied_weights_keys if not _same(plain, t, tied[t])]
    if others:
        raise TargetError(f"merging parted {sorted(parted)} but {others} would be parted by it too")
    for target in plain.all_tied_weights_keys:  # the config ties all or none: what is still the same is written too
        path, _, tensor_name = target.rpartition(".")
        weight = plain.get_parameter(target)
        plain.get_submodule(path)._parameters[tensor_name] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    plain.all_tied_weights_keys = {}


def _same(model: nn.Module, one: str, other: str) -> bool:
    """Whether two tied names still hold one tensor; equal values count, and are shared again."""
    left, right = model.get_parameter(one), model.get_parameter(other)
    if left is not right and torch.equal(left, right):
        path, _, tensor_name = one.rpartition(".")
        model.get_submodule(path)._parameters[tensor_name] = right
        return True
    return left is right
