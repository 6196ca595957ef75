"""bitsandbytes' format on disk: what a folder says of its packed weights, checked before any is loaded, and written.

A weight `w` (4 bits) is `w` uint8, or its bytes under another dtype, with `w.absmax`, `w.quant_map`, under double
quantization `w.nested_absmax` and `w.nested_quant_map`, and `w.quant_state.bitsandbytes__nf4`, the bytes of a JSON
object; int8 is `m.weight` int8 with `m.SCB` and `m.weight_format`. The 3-D parameters of experts, which bitsandbytes
leaves dense in transformers, are written the same way under their own names (int8 with `p_SCB`); a folder with such
does not call itself bitsandbytes' (quantizer.py). Knows files and frozen modules. Does not know transformers' models.
Written from the format as bitsandbytes 0.50 writes it. Beside it lofi keeps samples of the dense weights in the files'
metadata, where other readers do not look.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.errors import ModelError
from lofi.models.folder import Entry, read_header
from lofi.quant.codes import KINDS
from lofi.quant.experts import FrozenExperts
from lofi.quant.linear import FrozenLinear
from lofi.quant.storage import FourBit

STATE = ".quant_state.bitsandbytes__"
ORIGIN = "lofi_dense_origin"
"""Metadata key: JSON, name of a packed weight -> quant.origin.sample of the dense weight it was made from."""
_DTYPES = {"bfloat16", "float16", "float32"}
_STORAGE = {
    "U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F64": torch.float64,
}  # fmt: skip
_NESTED_BLOCK = 256
_COMPANION = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w*)$")


@dataclass(frozen=True)
class PackedWeight:
    """What the files say of one packed weight; `offset` is the mean scale under double quantization, else None.

    `filed` is how its codes stand in the file: 4-bit codes may be filed as floats of the same bytes.
    """

    kind: str
    shape: tuple[int, ...]
    filed: tuple[torch.dtype, tuple[int, ...]]
    dense_dtype: str | None = None
    block: int = 64
    offset: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Every packed weight of a folder by its name in the files, and the samples of their dense origins."""

    kind: str
    weights: dict[str, PackedWeight]
    origins: dict[str, str]


def read_checkpoint(files: Iterable[str | Path], where: str) -> Checkpoint:
    """What the safetensors files of a folder hold in packed form; headers and the small JSON states are read, no codes.

    Raises  ModelError for no packed weight at all, kinds that are mixed, and every weight whose parts are missing or
            of the wrong size (the first five are named)
    """
    entries: dict[str, Entry] = {}
    origins: dict[str, str] = {}
    for file in files:
        header = read_header(Path(file))
        entries |= header.tensors
        origins |= _origins(header.metadata, file)
    weights: dict[str, PackedWeight] = {}
    faults: list[str] = []
    for name in _packed_names(entries):
        try:
            weights[name] = _packed_weight(name, entries)
        except _Fault as fault:
            faults.append(f"{name} {fault}")
    kinds = sorted({weight.kind for weight in weights.values()})
    if len(kinds) > 1:
        faults.append(f"weights of the kinds {' and '.join(kinds)} are mixed")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(f"the packed weights in {where} are damaged: {'; '.join(faults[:5])}{more}; fetch it again")
    if not weights:
        raise ModelError(
            f"config.json in {where} says that its weights are bitsandbytes', but none is packed; "
            "take quantization_config out of config.json"
        )
    return Checkpoint(kinds[0], weights, origins)


class _Fault(Exception):
    """What is wrong with one packed weight."""


def _packed_names(entries: Mapping[str, Entry]) -> list[str]:
    """Names of weights that are packed, or that only a part of a packed weight is there of."""
    four = {_COMPANION.sub("", name) for name in entries if _COMPANION.search(name)}
    eight = {name.removesuffix("SCB") + "weight" for name in entries if name.endswith(".SCB")}
    eight |= {name.removesuffix("_SCB") for name in entries if name.endswith("_SCB")}
    bare = {name for name, e in entries.items() if name.endswith(".weight") and e.dtype in ("U8", "I8")}
    bare |= {name for name, e in entries.items() if len(e.shape) == 3 and e.dtype == "I8"}
    return sorted(four | eight | bare)


def _packed_weight(name: str, entries: Mapping[str, Entry]) -> PackedWeight:
    weight = entries.get(name)
    if weight is None:
        raise _Fault("has scales but no codes")
    if weight.dtype == "I8" and f"{name}.absmax" not in entries:
        return _int8(name, weight, entries)
    return _four_bit(name, weight, entries)


def _int8(name: str, weight: Entry, entries: Mapping[str, Entry]) -> PackedWeight:
    if len(weight.shape) == 3:
        _expect(entries, f"{name}_SCB", "the row scales", weight.shape[:2], ("F32",))
        return PackedWeight("int8", weight.shape, (torch.int8, weight.shape))
    module = name.removesuffix("weight")
    if len(weight.shape) != 2:
        raise _Fault(f"is {weight.shape}, expected rows and columns of int8 codes")
    _expect(entries, module + "SCB", "the row scales", weight.shape[:1], ("F32",))
    layout = entries.get(module + "weight_format")
    if layout is not None and any(layout.read()):
        raise _Fault("is laid out for one GPU's tensor cores, expected rows; save it again with bitsandbytes >= 0.43")
    return PackedWeight("int8", weight.shape, (torch.int8, weight.shape))


def _four_bit(name: str, weight: Entry, entries: Mapping[str, Entry]) -> PackedWeight:
    kind, state = _state(name, entries)
    shape, block = _shape(state), _positive(state, "blocksize")
    codes, blocks = -(-math.prod(shape) // 2), -(-math.prod(shape) // block)
    if weight.size != codes:
        raise _Fault(f"has {weight.size:,} bytes of codes, expected {codes:,} for {' x '.join(map(str, shape))}")
    if weight.dtype not in _STORAGE:
        raise _Fault(f"is filed as {weight.dtype}, expected U8 or a float")
    filed = _STORAGE[weight.dtype], weight.shape
    nested = "nested_offset" in state
    _expect(entries, f"{name}.absmax", "the block scales", (blocks,), ("U8",) if nested else ("F32",))
    _expect(entries, f"{name}.quant_map", "the code book", (16,), ("F32",))
    dtype = str(state.get("dtype"))
    if dtype not in _DTYPES:
        raise _Fault(f"was {dtype} before, expected one of {', '.join(sorted(_DTYPES))}")
    if not nested:
        return PackedWeight(kind, shape, filed, dtype, block)
    if _positive(state, "nested_blocksize") != _NESTED_BLOCK:
        raise _Fault(f"has {state['nested_blocksize']} scales to a block, expected {_NESTED_BLOCK}")
    _expect(entries, f"{name}.nested_absmax", "the scales' scales", (-(-blocks // _NESTED_BLOCK),), ("F32",))
    _expect(entries, f"{name}.nested_quant_map", "the scales' code book", (256,), ("F32",))
    offset = state["nested_offset"]
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise _Fault(f"has the offset {offset}, expected a number")
    return PackedWeight(kind, shape, filed, dtype, block, float(offset))


def _state(name: str, entries: Mapping[str, Entry]) -> tuple[str, dict[str, Any]]:
    """The kind of a 4-bit weight and its JSON state."""
    found = [f"{name}{STATE}{kind}" for kind in KINDS if f"{name}{STATE}{kind}" in entries]
    if not found:  # of another type, or missing
        found = [key for key in entries if key.startswith(name + STATE)]
    if len(found) != 1:
        raise _Fault(f"has {len(found)} quantization states, expected one")
    kind = found[0].removeprefix(name + STATE)
    if kind not in KINDS:
        raise _Fault(f"has codes of the type '{kind}', expected {' or '.join(KINDS)}")
    try:
        state = json.loads(entries[found[0]].read())
    except ValueError:
        raise _Fault("has a quantization state that is no JSON") from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise _Fault(f"has a quantization state that is not of the type '{kind}'")
    return kind, state


def _shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise _Fault(f"says that its shape is {shape}, expected rows and columns")
    return tuple(shape)


def _positive(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or value < 1:
        raise _Fault(f"has the {key} {value}, expected a number of weights")
    return value


def _expect(
    entries: Mapping[str, Entry], name: str, what: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    entry = entries.get(name)
    if entry is None:
        raise _Fault(f"lacks {name.rpartition('.')[2]}, {what}")
    if entry.shape != shape or entry.dtype not in dtypes:
        raise _Fault(f"has {what} as {entry.dtype} {entry.shape}, expected {dtypes[0]} {shape}")


def _origins(metadata: Mapping[str, str], file: str | Path) -> dict[str, str]:
    try:
        held = json.loads(metadata.get(ORIGIN, "{}"))
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise ModelError(f"{file} has metadata {ORIGIN} that is no JSON object; fetch it again")
    return held


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that hold codes, linears and experts, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, FrozenLinear | FrozenExperts)}


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with every packed weight under bitsandbytes' names; codes and scales are not copied."""
    packed = packed_modules(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        path, _, name = key.rpartition(".")
        module = packed.get(path)
        if module is None or not (name in module._buffers or name in module.packed_shapes):
            state[key] = tensor
        elif name in module.packed_shapes:
            state |= {f"{path}.{rest}": part for rest, part in _written(module, name).items()}
    return state


def _written(module: Any, name: str) -> dict[str, Tensor]:
    """One packed parameter as it stands in the file, its scales beside it."""
    codes = module.get_parameter(name).detach()
    stored = module.stored(name) if isinstance(module, FrozenExperts) else module.stored
    if isinstance(stored, FourBit):
        return _written_4bit(name, codes, stored, module)
    if isinstance(module, FrozenExperts):
        return {name: codes, f"{name}_SCB": module.get_buffer(f"{name}_SCB")}
    return {"weight": codes, "SCB": stored.scale, "weight_format": torch.zeros((), dtype=torch.uint8)}


def _written_4bit(name: str, codes: Tensor, stored: FourBit, module: Any) -> dict[str, Tensor]:
    told: dict[str, Any] = {
        "quant_type": module.quant_type,
        "blocksize": stored.block,
        "dtype": str(module.dense_dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    # constant maps are cloned: safetensors refuses tensors that share memory
    written = {name: codes.view(-1, 1), f"{name}.absmax": stored.absmax, f"{name}.quant_map": stored.quant_map.clone()}
    if stored.nested is not None:
        nested = stored.nested
        told |= {"nested_blocksize": nested.block, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
        written[f"{name}.nested_absmax"] = nested.absmax
        written[f"{name}.nested_quant_map"] = nested.quant_map.clone()
    written[f"{name}{STATE}{module.quant_type}"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return written


def origin_metadata(model: nn.Module) -> dict[str, str]:
    """Metadata for the files: the samples of the dense weights that the model's packed weights were made from."""
    samples: dict[str, str] = {}
    for path, module in packed_modules(model).items():
        own = module.dense_samples if isinstance(module, FrozenExperts) else {"weight": module.dense_sample}
        samples |= {f"{path}.{name}": told for name, told in own.items() if told}
    return {ORIGIN: json.dumps(samples)} if samples else {}
