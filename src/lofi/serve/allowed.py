"""Which folder a load request may name: inside the allowed one after every link is followed, and of bounded size.

Nothing is opened before it passed: paths are resolved by name, sizes come from the directory, the number of tensors
from the safetensors header alone. Knows files, no model (what the adapter is worth is admission.py's affair). Whoever
can write into the allowed folder is trusted with what it holds: a file may change between this look and the reading,
which then fails its own checks.
"""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path

from lofi.errors import AdapterFileError
from lofi.serve.faults import Refused
from lofi.serve.limits import Settings

_HEADER_BYTES = 16 << 20  # of a safetensors file: some 100,000 tensors
_JSON_BYTES = 4 << 20
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def checked_name(name: str, taken: frozenset[str]) -> str:
    """A name that does not mean the base; what it is made of is the store's to judge.

    Raises  Refused 409
    """
    if name in taken:
        raise Refused(409, f"{name!r} is the base model's name: choose another name", param="lora_name")
    return name


def allowed_folder(path: str, settings: Settings) -> Path:
    """The adapter folder that `path` names: relative to the allowed folder, or absolute inside it.

    A run folder stands for the adapter in it.
    Raises  Refused 403 outside (nothing is said of what is there), 404 missing, 413 too large, 400 not an adapter
    """
    if settings.adapter_folder is None:
        raise Refused(403, "no folder is open for loading: start lofi serve with --adapter-folder", code="no_folder")
    root = settings.adapter_folder.resolve()
    try:
        folder = (root / path).resolve()
        found = folder == root or root in folder.parents
        exists = found and folder.is_dir()
    except (OSError, ValueError, RuntimeError):
        raise Refused(400, "lora_path is no path: give one in the adapter folder", param="lora_path") from None
    if not found:
        raise Refused(403, "lora_path is not inside the adapter folder: give a path in it", param="lora_path")
    inside = folder / "adapter"
    if exists and inside.is_dir() and not inside.is_symlink() and not (folder / _CONFIG).exists():
        folder = inside
    if not exists or not (folder / _CONFIG).exists():
        what = f"holds no {_CONFIG}" if exists else "does not exist in the adapter folder"
        raise Refused(404, f"{path[:200]!r} {what}: give an adapter's folder", param="lora_path")
    _look(folder, settings)
    return folder


def _look(folder: Path, settings: Settings) -> None:
    """Refuse links, devices, and more than the limits, before anything is read."""
    whole = 0
    for place, entry in enumerate(folder.iterdir()):
        if place >= settings.adapter_files:
            raise _too(f"more than {settings.adapter_files} files")
        found = entry.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise Refused(403, f"{entry.name[:80]!r} in it is a link: copy the file itself", param="lora_path")
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise Refused(400, f"{entry.name[:80]!r} in it is no regular file", param="lora_path")
        if entry.suffix == ".json" and found.st_size > _JSON_BYTES:
            raise _too(f"a JSON file of {found.st_size} bytes")
        whole += found.st_size
    if whole > settings.adapter_bytes:
        raise _too(f"{whole} bytes, more than {settings.adapter_bytes}")
    if (count := tensor_count(folder / _TENSORS)) > settings.adapter_tensors:
        raise _too(f"{count} tensors, more than {settings.adapter_tensors}")


def _too(what: str) -> Refused:
    return Refused(413, f"the adapter's folder has {what}: it is not loaded", code="adapter_too_large")


def tensor_count(path: Path) -> int:
    """How many tensors a safetensors file says it has.

    Raises  AdapterFileError for a missing file or a header that is none; Refused 413 for an endless one
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _HEADER_BYTES:
                raise _too(f"a header of {size} bytes")
            return len(json.loads(file.read(size)))
    except (OSError, struct.error, ValueError, RecursionError, TypeError):
        raise AdapterFileError(f"{path.name} is missing or damaged: save the adapter again") from None
