"""Adapter folders: PEFT's files with lofi.json beside them, saved with proof and loaded strictly.

    adapter_config.json         PEFT's keys (peft_format.py), or a type that PEFT does not have (own_format.py)
    adapter_model.safetensors   PEFT's tensors, float32 bits as trained
    lofi.json                   what the adapter belongs to and comes from: base fingerprint, scales, hashes, goldens
    README.md                   a model card

Saving re-reads what it wrote and compares before the folder takes its place. Loading leaves the model as it was when
anything is missing, extra, mis-shaped, not finite, or made for another base. Does not train, merge or judge.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.attach import add_adapter, unload
from lofi.adapters.config import AdapterConfig, LoraConfig
from lofi.adapters.registry import Adapter, adapter_of, adapter_tensors, exported_tensors, load_adapter_tensors
from lofi.adapters.surgery import Part
from lofi.errors import AdapterFileError, LofiWarning, ProofError
from lofi.files import fingerprint, peft_format
from lofi.files.atomic import atomic_folder, readable, refuse_foreign, write_json, write_text
from lofi.files.card import card_text
from lofi.files.formats import format_of, stated_format
from lofi.files.layout import read_safetensors, refuse_non_finite, save_safetensors
from lofi.files.provenance import hash_code, versions
from lofi.files.quantized import in_words, quantization_of

CONFIG, TENSORS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lofi.json"
FORMAT = 1
_OURS = (CONFIG, TENSORS, RECORD, "README.md")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as its folder holds it: the config, the tensors under PEFT's keys, lofi.json ({} where none)."""

    path: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    peft: dict[str, Any]
    """adapter_config.json as it stands."""
    notes: tuple[str, ...] = ()


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, record: Mapping[str, Any] | None = None
) -> Path:
    """Write one adapter as a PEFT folder with lofi.json, atomically, and prove that it reads back bit for bit.

    `record` adds keys to lofi.json (tokenizer, text_format, data, labels, golden, figures).
    Raises  ProofError for an adapter without tensors or one that changes nothing; AdapterFileError for NaN, naming
            the tensors; LofiError when the disk refuses. Whatever was in `folder` is then unchanged
    Warns   LofiWarning naming parts that change nothing, if others do
    Exact   tensors bit for bit, in their own dtype
    """
    adapter = adapter_of(model, name)
    live = exported_tensors(model, name)
    if not live:
        raise ProofError(f"adapter {name!r} has no tensors, so there is nothing to save; check what it matched")
    refuse_non_finite(live, f"adapter {name!r}")
    _warn(_dead_notes(adapter, f"adapter {name!r}"))
    form = format_of(adapter.config.peft_type)
    table = form.slots(adapter, model)
    stored = {slot.key: peft_format.to_file(slot, live[key]) for key, slot in table.items()}
    refuse_foreign(folder, _OURS, "an adapter folder")
    with atomic_folder(folder) as aside:
        peft = form.to_record(adapter, base_path=_base_path(model))
        save_safetensors(aside / TENSORS, stored)
        # not write_json, which sorts: the first matching key of rank_pattern wins, so their order means something
        write_text(aside / CONFIG, json.dumps(peft, ensure_ascii=False, indent=2) + "\n")
        write_json(aside / RECORD, {**_record(model, adapter), **(record or {})})
        write_text(aside / "README.md", card_text(adapter, peft["base_model_name_or_path"]))
        _prove_same(read_folder(aside), stored, folder)
    return Path(folder)


def _record(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    from lofi import __version__

    return {
        "format": FORMAT,
        "lofi": __version__,
        "versions": versions(),
        "code": hash_code(),
        "base": {
            **fingerprint.base_fingerprint(model),
            "path": _base_path(model),
            "quantization": quantization_of(model),
        },
        "scale": {path: scale for path, part in sorted(adapter.parts.items()) if (scale := _scale(part)) is not None},
        **_trained_as(adapter),
    }


def _scale(part: Part) -> float | None:
    """The multiplier of the factors as the folder holds them."""
    return getattr(part, "exported_scale", part.scale)


def _trained_as(adapter: Adapter) -> dict[str, Any]:
    """What the config was in training and what to know of the folder beside adapter_config.json."""
    trained, held = adapter.config.to_dict(), adapter.config.finished().to_dict()
    changed = {key: value for key, value in trained.items() if value != held[key]}
    return ({"trained_as": changed} if changed else {}) | {"notes": adapter.report.notes}


def _base_path(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _prove_same(read: AdapterFolder, stored: Mapping[str, Tensor], folder: str | Path) -> None:
    wrong = [k for k in stored if k not in read.tensors or not _same_bits(read.tensors[k], stored[k])]
    if wrong or len(read.tensors) != len(stored):
        raise ProofError(
            f"{folder}: {wrong[0] if wrong else TENSORS} does not read back as it was written; check the disk and save "
            "again (what was there before is unchanged)"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _dead_notes(adapter: Adapter, what: str) -> list[str]:
    """What to know of parts that change nothing; ProofError if no part that can be judged changes anything."""
    verdicts = {path: part.zero_delta() for path, part in adapter.parts.items()}
    judged = {path: dead for path, dead in verdicts.items() if dead is not None}
    dead = [path for path, verdict in judged.items() if verdict]
    zero = "B A is zero" if isinstance(adapter.config, LoraConfig) else "nothing has moved from its start"
    if judged and len(dead) == len(judged):
        raise ProofError(
            f"{what} changes nothing: {zero} in all {len(dead)} adapted modules; train it first (or for longer "
            "than the warm-up)"
        )
    named = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
    return [f"{what} changes nothing at {named}, where {zero}"] if dead else []


def _warn(notes: list[str]) -> None:
    for note in notes:
        warnings.warn(note, LofiWarning, stacklevel=3)


def read_folder(folder: str | Path) -> AdapterFolder:
    """Read an adapter folder (ours or PEFT's) without a model.

    Raises  AdapterFileError when it is missing, pickled, truncated, holds NaN, or asks for what lofi cannot do
    """
    path = readable(folder)
    if not (path / CONFIG).is_file():
        raise AdapterFileError(_no_folder(path))
    if not (path / TENSORS).is_file() and (path / "adapter_model.bin").is_file():
        raise AdapterFileError(
            f"{path}/adapter_model.bin is a pickle, which runs code when read; "
            "save the adapter in PEFT with safe_serialization=True"
        )
    peft = _read_json(path / CONFIG)
    form = stated_format(peft, str(path / CONFIG))
    config, notes = form.from_record(peft, str(path / CONFIG))
    tensors = read_safetensors(path / TENSORS)
    if not tensors:
        raise AdapterFileError(f"{path / TENSORS} holds no tensor; train the adapter and save it again")
    record = _read_json(path / RECORD) if (path / RECORD).is_file() else {}
    base = record.get("base", {"architecture": {}, "tensors": {}})
    if not isinstance(base, dict) or not {"architecture", "tensors"} <= base.keys():
        raise AdapterFileError(f"{path / RECORD} holds no usable base fingerprint; use the folder as it was saved")
    if record and record.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path / RECORD} has format {record.get('format')!r}, this lofi reads {FORMAT}; use the lofi that wrote it"
        )
    config = form.explicit_copies(config, tensors)
    return AdapterFolder(path, config, tensors, record, peft, tuple(notes))


def _no_folder(path: Path) -> str:
    if not path.exists():
        return f"adapter folder {path} does not exist; give a local folder that holds {CONFIG}"
    below = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    if below:
        return f"{path} holds no {CONFIG}, but its subfolders do: give one of {', '.join(below)}"
    return f"{path} is not an adapter folder: it holds no {CONFIG}; give the folder that save_adapter wrote"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON ({error}); copy or save the adapter again") from None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} holds a {type(value).__name__}, expected an object; save the adapter again")
    return value


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", check_base: bool = True
) -> AdapterFolder:
    """Load an adapter folder (ours or PEFT's) onto a model, strictly; it becomes the active one if none is.

    The adapter's dropout is off until `model.train()`. Without `check_base` another base is a warning, not an error.
    Raises  AdapterFileError naming every missing, extra or mis-shaped tensor; ProofError for another base or an
            adapter that changes nothing; TargetError where a target does not exist. The model is then as it was
    Warns   LofiWarning if the folder has no lofi.json, so that the base cannot be proved to be the right one, or if it
            was trained on another quantization of this base
    """
    read = read_folder(folder)
    here = fingerprint.base_fingerprint(model) if "base" in read.record else {}
    _warn(base_notes(read, here, quantization_of(model), check_base=check_base))
    _warn(fit_adapter(model, read, name))
    return read


def fit_adapter(model: nn.Module, read: AdapterFolder, name: str = "default") -> list[str]:
    """Put a folder that was read on a model, strictly, without asking whose base it is; what to know of it.

    Raises  what `load_adapter` does but for another base. The model is then as it was
    """
    with torch.random.fork_rng(devices=()):  # a new adapter draws A; loading must not move the caller's generator
        add_adapter(model, read.config, name)
    try:
        adapter = adapter_of(model, name)
        load_adapter_tensors(model, name, _fit(model, adapter, read))
        _check_scales(adapter, read)
        notes = _dead_notes(adapter, f"the adapter in {read.path}")
    except BaseException:
        unload(model, name)
        raise
    for part in adapter.parts.values():
        part.eval()
    return notes


def base_notes(
    read: AdapterFolder, here: Mapping[str, Any], quantization: str | None, *, check_base: bool = True
) -> list[str]:
    """What to know of a folder on a base with the fingerprint `here`; ProofError if it was trained on another one."""
    base = read.record.get("base")
    if base is None:
        return [f"{read.path} has no {RECORD}, so whether this is the base it was trained on cannot be proved"]
    reasons = fingerprint.compare(base, here)
    if not reasons:
        return _quantization_notes(read, base.get("quantization"), quantization)
    said = f"{read.path} was trained on another base ({base.get('path') or 'no path'}): {'; '.join(reasons[:6])}"
    if check_base:
        raise ProofError(f"{said}; load that base (load_adapter's check_base=False takes it all the same)")
    return [said]


def _quantization_notes(read: AdapterFolder, trained_on: str | None, here: str | None) -> list[str]:
    if trained_on == here:
        return []
    same = f"load it with quantization {trained_on}" if trained_on else "load it dense"
    return [
        f"{read.path} was trained on {in_words(trained_on)} and is loaded on {in_words(here)} of the same weights, "
        f"so its figures will differ a little from those on record; {same} to have them"
    ]


def _fit(model: nn.Module, adapter: Adapter, read: AdapterFolder) -> dict[str, Tensor]:
    """The file's tensors under our keys; every one that does not fit is named."""
    live = adapter_tensors(model, adapter.name)
    table = format_of(adapter.config.peft_type).slots(adapter, model)
    wanted = {slot.key: peft_format.file_shape(slot, live[key]) for key, slot in table.items()}
    rank = f" (r={adapter.config.r})" if isinstance(adapter.config, LoraConfig) else ""
    faults = [f"{key} is missing" for key in wanted if key not in read.tensors]
    faults += [
        f"{key} has shape {tuple(read.tensors[key].shape)}, {CONFIG}{rank} and this model say {shape}"
        for key, shape in wanted.items()
        if key in read.tensors and tuple(read.tensors[key].shape) != shape
    ]
    for key in sorted(read.tensors.keys() - wanted.keys()):
        fault = _extra_fault(model, key, read.tensors[key])
        faults += [fault] if fault else []
    if faults:
        more = f" and {len(faults) - 5} more faults" if len(faults) > 5 else ""
        raise AdapterFileError(
            f"{read.path / TENSORS} does not fit: {'; '.join(faults[:5])}{more}; "
            "use the folder as it was saved, on the base it was trained on"
        )
    return {key: peft_format.from_file(slot, read.tensors[slot.key], live[key]) for key, slot in table.items()}


def _extra_fault(model: nn.Module, key: str, tensor: Tensor) -> str | None:
    """None if the extra tensor repeats one of the base's, which PEFT writes beside adapted embeddings and biases."""
    name = key.removeprefix(peft_format.PREFIX)
    for wrapper in (".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    own = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if own is None:
        return f"{key} is unexpected: {CONFIG} asks for no such tensor"
    if own.shape != tensor.shape or not torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
        return f"{key} differs from this base's {name}: it belongs to another base, maybe one with a resized vocabulary"
    return None


def _check_scales(adapter: Adapter, read: AdapterFolder) -> None:
    for path, scale in read.record.get("scale", {}).items():
        mine = getattr(adapter.parts.get(path), "scale", None)
        if mine is None or abs(mine - scale) > 1e-6 * abs(scale):
            raise AdapterFileError(
                f"{read.path}: {RECORD} says the multiplier of {path} is {scale}, {CONFIG} gives {mine}; "
                "one of the two files was edited, use the folder as it was saved"
            )
