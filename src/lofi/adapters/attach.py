"""Adding an adapter to a model and taking it away again; everything is resolved before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from lofi.adapters.config import ALL_LINEAR, LoraConfig
from lofi.adapters.copies import BiasShift, ModuleCopy, shiftable
from lofi.adapters.embedding import EmbeddingFactors
from lofi.adapters.experts import ExpertFactors
from lofi.adapters.linear import LinearFactors, product_of
from lofi.adapters.registry import Adapter, adapter_of, adapters_of, registry_of, trainable_counts
from lofi.adapters.report import AttachReport, Match
from lofi.adapters.rows import HeadRows, TokenRows
from lofi.adapters.surgery import Part, attach_part, detach_part, named_base_modules, own_tensors
from lofi.adapters.target import (
    by_pattern,
    expert_parameters,
    named_modules_for,
    output_head,
    target_modules,
    target_parameters,
)
from lofi.errors import TargetError

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def add_adapter(model: nn.Module, config: LoraConfig | None = None, name: str = "default") -> AttachReport:
    """Put a new adapter on `model`, in place: the base is frozen, its weights keep their names and bits.

    With B = 0 at the start the model's output does not change. The adapter becomes the active one if none is. The
    report lists what matched and what was left out.
    Dtypes  adapter tensors are float32 whatever the base's dtype
    Raises  TargetError if a pattern matches nothing or the name is taken; the model is then as it was
    """
    config = config or LoraConfig()
    _check(model, name)
    config = replace(config, task_type=config.task_type or infer_task_type(model))
    saved = _saved_modules(model, config)
    parts = dict(_parts(model, config, saved))
    _add_tied_rows(model, parts)
    _freeze(model)
    registry = registry_of(model)
    report = _report(model, config, name, parts)
    for path, part in parts.items():
        attach_part(model.get_submodule(path), name, part, registry.switch)
    registry.adapters[name] = Adapter(name, config, parts, report)
    if not registry.switch.default:
        registry.switch.default = (name,)
    report.trainable = sum(p.numel() for part in parts.values() for p in part.parameters())
    report.total = trainable_counts(model)[1]
    return report


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
    if "_orig_mod" in model._modules:
        raise TargetError("the model is compiled; add the adapter first, then call torch.compile")


def _saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
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


def _parts(model: nn.Module, config: LoraConfig, saved: dict[str, nn.Module]) -> Iterator[tuple[str, Part]]:
    experts = target_parameters(model, config.target_parameters)
    chosen = target_modules(model, config, saved)
    rows = _token_rows(model, config)
    clash = [path for path in chosen if path in rows]
    if clash:
        raise TargetError(f"{clash[0]} is both in target_modules and in trainable_token_indices; choose one of them")
    for path, module in chosen.items():
        yield path, _low_rank_part(path, module, config)
    for path, names in experts.items():
        rank, scale = _rank_and_scale(path, config)
        part = ExpertFactors(model.get_submodule(path), names, rank, scale)
        part.reset(config.init_lora_weights)
        yield path, part
    for path, ids in rows.items():
        yield path, TokenRows(model.get_submodule(path), ids)  # type: ignore[arg-type]
    for path, module in saved.items():
        yield path, ModuleCopy(module)
    if config.bias == "all":
        yield from _bias_parts(model, {*chosen, *saved})


def _low_rank_part(path: str, module: nn.Module, config: LoraConfig) -> Part:
    rank, scale = _rank_and_scale(path, config)
    part: EmbeddingFactors | LinearFactors
    if isinstance(module, nn.Embedding):
        part = EmbeddingFactors(module, rank, scale)
    else:
        part = LinearFactors(module, rank, scale, dropout=config.lora_dropout, bias=config.bias != "none")
    part.reset(config.init_lora_weights)
    return part


def _rank_and_scale(path: str, config: LoraConfig) -> tuple[int, float]:
    rank = by_pattern(path, config.rank_pattern, config.r)
    return rank, config.scale(rank, by_pattern(path, config.alpha_pattern, config.lora_alpha))


def _token_rows(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if not isinstance(wanted, dict):
        getter = getattr(model, "get_input_embeddings", None)
        embedding = getter() if callable(getter) else None
        path = next((p for p, m in named_base_modules(model) if m is embedding), None)
        if path is None:
            raise TargetError("this model does not say which embedding takes token ids; give a dict {embedding: ids}")
        return {path: list(wanted)}
    found: dict[str, list[int]] = {}
    for suffix, ids in wanted.items():
        for path, module in named_modules_for(model, [suffix], "trainable_token_indices").items():
            if not isinstance(module, nn.Embedding):
                raise TargetError(f"trainable_token_indices names {path}, a {type(module).__name__}, not an embedding")
            found[path] = list(ids)
    return found


def _add_tied_rows(model: nn.Module, parts: dict[str, Part]) -> None:
    """The head that shares the embedding's weight must speak the new rows too."""
    head = output_head(model)
    for path, part in list(parts.items()):
        if isinstance(part, TokenRows) and head is not None and model.get_submodule(path).weight is head.weight:
            head_path = next(p for p, m in named_base_modules(model) if m is head)
            if head_path in parts:
                raise TargetError(
                    f"{head_path} shares its weight with {path}, whose token rows train; leave {head_path} out of "
                    "target_modules and modules_to_save"
                )
            parts[head_path] = HeadRows(part)


def _bias_parts(model: nn.Module, taken: set[str]) -> Iterator[tuple[str, Part]]:
    for path, module in named_base_modules(model):
        covered = any(path == t or path.startswith(f"{t}.") for t in taken)
        if path and not covered and shiftable(module):
            yield path, BiasShift(module)


def _freeze(model: nn.Module) -> None:
    registry = registry_of(model)
    for key, tensor in own_tensors(model):
        if isinstance(tensor, nn.Parameter):
            registry.required_grad.setdefault(key, tensor.requires_grad)
            tensor.requires_grad_(False)


def _report(model: nn.Module, config: LoraConfig, name: str, parts: dict[str, Part]) -> AttachReport:
    shapes = {path: _shape(model.get_submodule(path)) for path in parts}
    matched = [Match(path, part.kind, shapes[path], part.rank, part.scale) for path, part in parts.items()]
    return AttachReport(name, matched, list(_left_out(model, config, parts)), list(_notes(model, config, parts)))


def _shape(module: nn.Module) -> tuple[int, ...]:
    product = product_of(module)
    if product is not None:
        return product.shape(module)
    return tuple(getattr(module, "weight", next(module.parameters())).shape)


def _left_out(model: nn.Module, config: LoraConfig, parts: dict[str, Part]) -> Iterator[tuple[str, str]]:
    if config.target_modules != ALL_LINEAR:
        return
    head = output_head(model)
    for path, module in named_base_modules(model):
        if path in parts:
            continue
        if module is head:
            yield path, "the output head, which all-linear does not adapt: name it in target_modules if you want it"
        elif isinstance(module, nn.Linear) and product_of(module) is None:
            yield path, f"{type(module).__name__}, a linear that computes in its own way"
    for path, parameter, _ in expert_parameters(model):
        part = parts.get(path)
        if not (isinstance(part, ExpertFactors) and parameter in part.pairs):
            suffix = f"{path.rsplit('.', 1)[-1]}.{parameter}"
            yield f"{path}.{parameter}", f"{suffix}, fused experts: name it in target_parameters to adapt them"


def _notes(model: nn.Module, config: LoraConfig, parts: dict[str, Part]) -> Iterator[str]:
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
    if config.lora_dropout and any(part.kind == "experts" for part in parts.values()):
        yield "lora_dropout does not reach expert parameters"
