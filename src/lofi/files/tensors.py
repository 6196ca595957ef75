"""Nested Python state (optimizer, scheduler, random generators) as one safetensors file and one JSON file.

The tensors and arrays go into NAME.safetensors, the structure into NAME.json with references; what JSON cannot say
exactly (tuples, integer keys, bytes, huge integers, NaN) is a one-key object whose key begins with `$`.
Both files carry the same digest, so a pair that does not belong together is refused.
Does not know what the state means. Rejected: pickle (runs code on load) and torch.save (is pickle).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from lofi.errors import AdapterFileError, LofiError
from lofi.files.atomic import write_text
from lofi.files.layout import read_header, read_safetensors, save_safetensors

__all__ = ["load_state", "read_safetensors", "save_safetensors", "save_state"]

_SAFE_INT = 2**63
_TORCH_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def save_state(path: str | Path, value: Any) -> None:
    """Write a nested state as `path`.safetensors and `path`.json (`path` has no suffix of its own).

    Takes   dict (keys: str, int, float, bool, None, tuple of these), list, tuple, tensor, numpy array or scalar, int,
            float, bool, str, bytes, None, torch.dtype, torch.Size
    Raises  LofiError naming the place of a value of any other kind, or when the disk is full
    Exact   floats bit for bit, integers of any size; tensors come back on the CPU
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(value, tensors, "state")
    text = json.dumps(tree, ensure_ascii=True, allow_nan=False)
    digest = _digest(text, tensors)
    metadata = {"format": "pt", "lofi_state": digest}
    save_safetensors(_beside(path, ".safetensors"), tensors, metadata=metadata)
    write_text(_beside(path, ".json"), json.dumps({"lofi_state": digest, "tree": tree}, ensure_ascii=True) + "\n")


def load_state(path: str | Path) -> Any:
    """Read back what save_state wrote at `path`.

    Raises  AdapterFileError when a file is missing, truncated, or the two do not belong together
    Exact   equal to what was saved, in types, bits and key order
    """
    described = _beside(path, ".json")
    if not described.is_file():
        raise AdapterFileError(f"{described} does not exist; the state beside it cannot be read without it")
    try:
        record = json.loads(described.read_text(encoding="utf-8"))
        digest, tree = record["lofi_state"], record["tree"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{described} is broken ({error}); use an older checkpoint") from None
    stored = _beside(path, ".safetensors")
    metadata = read_header(stored).metadata or {}
    tensors = read_safetensors(stored, finite=False)
    if metadata.get("lofi_state") != digest or _digest(json.dumps(tree, ensure_ascii=True), tensors) != digest:
        raise AdapterFileError(f"{stored} and {described} do not belong together; use an older checkpoint")
    return _decode(tree, tensors)


def _beside(path: str | Path, suffix: str) -> Path:
    path = Path(path)
    return path.with_name(path.name + suffix)


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}{flat.dtype}{list(tensors[name].shape)}".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, torch.Tensor):
        return {"$tensor": _keep(value, tensors)}
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return _encode_numpy(value, tensors, where)
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, where)
    for kind, tag in ((torch.Size, "$size"), (tuple, "$tuple"), (list, None)):
        if type(value) is kind:
            items = [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if tag is None else {tag: items}
    return _encode_plain(value, where)


def _encode_plain(value: Any, where: str) -> Any:
    if type(value) is int:
        return value if -_SAFE_INT <= value < _SAFE_INT else {"$int": hex(value)}
    if type(value) is float:
        return value if value - value == 0.0 else {"$float": numpy.float64(value).tobytes().hex()}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value)}
    raise LofiError(
        f"{where} is a {type(value).__module__}.{type(value).__name__}, which cannot be stored without pickle; "
        "use plain numbers, texts, lists, dicts and tensors there"
    )


def _encode_mapping(value: Mapping, tensors: dict[str, torch.Tensor], where: str) -> Any:
    plain = all(type(key) is str for key in value) and not any(key.startswith("$") for key in value)
    if plain:
        return {key: _encode(item, tensors, f"{where}.{key}") for key, item in value.items()}
    pairs = [
        [_encode(key, tensors, f"a key of {where}"), _encode(item, tensors, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]
    return {"$dict": pairs}


def _encode_numpy(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    try:
        tensor = torch.from_numpy(numpy.array(value, order="C"))
    except TypeError:
        raise LofiError(f"{where} is a numpy {value.dtype} array, which safetensors cannot hold; convert it") from None
    return {"$scalar" if isinstance(value, numpy.generic) else "$array": _keep(tensor, tensors)}


def _keep(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    name = f"t{len(tensors):06d}"
    tensors[name] = tensor.detach().cpu()
    return name


def _decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: _decode(item, tensors) for key, item in tree.items()}
    return _DECODERS[tag](tree[tag], tensors)


_DECODERS: dict[str, Any] = {
    "$tensor": lambda x, t: t[x],
    "$array": lambda x, t: t[x].numpy(),
    "$scalar": lambda x, t: t[x].numpy()[()],
    "$tuple": lambda x, t: tuple(_decode(x, t)),
    "$size": lambda x, t: torch.Size(x),
    "$dict": lambda x, t: {_decode(key, t): _decode(item, t) for key, item in x},
    "$int": lambda x, t: int(x, 16),
    "$float": lambda x, t: float(numpy.frombuffer(bytes.fromhex(x), dtype=numpy.float64)[0]),
    "$bytes": lambda x, t: base64.b64decode(x),
    "$dtype": lambda x, t: _TORCH_DTYPES[x],
}
