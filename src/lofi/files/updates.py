"""The low-rank updates that an adapter folder holds: which tensors are the factors of what, read and written.

Knows PEFT's keys and layouts for linears, embeddings and fused experts (many pairs in one tensor). A folder of several
methods (LOFI_MIXED) is read for its LoRA part. Knows not  models: what a module's name means is the base's affair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.algebra import Pair
from lofi.adapters.config import AdapterConfig, LoraConfig
from lofi.adapters.methods import MixedConfig
from lofi.adapters.target import by_pattern
from lofi.errors import AdapterFileError
from lofi.files.adapter_folder import AdapterFolder
from lofi.files.peft_format import PREFIX

_FACTOR = re.compile(r"(?P<path>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?A(\.weight)?")
MAGNITUDE = "lora_magnitude_vector"
"""In the key of what DoRA trains beside the factors."""


@dataclass(frozen=True)
class LowRank:
    """The update scale * B A of one tensor; one pair (A (R, I), B (O, R)), or one for each of E experts."""

    path: str
    """The module that holds the tensor, as the model names it."""
    kind: str
    """linear, embedding (the weight's update is then (B A)^T) or experts."""
    scale: float
    pairs: tuple[Pair, ...]
    key_a: str
    key_b: str
    depth: int = 0
    """Experts: how many other adapted tensors of the same module PEFT wrapped around this one."""

    @property
    def rank(self) -> int:
        """R."""
        return int(self.pairs[0][0].shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of B A."""
        a, b = self.pairs[0]
        return int(b.shape[0]), int(a.shape[1])

    @property
    def name(self) -> str:
        """The path; of experts with the depth, which tells the tensors of one module apart."""
        return f"{self.path}{'.base_layer' * self.depth}"

    def stored(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Other pairs (of any rank) under this update's keys, as the file lays them out, in float32."""
        if self.kind != "experts":
            ((a, b),) = pairs
            return {self.key_a: a.float().contiguous(), self.key_b: b.float().contiguous()}
        a, b = (torch.stack([pair[place] for pair in pairs]).float() for place in (0, 1))
        return {self.key_a: a.flatten(0, 1), self.key_b: b.permute(1, 2, 0).flatten(1, 2).contiguous()}


def lora_of(config: AdapterConfig) -> LoraConfig | None:
    """The LoRA config of a folder: its own, or that of the LoRA part of several methods; None where there is none."""
    several = config.configs if isinstance(config, MixedConfig) else (config,)
    return next((one for one in several if isinstance(one, LoraConfig)), None)


def low_rank_updates(folder: AdapterFolder) -> list[LowRank]:
    """Every update of a folder, layer 2 before layer 10; [] for a method without factors.

    The scale is what lofi.json states, else what the config's alpha, rank and patterns give.
    Raises  AdapterFileError where a factor lacks its partner or the two do not fit
    """
    config = lora_of(folder.config)
    found = []
    for key, a in folder.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or config is None:
            continue
        key_b = _partner(key)
        b = folder.tensors.get(key_b)
        if b is None or b.shape[-1] != a.shape[-2]:
            shape = "missing" if b is None else f"{tuple(b.shape)} beside {tuple(a.shape)}"
            raise AdapterFileError(f"{folder.path}: {key_b} is {shape}; use the folder as it was saved")
        path = match["path"].removeprefix(PREFIX)
        if a.ndim == 3:  # a folder of several methods keeps the experts' pairs stacked, under the parameter's name
            module = path.partition(".pairs.")[0]
            pairs = tuple(zip(a, b, strict=True))
            found.append(LowRank(path, "experts", _scale(folder.record, config, module, a.shape[1]), pairs, key, key_b))
            continue
        kind = "embedding" if match["embedding"] else "experts" if _fused(config, path) else "linear"
        rank = by_pattern(path, config.rank_pattern, config.r) if kind == "experts" else a.shape[0]
        pairs = _expert_pairs(a, b, rank, key) if kind == "experts" else ((a, b),)
        scale = _scale(folder.record, config, path, rank)
        found.append(LowRank(path, kind, scale, pairs, key, key_b, match["inner"].count(".")))
    return sorted(found, key=lambda update: natural(update.name))


def _partner(key: str) -> str:
    head, _, tail = key.rpartition("_A")
    return f"{head}_B{tail}"


def _expert_pairs(a: Tensor, b: Tensor, rank: int, key: str) -> tuple[Pair, ...]:
    """(E*R, I) and (O, R*E) taken apart."""
    experts, rest = divmod(a.shape[0], rank)
    if rest or not experts:
        raise AdapterFileError(f"{key} has {a.shape[0]} rows, which rank {rank} does not divide; save it again")
    each_a = a.reshape(experts, rank, -1)
    each_b = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    return tuple(zip(each_a, each_b, strict=True))


def _fused(config: LoraConfig, path: str) -> bool:
    """Whether the path is a module whose parameters target_parameters names."""
    owners = [name.rpartition(".")[0] for name in config.target_parameters or ()]
    return any(path == owner or path.endswith(f".{owner}") for owner in owners)


def _scale(record: Mapping[str, Any], config: LoraConfig, path: str, rank: int) -> float:
    stated = record.get("scale", {}).get(path)
    return float(stated or config.scale(rank, by_pattern(path, config.alpha_pattern, config.lora_alpha)))


def natural(path: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]
