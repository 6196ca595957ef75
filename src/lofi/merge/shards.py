"""Writing a merged model shard by shard: the base's own files, with W0 + s B A where the adapter changed something.

Same files, names, order, dtypes and metadata as the base's; one tensor is in memory at a time. Knows which checkpoint
key is which tensor of the open model where transformers only adds or drops the base prefix ("h.0..." is
"transformer.h.0..."); where it renames, fuses or permutes, `plan_shards` says None and the model is saved whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lofi.adapters.registry import adapter_of
from lofi.adapters.surgery import Part
from lofi.files.fingerprint import sample
from lofi.files.layout import DTYPES, Header, read_entry, read_header, write_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Change:
    """One tensor of the base that a part of the adapter rewrites."""

    name: str
    part: Part
    tensor_name: str


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is loaded from, in the index's order."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [folder / SINGLE]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in dict.fromkeys(names)]


def changes(model: nn.Module, name: str) -> dict[str, Change]:
    """Every base tensor that the adapter rewrites, by its name in the model."""
    found = {}
    for path, part in adapter_of(model, name).parts.items():
        for tensor_name in part.changes():
            found[f"{path}.{tensor_name}"] = Change(f"{path}.{tensor_name}", part, tensor_name)
    return found


def plan_shards(model: nn.Module, name: str, folder: Path) -> dict[str, Change] | None:
    """Checkpoint key -> change, or None if the base's files cannot be rewritten key by key.

    None where a changed tensor is not in the files under its own name, shape and values (fused or permuted by
    transformers, or a head that is new), or is tied to one that does not change alike.
    """
    wanted = changes(model, name)
    if _parts_tied(model, wanted):
        return None
    keys = {key: file for file in weight_files(folder) for key in _keys(file)}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, Change] = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for key, file in keys.items():
        known = next((n for n in _names(key, prefix) if n in own), None)
        if known in wanted:
            if not _is_same(own[known], file, key):
                return None
            found[key] = wanted[known]
    reached = {id(own[change.name]) for change in found.values()}
    return found if all(id(own[n]) in reached for n in wanted) else None


def _keys(file: Path) -> Iterator[str]:
    return (entry.name for entry in read_header(file).entries)


def _names(key: str, prefix: str) -> tuple[str, ...]:
    return (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")) if prefix else (key,)


def _is_same(tensor: Tensor, file: Path, key: str) -> bool:
    with safe_open(file, "pt") as opened:  # mapped, so only the sampled pages are read
        stored = opened.get_tensor(key)
        return stored.shape == tensor.shape and sample(stored.to(tensor.dtype)) == sample(tensor)


def _parts_tied(model: nn.Module, wanted: Mapping[str, Change]) -> bool:
    """Whether the merge would part tensors that are one in the base; token rows change both sides alike."""
    sharers: dict[int, list[str]] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        sharers.setdefault(id(tensor), []).append(key)
    for key in wanted:
        group = sharers[id(model.get_parameter(key))]
        alike = all(other in wanted and wanted[other].part.kind == "rows" for other in group)
        if len(group) > 1 and not alike:
            return True
    return False


def write_shards(plan: Mapping[str, Change], folder: Path, output: Path) -> int:
    """Write every weight file of `folder` into `output` with the planned changes; returns how many tensors changed.

    Dtypes  each tensor keeps its file's dtype; sums are made in float32 and rounded once
    Exact   bytes of every other tensor, the metadata and the order are the base's
    """
    files = weight_files(folder)
    for file in files:
        _write_one(plan, file, output / file.name)
    if (folder / INDEX).is_file() and len(files) > 1:
        (output / INDEX).write_bytes((folder / INDEX).read_bytes())
    return len(plan)


@torch.no_grad()
def _write_one(plan: Mapping[str, Change], source: Path, target: Path) -> None:
    header: Header = read_header(source)
    entries = {entry.name: entry for entry in header.entries}
    with open(source, "rb") as handle:

        def produce(key: str) -> Tensor:
            stored: Any = read_entry(handle, header, entries[key])
            change = plan.get(key)
            return stored if change is None else change.part.merged(change.tensor_name, stored)

        layout = [(entry.name, DTYPES[entry.dtype], entry.shape) for entry in header.entries]
        write_safetensors(target, layout, produce, metadata=header.metadata)
