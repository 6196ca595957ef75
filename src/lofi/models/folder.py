"""A model folder on disk, looked at before transformers opens it, so that every fault gets its own sentence.

Knows file names and safetensors headers. Reads no tensor and opens no pickle. Rejected: letting from_pretrained find
out; its messages speak of hub ids and CDN errors when a folder's name is misspelt.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lofi.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def local_folder(path: str | Path) -> Path | None:
    """The folder that `path` names, or None if it can only be a hub id; ModelError for a folder that is not there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{folder} is a file, but a model is a folder with config.json and weights; give its folder")
    near = _near(folder)
    under_a_folder = len(folder.parts) > 1 and folder.parent.is_dir()
    if isinstance(path, str) and _HUB_ID.fullmatch(path) and not under_a_folder and near is None:
        return None
    hint = f"did you mean {near}?" if near else "give the folder that holds config.json, or a hub id such as org/name."
    raise ModelError(f"there is no model folder {folder}; {hint}")


def _near(folder: Path) -> Path | None:
    if not folder.parent.is_dir():
        return None
    siblings = [entry.name for entry in folder.parent.iterdir() if (entry / "config.json").is_file()]
    found = get_close_matches(folder.name, siblings, n=1)
    return folder.parent / found[0] if found else None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; ModelError if it is an adapter's folder, or the file is missing or broken."""
    if (folder / "adapter_config.json").is_file():
        base = _base_of(folder)
        raise ModelError(
            f"{folder} is an adapter, not a model; give its base as the model{base} and this folder with --adapter"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json, which every model folder has; {_contents(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}); fetch the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, but a JSON object was expected; fetch the model again")
    return config


def check_weights(folder: Path) -> None:
    """ModelError unless every safetensors file of the model is there, whole and well formed (no tensor is read)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return check_safetensors(single)
    if not index.is_file():
        raise ModelError(_no_weights(folder))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index} cannot be read as a shard index; fetch the model again") from None
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:3])
        raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} shards ({some}); fetch them")
    for name in shards:
        check_safetensors(folder / name)
    return None


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype as the format writes it ("F32", "U8"), shape, place in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    def read(self) -> bytes:
        """The tensor's bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: its tensors by name and its metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


def check_safetensors(file: Path) -> None:
    """ModelError if the file is shorter or longer than its own header says, or has no readable header."""
    read_header(file)


def read_header(file: Path) -> Header:
    """The header of a whole safetensors file; ModelError if the file is cut, has too much, or is of another kind."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise ModelError(f"{file} is a git-lfs pointer, not the weights; run git lfs pull in its folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(length) if 0 < length <= min(size, 100_000_000) else b""
    if len(start) < 8 or length + 8 > size:
        raise ModelError(f"{file} is cut short inside its header ({size:,} bytes); fetch it again")
    try:
        read = json.loads(header)
        metadata = read.pop("__metadata__", {})
        tensors = {key: _entry(file, value, 8 + length) for key, value in read.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{file} is not a safetensors file (unreadable header); fetch it again") from None
    expected = max((entry.end for entry in tensors.values()), default=8 + length)
    if size < expected:
        raise ModelError(f"{file} is cut short: {size:,} of {expected:,} bytes; fetch it again")
    if size > expected:
        raise ModelError(f"{file} has {size - expected:,} bytes more than its header lists; fetch it again")
    return Header(tensors, metadata)


def _entry(file: Path, value: dict[str, Any], data: int) -> Entry:
    first, last = value["data_offsets"]
    return Entry(file, value["dtype"], tuple(value["shape"]), data + first, data + last)


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when opened; lofi reads safetensors, "
            "so convert them once where you trust them with AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder} has no model.safetensors and no model.safetensors.index.json; {_contents(folder)}"


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    inner = [entry.name for entry in folder.iterdir() if (entry / "config.json").is_file()]
    if inner:
        return f"did you mean {folder / sorted(inner)[0]}?"
    return f"it holds {', '.join(names[:5]) or 'nothing'}; give the folder that save_pretrained wrote"


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({base})" if base else ""
