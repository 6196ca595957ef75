"""The layout of safetensors files: written one tensor at a time, read with faults named.

Knows the safetensors layout (8 bytes header length, JSON header, data), so that a truncated file is described by its
own numbers and a large file is written with one tensor in memory. Does not know what the tensors are for.
Rejected: pickle (runs code), and safetensors' own writer (needs all tensors at once and drops their order).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lofi.errors import AdapterFileError
from lofi.files.atomic import disk_errors

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # safetensors' own bound on the header's bytes


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are (relative to the data section) and what they mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A safetensors file without its data: entries in the order of their bytes, and the metadata (None where none)."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str] | None
    data_start: int


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises  AdapterFileError when the file is missing, empty, truncated or not safetensors (the file's sizes are named)
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist; give a folder that holds it")
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8:
            raise AdapterFileError(f"{path} is truncated: {size} bytes, not even a header; copy or save it again")
        first = handle.read(1)
        if first != b"{" or length > _HEADER_LIMIT:
            raise AdapterFileError(f"{path} is not a safetensors file (its header is not JSON); save it as safetensors")
        if 8 + length > size:
            raise AdapterFileError(f"{path} is truncated: {size} of at least {8 + length} bytes; copy or save it again")
        text = first + handle.read(length - 1)
    header = _parse(path, text, 8 + length)
    wanted = header.data_start + max((e.end for e in header.entries), default=0)
    if size < wanted:
        raise AdapterFileError(f"{path} is truncated: {size} of {wanted} bytes; copy or save it again")
    return header


def _parse(path: Path, text: bytes, data_start: int) -> Header:
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__", None)
        entries = [
            Entry(name, e["dtype"], tuple(e["shape"]), *map(int, e["data_offsets"])) for name, e in table.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"{path} is not a safetensors file (its header cannot be read: {error}); save it again"
        ) from None
    unknown = sorted({e.dtype for e in entries} - set(DTYPES))
    if unknown:
        raise AdapterFileError(f"{path} holds tensors of dtype {', '.join(unknown)}, known are {', '.join(DTYPES)}")
    return Header(tuple(sorted(entries, key=lambda e: (e.begin, e.end))), metadata, data_start)


def read_safetensors(path: str | Path, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file into memory of its own, in its own dtype.

    Raises  AdapterFileError when the file is missing, truncated or not safetensors, or (`finite`) holds NaN or infinity
    Exact   bit for bit
    """
    header = read_header(path)
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb") as handle:
        for entry in header.entries:
            tensors[entry.name] = read_entry(handle, header, entry)
    if finite:
        refuse_non_finite(tensors, str(path))
    return tensors


def read_entry(handle, header: Header, entry: Entry) -> torch.Tensor:
    """Read one tensor through an open binary file of that header, as `entry.dtype` and `entry.shape`."""
    handle.seek(header.data_start + entry.begin)
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    read = handle.readinto(raw.numpy()) if raw.numel() else 0
    dtype = DTYPES[entry.dtype]
    numel = 1
    for size in entry.shape:
        numel *= size
    if read != raw.numel() or numel * dtype.itemsize != raw.numel():
        raise AdapterFileError(
            f"{handle.name}: tensor {entry.name} has {raw.numel()} bytes, its shape {list(entry.shape)} in "
            f"{entry.dtype} needs {numel * dtype.itemsize}; copy or save the file again"
        )
    return raw.view(dtype).reshape(entry.shape) if raw.numel() else torch.empty(entry.shape, dtype=dtype)


def refuse_non_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise AdapterFileError naming the floating tensors that hold NaN or infinity (three named, the rest counted)."""
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise AdapterFileError(
            f"{where}: NaN or infinity in {', '.join(bad[:3])}{more}; an adapter must be finite, train or save it again"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite (always true for integers)."""
    if not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype.itemsize == 1:  # the 8-bit floats have no isfinite of their own
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


Plan = tuple[str, torch.dtype, tuple[int, ...]]


def write_safetensors(
    path: str | Path,
    plan: Iterable[Plan],
    produce: Callable[[str], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in the order of `plan`, asking `produce(name)` for one tensor at a time.

    Shapes  each produced tensor must have the shape and dtype that the plan gave for its name
    Raises  LofiError when the disk is full
    Exact   bit for bit; nothing is cast
    """
    plan = list(plan)
    with disk_errors(path), open(path, "wb") as handle:
        handle.write(_header_bytes(plan, metadata))
        for name, dtype, shape in plan:
            tensor = produce(name).detach()
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), (name, tensor.dtype, tensor.shape)
            if tensor.numel():
                flat = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8)
                handle.write(flat.numpy().data)
        handle.flush()
        os.fsync(handle.fileno())


def save_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors sorted by name; the metadata is {"format": "pt"} unless given. See write_safetensors."""
    # wide dtypes first, as safetensors itself lays files out: every tensor then starts on its own alignment
    names = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    plan = [(n, tensors[n].dtype, tuple(tensors[n].shape)) for n in names]
    write_safetensors(path, plan, lambda n: tensors[n], metadata={"format": "pt"} if metadata is None else metadata)


def _header_bytes(plan: list[Plan], metadata: Mapping[str, str] | None) -> bytes:
    table: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in plan:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data section starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text
