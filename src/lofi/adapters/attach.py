"""Adding an adapter to a model and taking it away again; everything is resolved before anything is touched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lofi.adapters.config import AdapterConfig, LoraConfig
from lofi.adapters.copies import ModuleCopy
from lofi.adapters.linear import product_of
from lofi.adapters.registry import Adapter, adapter_of, adapters_of, registry_of, trainable_counts
from lofi.adapters.report import AttachReport, Match, Resolved
from lofi.adapters.surgery import Part, attach_part, detach_part, named_base_modules, own_tensors
from lofi.adapters.target import named_modules_for
from lofi.errors import TargetError

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def add_adapter(model: nn.Module, config: AdapterConfig | None = None, name: str = "default") -> AttachReport:
    """Put a new adapter on `model`, in place: the base is frozen, its weights keep their names and bits.

    The config's class says the method (LoraConfig, HoulsbyConfig, ...; LoRA where None), and the model starts as its
    base unless the config asks for another start. The adapter becomes the active one if none is. The report
    lists what matched and what was left out.
    Dtypes  adapter tensors are float32 whatever the base's dtype
    Raises  TargetError if a pattern matches nothing or the name is taken; the model is then as it was
    """
    config = config or LoraConfig()
    _check(model, name)
    config = replace(config, task_type=config.task_type or infer_task_type(model))
    saved = _saved_modules(model, config)
    resolved = resolve(model, config, saved)
    parts = resolved.parts
    _add_copies(parts, saved)
    _freeze(model)
    registry = registry_of(model)
    report = _report(model, name, resolved)
    for path, part in parts.items():
        attach_part(model.get_submodule(path), name, part, registry.switch)
    registry.adapters[name] = Adapter(name, config, parts, report)
    if not registry.switch.default:
        registry.switch.default = (name,)
    report.trainable = sum(p.numel() for part in parts.values() for p in part.parameters())
    report.total = trainable_counts(model)[1]
    return report


def resolve(model: nn.Module, config: AdapterConfig, saved: dict[str, nn.Module]) -> Resolved:
    """What a config means in this model, asked of the file that implements its method."""
    return importlib.import_module(config.implementation).resolve(model, config, saved)


def unload(model: nn.Module, name: str = "default") -> None:
    """Take one adapter off; with the last one the base is back bit for bit, as trainable as it was before."""
    adapter = adapter_of(model, name)
    registry = registry_of(model)
    for path in adapter.parts:
        detach_part(model.get_submodule(path), name)
    del registry.adapters[name]
    registry.switch.default = tuple(n for n in registry.switch.default if n != name)
    if not registry.adapters:
        for key, tensor in own_tensors(model):
            if key in registry.required_grad:
                tensor.requires_grad_(registry.required_grad[key])
        del model.lofi_registry


def infer_task_type(model: nn.Module) -> str | None:
    """PEFT's task type by the class's name, which is how transformers says it; None for any other module."""
    name = type(model).__name__
    if "ForSequenceClassification" in name:
        return "SEQ_CLS"
    if "ForTokenClassification" in name:
        return "TOKEN_CLS"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _check(model: nn.Module, name: str) -> None:
    if name in adapters_of(model):
        raise TargetError(f"the model already has an adapter {name!r}; unload it first or choose another name")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise TargetError(f"adapter name {name!r} is not usable; use letters, digits, '_' and '-' (no method's name)")
    if "lofi_bank" in model.__dict__:
        raise TargetError("the model serves adapters from a bank; put this one on its twin (lofi.adapters.twin)")
    if "_orig_mod" in model._modules:
        raise TargetError("the model is compiled; add the adapter first, then call torch.compile")


def _add_copies(parts: dict[str, Part], saved: dict[str, nn.Module]) -> None:
    for path, module in saved.items():
        clash = [other for other in parts if other == path or other.startswith(f"{path}.")]
        if clash:
            raise TargetError(f"{path} trains in full and {clash[0]} is adapted inside it; choose one of them")
        parts[path] = ModuleCopy(module)


def _saved_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """modules_to_save, the task head, and modules that the checkpoint did not hold (so they must train)."""
    saved = named_modules_for(model, config.modules_to_save or (), "modules_to_save")
    heads = _HEADS.get(config.task_type or "", ())
    present = [head for head in heads if isinstance(getattr(model, head, None), nn.Module)]
    if heads and not present:
        raise TargetError(
            f"task_type {config.task_type} needs a head called {' or '.join(heads)}, which this {type(model).__name__} "
            "lacks; name its head in modules_to_save and leave task_type out"
        )
    saved |= named_modules_for(model, present, "task head")
    new = {key.rpartition(".")[0] for key in getattr(model, "lofi_new_tensors", ())}
    for path in sorted(new):
        if path and not any(path == s or path.startswith(f"{s}.") for s in saved):
            saved[path] = model.get_submodule(path)
    return saved


def _freeze(model: nn.Module) -> None:
    registry = registry_of(model)
    for key, tensor in own_tensors(model):
        if isinstance(tensor, nn.Parameter):
            registry.required_grad.setdefault(key, tensor.requires_grad)
            tensor.requires_grad_(False)


def _report(model: nn.Module, name: str, resolved: Resolved) -> AttachReport:
    parts = resolved.parts
    shapes = {path: _shape(model.get_submodule(path)) for path in parts}
    matched = [Match(path, part.kind, shapes[path], part.rank, part.scale) for path, part in parts.items()]
    return AttachReport(name, matched, resolved.left_out, [*_sharing(model, parts), *resolved.notes])


def _shape(module: nn.Module) -> tuple[int, ...]:
    product = product_of(module)
    if product is not None:
        return product.shape(module)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if weight is not None else ()


def _sharing(model: nn.Module, parts: dict[str, Part]) -> Iterator[str]:
    owners: dict[int, list[str]] = {}
    for path, module in named_base_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    for path, part in parts.items():
        sharers = [p for p in owners.get(id(model.get_submodule(path)._parameters.get("weight")), []) if p not in parts]
        if sharers and part.kind in ("linear", "embedding", "copy"):
            yield f"{path} shares its weight with {', '.join(sharers)}, which stays as it is; a merge unties them"
    heads = [path for path, part in parts.items() if part.kind == "copy"]
    if heads:
        yield f"trained in full as copies: {', '.join(heads)}"
