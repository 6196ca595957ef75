"""LoRA from a config to parts: which module gets which factors, at which rank and scale, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lofi.adapters.config import ALL_LINEAR, LoraConfig
from lofi.adapters.copies import BiasShift, shiftable
from lofi.adapters.embedding import EmbeddingFactors
from lofi.adapters.experts import ExpertFactors
from lofi.adapters.linear import LinearFactors, product_of
from lofi.adapters.report import Resolved
from lofi.adapters.rows import HeadRows, SharedRows, TokenRows
from lofi.adapters.surgery import Part, named_base_modules
from lofi.adapters.target import (
    by_pattern,
    expert_parameters,
    named_modules_for,
    output_head,
    reading_embeddings,
    refuse_unread,
    target_modules,
    target_parameters,
)
from lofi.errors import TargetError


def resolve(model: nn.Module, config: LoraConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The parts of a LoRA adapter: low-rank factors, experts, token rows and biases; `saved` modules are left alone.

    Raises  TargetError if a pattern matches nothing, or matches what LoRA cannot adapt
    """
    parts = dict(_parts(model, config, saved))
    _add_tied_rows(model, parts)
    return Resolved(parts, list(_left_out(model, config, parts, saved)), list(_notes(config, parts)))


def _parts(model: nn.Module, config: LoraConfig, saved: dict[str, nn.Module]) -> Iterator[tuple[str, Part]]:
    experts = target_parameters(model, config.target_parameters)
    chosen = target_modules(model, config, saved)
    rows = _token_rows(model, config)
    clash = [path for path in chosen if path in rows]
    if clash:
        raise TargetError(f"{clash[0]} is both in target_modules and in trainable_token_indices; choose one of them")
    refuse_unread(model, chosen)
    for path, module in chosen.items():
        yield path, _low_rank_part(path, module, config)
    for path, names in experts.items():
        rank, scale = _rank_and_scale(path, config)
        part = ExpertFactors(model.get_submodule(path), names, rank, scale)
        _start(path, part, model.get_submodule(path), config)
        yield path, part
    for path, ids in rows.items():
        yield path, TokenRows(model.get_submodule(path), ids)  # type: ignore[arg-type]
    if config.bias == "all":
        yield from _bias_parts(model, {*chosen, *saved})


def _low_rank_part(path: str, module: nn.Module, config: LoraConfig) -> Part:
    rank, scale = _rank_and_scale(path, config)
    if isinstance(module, nn.Embedding):
        if config.use_dora:
            raise TargetError(f"use_dora does not reach embeddings ({path}); leave it out of target_modules")
        return _start(path, EmbeddingFactors(module, rank, scale), module, config)
    part = LinearFactors(module, rank, scale, dropout=config.lora_dropout, bias=config.bias != "none")
    _start(path, part, module, config)
    if config.use_dora:
        part.add_magnitude(module)
    return part


def _start(path: str, part: EmbeddingFactors | LinearFactors | ExpertFactors, module: Any, config: LoraConfig) -> Part:
    """Give the factors their values at step 0."""
    if not config.shifted:
        part.reset(config.init_lora_weights)
        return part
    try:
        part.reset_from(module, str(config.init_lora_weights), _rank_and_scale(path, config.finished())[1])
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from None
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
    """The head that shares the embedding's weight must speak the new rows too; encoder and decoder must read them."""
    head = output_head(model)
    readers = reading_embeddings(model)
    for path, part in list(parts.items()):
        if isinstance(part, TokenRows) and head is not None and model.get_submodule(path).weight is head.weight:
            head_path = next(p for p, m in named_base_modules(model) if m is head)
            if head_path in parts:
                raise TargetError(
                    f"{head_path} shares its weight with {path}, whose token rows train; leave {head_path} out of "
                    "target_modules and modules_to_save"
                )
            parts[head_path] = HeadRows(part)
        if isinstance(part, TokenRows) and any(model.get_submodule(path) is owner for owner in readers.values()):
            parts |= {reader: SharedRows(part) for reader in readers}


def _bias_parts(model: nn.Module, taken: set[str]) -> Iterator[tuple[str, Part]]:
    for path, module in named_base_modules(model):
        covered = any(path == t or path.startswith(f"{t}.") for t in taken)
        if path and not covered and shiftable(module):
            yield path, BiasShift(module)


def _left_out(
    model: nn.Module, config: LoraConfig, parts: dict[str, Part], saved: dict[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    if config.target_modules != ALL_LINEAR:
        return
    head = output_head(model)
    for path, module in named_base_modules(model):
        if path in parts or path in saved:
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


def _notes(config: LoraConfig, parts: dict[str, Part]) -> Iterator[str]:
    if config.lora_dropout and any(part.kind == "experts" for part in parts.values()):
        yield "lora_dropout does not reach expert parameters"
    if config.shifted:
        rank = max(2 * part.rank for part in parts.values() if part.rank)
        form = "DoRA" if config.use_dora else "plain LoRA"
        served = "" if config.use_dora else f", so vLLM needs a maximum LoRA rank of at least {rank}"
        yield (
            f"init_lora_weights {config.init_lora_weights!r}: the saved folder is {form} of rank {rank}, twice what "
            f"trains{served}"
        )
    if config.use_dora:
        yield "use_dora: PEFT loads the saved folder, vLLM and llama.cpp cannot; merge it into the base for them"
