"""GGUF files written one tensor at a time and put into place whole, and read back.

Knows the tensor types that lofi writes (F32, F16, BF16, Q8_0) and how a torch tensor becomes the bytes of one; the
`gguf` package lays out header and metadata. Does not know what the tensors mean.
Rejected: the package's own add_tensor, which holds every tensor until the end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lofi.errors import ModelError, RequestError
from lofi.files.atomic import disk_errors

BLOCK = 32
"""Elements of a row that share one scale in Q8_0."""
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""general.file_type, by the dtype that most tensors have."""
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / BLOCK}


def package() -> Any:
    """The gguf package.

    Raises  RequestError where it is not installed
    """
    try:
        import gguf
    except ImportError:
        raise RequestError('writing GGUF needs the gguf package; pip install "lofi[export]"') from None
    return gguf


def check_dtype(dtype: str, known: Sequence[str]) -> None:
    """Raise RequestError unless `dtype` is one of `known`."""
    if dtype not in known:
        raise RequestError(f"dtype is {dtype!r}, a GGUF file is written as {', '.join(known)}; choose one of them")


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be: GGUF's name, shape as torch has it, and dtype (a key of FILE_TYPES)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(torch.Size(self.shape).numel() * _BYTES[self.dtype])


def encoded(tensor: Tensor, dtype: str, name: str) -> np.ndarray:
    """The bytes of a tensor in one of the dtypes, rounded once; (..., bytes of a row) uint8.

    q8_0    blocks of 32 along a row: float16 scale d = max|x| / 127 and round(x / d) as int8
    Raises  ModelError where a finite value becomes infinite
    """
    if dtype == "q8_0":
        values = tensor.to(torch.float32).contiguous().numpy()
        return package().quantize(values, package().GGMLQuantizationType.Q8_0)
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cast = tensor.to(kind).contiguous()
    if not bool(torch.isfinite(cast).all()):
        largest = float(tensor.float().abs().max())
        raise ModelError(f"{name} does not fit into {dtype} (its largest value is {largest:g}); choose bf16 or f32")
    return cast.reshape(*cast.shape).view(torch.uint8).numpy()


def decoded(raw: np.ndarray, dtype: str, shape: Sequence[int]) -> Tensor:
    """What the bytes of a tensor mean, in float32: written from the format, not from `encoded`."""
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    if dtype == "q8_0":
        blocks = flat.reshape(-1, 2 + BLOCK)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)  # (blocks, 1)
        values = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    elif dtype == "bf16":
        values = (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = flat.view(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
    return torch.from_numpy(values.reshape(tuple(shape)))


def write(
    path: Path, architecture: str, values: Mapping[str, Any], plan: Sequence[Planned], produce: Callable[[str], Tensor]
) -> None:
    """Write a GGUF file at `path`, asking `produce(name)` for one tensor at a time in the plan's order.

    Values  str, bool, int (uint32), float (float32), lists of str, int (int32) or float (float32)
    Raises  ModelError for a value that does not fit its dtype, LofiError when the disk is full
    """
    gguf = package()
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in values.items():
        _add(writer, gguf, key, value)
    for one in plan:
        width = int(one.shape[-1] * _BYTES[one.dtype])
        shape = (*one.shape[:-1], width)
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), one.nbytes, getattr(types, one.dtype.upper()))
    with disk_errors(path), contextlib.closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in plan:
            writer.write_tensor_data(encoded(produce(one.name), one.dtype, one.name))
        handle = writer.fout[0]
        handle.flush()
        os.fsync(handle.fileno())


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    if key == "general.architecture":  # the writer itself states it
        return
    kinds = gguf.GGUFValueType
    simple = {str: kinds.STRING, bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32}
    if isinstance(value, list):
        inner = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=inner)
    else:
        writer.add_key_value(key, value, simple[type(value)])


@contextlib.contextmanager
def into_place(output: str | Path) -> Iterator[Path]:
    """Give a path beside `output` to write to, which takes its place when the block ends without an exception.

    Raises  RequestError where `output` is a folder; LofiError when the disk refuses; what was there is then unchanged
    """
    target = Path(os.path.abspath(output))
    if target.is_dir():
        raise RequestError(f"{output} is a folder, a GGUF export is one file; give a path such as {output}/model.gguf")
    aside = target.with_name(f".{target.name}.lofi-new-{secrets.token_hex(4)}")
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with disk_errors(target):
            os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class Read:
    """A GGUF file as the gguf package reads it: metadata and mapped tensors."""

    values: dict[str, Any]
    tensors: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32, shaped as torch has it; only its pages are read."""
        held = self.tensors[name]
        shape = [int(n) for n in reversed(held.shape)]
        return decoded(np.asarray(held.data), held.tensor_type.name.lower(), shape)


def read(path: str | Path) -> Read:
    """Open a GGUF file; the architecture is under general.architecture."""
    reader = package().GGUFReader(path, "r")
    values = {key: item.contents() for key, item in reader.fields.items() if not key.startswith("GGUF.")}
    return Read(values, {tensor.name: tensor for tensor in reader.tensors})
