"""PEFT's adapter folder, in words: adapter_config.json to and from LoraConfig, tensor keys to and from our parts.

Knows PEFT 0.21's keys, their defaults, and which of them change what an adapter computes: one of those that lofi does
not have is refused with the reason, never dropped. Does not read or write files.
Source: the files that PEFT 0.21.2 writes; orientation of every tensor is PEFT's (A is (R, I), B is (O, R)).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.config import ALL_LINEAR, TASK_TYPES, LoraConfig
from lofi.adapters.registry import Adapter
from lofi.errors import AdapterFileError, RecipeError

PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"
"""The release whose keys are written."""

# keys of PEFT's LoraConfig that LoraConfig here does not have, with the value that means "not used"
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# keys that say something about the folder or the machine, not about the adapter
_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
}
# configs of methods that only choose where A starts: the finished adapter is plain LoRA
_START_ONLY = {"eva_config", "megatron_core", "qalora_group_size"}
_STARTS_ON_THE_BASE = {"gaussian": "gaussian", "eva": True, "orthogonal": True}
_REASONS = {
    "lora_bias": "it adds a bias inside B",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it switches itself on at certain tokens",
}


def to_record(adapter: Adapter, *, base_path: str | None = None) -> dict[str, Any]:
    """adapter_config.json for an attached adapter: PEFT 0.21's keys, all-linear expanded to the modules it matched."""
    config: Any = adapter.config.finished()
    record: dict[str, Any] = {**_DEFAULTS, **config.to_dict()}
    record |= {
        "auto_mapping": None,
        "base_model_name_or_path": base_path,
        "fan_in_fan_out": any(getattr(part, "transposed", False) is True for part in _linears(adapter)),
        "inference_mode": True,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "revision": None,
        "lora_alpha": _whole(config.lora_alpha),
        "rank_pattern": _reaching_experts(config.rank_pattern, adapter),
        "alpha_pattern": _reaching_experts(config.alpha_pattern, adapter),
        "modules_to_save": sorted(p for p, part in adapter.parts.items() if part.kind == "copy") or None,
        "target_modules": _targets(adapter),
        "trainable_token_indices": _token_indices(adapter),
    }
    return dict(sorted(record.items()))


def _linears(adapter: Adapter) -> list[Any]:
    return [part for part in adapter.parts.values() if part.kind == "linear"]


def _reaching_experts(patterns: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Keys that mean an experts module, widened to its parameters: PEFT asks for those, we for the module."""
    wide = {}
    experts = {path: list(part.pairs) for path, part in adapter.parts.items() if part.kind == "experts"}  # type: ignore
    for key, value in patterns.items():
        missed = any(
            _means(key, path) and not all(_means(key, f"{path}.{name}") for name in names)
            for path, names in experts.items()
        )
        wide[rf"({key})(\.\w+)?" if missed else key] = value
    return wide


def _means(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _targets(adapter: Adapter) -> list[str] | str | None:
    given = adapter.config.target_modules  # type: ignore[attr-defined]
    if given == ALL_LINEAR:
        return sorted(path for path, part in adapter.parts.items() if part.kind in ("linear", "embedding"))
    return given if given is None or isinstance(given, str) else sorted(given)


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    rows = {path: part for path, part in adapter.parts.items() if part.kind == "rows" and hasattr(part, "index")}
    return {path: part.index.tolist() for path, part in rows.items()} or None  # type: ignore[operator, union-attr]


def from_record(record: Mapping[str, Any], where: str) -> tuple[LoraConfig, list[str]]:
    """LoraConfig of an adapter_config.json, and notes on keys that were left out because they are not in use.

    Raises  AdapterFileError naming every key that lofi does not know or have and that is in use, with the reason
    """
    ours = {f.name for f in fields(LoraConfig)}
    faults, notes = [], []
    for key, value in record.items():
        if key in ours or key in _NEUTRAL or key in _START_ONLY:
            continue
        unused = value == _DEFAULTS[key] if key in _DEFAULTS else value in (None, False, {}, [], "")
        if not unused:
            faults.append(f"{key} is {value!r} ({_REASONS.get(key, 'lofi does not know it')})")
        elif key not in _DEFAULTS:
            notes.append(f"unknown key {key!r} is not in use ({value!r}) and was left out")
    start = record.get("init_lora_weights", True)
    faults += _start_faults(start)
    if faults:
        raise AdapterFileError(f"{where} asks for what lofi cannot do: {'; '.join(faults)}; convert it to plain LoRA")
    values = {key: value for key, value in record.items() if key in ours}
    values["init_lora_weights"] = _STARTS_ON_THE_BASE.get(start, True) if isinstance(start, str) else True
    if values.get("task_type") not in (None, *TASK_TYPES):
        notes.append(f"task_type {values['task_type']!r} is not one of lofi's; the model's class decides")
        values["task_type"] = None
    return _checked(_without_nulls(values), where), notes


def _start_faults(start: Any) -> list[str]:
    if isinstance(start, bool) or start in _STARTS_ON_THE_BASE:
        return []
    return [
        f"init_lora_weights is {start!r} (its training rewrote the base weights, so on the plain base it is wrong: "
        "save it in PEFT with path_initial_model_for_weight_conversion)"
    ]


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    nullable = {f.name for f in fields(LoraConfig) if f.default is None}
    values = {key: value for key, value in values.items() if value is not None or key in nullable}
    if values.get("target_modules") is None:
        values["target_modules"] = []  # PEFT's null means "none"; only target_parameters are adapted
    values.setdefault("r", 8)  # PEFT's own defaults, for the keys that a hand-written file leaves out
    values.setdefault("lora_alpha", 8)
    return values


def _checked(values: dict[str, Any], where: str) -> LoraConfig:
    try:
        return LoraConfig(**values)
    except (RecipeError, TypeError) as error:
        raise AdapterFileError(f"{where} is not a usable LoRA config: {error}") from None


def explicit_copies(config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """The config with modules_to_save as the full paths that the file's keys hold.

    PEFT matches by bare string suffix ("norm" also takes "input_layernorm"), which only the file itself shows; and it
    lists heads ("classifier", "score") that the model may not have.
    """
    if not config.modules_to_save:
        return config
    found = set()
    for key in keys:
        path = key.removeprefix(PREFIX)
        if _is_plain(path):
            pieces = path.split(".")
            heads = [".".join(pieces[:n]) for n in range(1, len(pieces))]
            found |= set([h for h in heads if h.endswith(tuple(config.modules_to_save))][:1])
    return replace(config, modules_to_save=sorted(found) or None)


def _is_plain(path: str) -> bool:
    return not re.search(r"\.(lora_(A|B|embedding_A|embedding_B)|base_layer|token_adapter|original_module)(\.|$)", path)


@dataclass(frozen=True)
class Slot:
    """Where one of our tensors lives in PEFT's file, and how it is laid out there."""

    key: str
    layout: str  # "plain"; experts: "A" (E, R, I) as (E*R, I), "B" (E, O, R) as (O, R*E); "rows"
    order: tuple[int, ...] = ()  # "rows": the file's row for each of ours


# kind of part -> (name of our tensor -> PEFT's suffix)
_SUFFIXES = {
    "linear": {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bias": "base_layer.bias",
               "lora_magnitude_vector": "lora_magnitude_vector"},
    "embedding": {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"},
    "rows": {"rows": "token_adapter.trainable_tokens_delta"},
    "bias": {"bias": "bias"},
}  # fmt: skip


def slots(adapter: Adapter, model: nn.Module) -> dict[str, Slot]:
    """For every tensor of an attached adapter, keyed as `adapter_tensors` keys it, its place in PEFT's file."""
    table: dict[str, Slot] = {}
    for path, part in adapter.parts.items():
        for name in part.exported():
            table[f"{path}.{name}"] = _slot(path, part, name, adapter, model)
    return table


def _slot(path: str, part: Any, name: str, adapter: Adapter, model: nn.Module) -> Slot:
    if part.kind == "copy":
        return Slot(f"{PREFIX}{path}.{name.removeprefix('copy.')}", "plain")
    if part.kind == "experts":
        _, parameter, factor = name.split(".")
        nesting = ".base_layer" * _depth(model.get_submodule(path), parameter, list(part.pairs))
        return Slot(f"{PREFIX}{path}{nesting}.{factor}.weight", factor[-1])
    key = f"{PREFIX}{path}.{_SUFFIXES[part.kind][name]}"
    if part.kind == "rows":
        return Slot(key, "rows", _row_order(path, part, adapter.config))
    return Slot(key, "plain")


def _depth(module: nn.Module, parameter: str, adapted: list[str]) -> int:
    """PEFT wraps the parameters of one module in the order they were registered; the last one is outermost."""
    order = [name for name in module._parameters if name in adapted]
    return len(order) - 1 - order.index(parameter)


def _row_order(path: str, part: Any, config: Any) -> tuple[int, ...]:
    wanted: Any = config.trainable_token_indices
    if isinstance(wanted, dict):
        wanted = next(ids for name, ids in wanted.items() if path == name or path.endswith(f".{name}"))
    wanted = list(dict.fromkeys(wanted))
    return tuple(wanted.index(i) for i in part.index.tolist())


def to_file(slot: Slot, tensor: Tensor) -> Tensor:
    """One of our tensors as PEFT stores it, bit for bit; token rows are written in ascending order of their ids."""
    tensor = tensor.detach().to("cpu")
    if slot.layout == "A":
        return tensor.flatten(0, 1)  # (E, R, I) -> (E*R, I)
    if slot.layout == "B":
        return tensor.permute(1, 2, 0).flatten(1, 2).contiguous()  # (E, O, R) -> (O, R*E)
    return tensor


def file_shape(slot: Slot, live: Tensor) -> tuple[int, ...]:
    """The shape that PEFT's file must have for one of our tensors."""
    if slot.layout == "A":
        return live.shape[0] * live.shape[1], live.shape[2]
    if slot.layout == "B":
        return live.shape[1], live.shape[2] * live.shape[0]
    return tuple(live.shape)


def from_file(slot: Slot, stored: Tensor, live: Tensor) -> Tensor:
    """The inverse of `to_file`, for files of any row order; float32 out of any float dtype."""
    if slot.layout == "rows":
        stored = stored[list(slot.order)]
    elif slot.layout == "A":
        stored = stored.reshape(live.shape)
    elif slot.layout == "B":
        experts, out_features, rank = live.shape
        stored = stored.reshape(out_features, rank, experts).permute(2, 0, 1)
    return stored.to(torch.float32)
