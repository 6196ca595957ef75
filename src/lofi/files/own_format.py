"""The folder of a method that PEFT does not have: the same two files, its `peft_type` beginning with LOFI_.

adapter_config.json holds the config's own fields; a tensor's key is "base_model.model.<module path>.<tensor>". PEFT
refuses such a folder by its type, which is right: it could not run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from lofi.adapters.config import AdapterConfig
from lofi.adapters.methods import BY_PEFT_TYPE, MixedConfig
from lofi.adapters.registry import Adapter
from lofi.errors import AdapterFileError, RecipeError
from lofi.files.peft_format import PREFIX, Slot

_NEUTRAL = {"peft_type", "base_model_name_or_path", "inference_mode"}


def to_record(adapter: Adapter, *, base_path: str | None = None) -> dict[str, Any]:
    """adapter_config.json of an attached adapter."""
    about = {"peft_type": adapter.config.peft_type, "base_model_name_or_path": base_path, "inference_mode": True}
    return dict(sorted({**adapter.config.finished().to_dict(), **about}.items()))


def from_record(record: Mapping[str, Any], where: str) -> tuple[AdapterConfig, list[str]]:
    """The config that an adapter_config.json holds, and notes.

    Raises  AdapterFileError for keys that the method does not have, or values that it refuses
    """
    return _config(record, where), []


def _config(record: Mapping[str, Any], where: str) -> AdapterConfig:
    cls = BY_PEFT_TYPE[record["peft_type"]]
    values = {key: value for key, value in record.items() if key not in _NEUTRAL}
    unknown = sorted(values.keys() - {f.name for f in fields(cls)})
    if unknown:
        raise AdapterFileError(
            f"{where}: {cls.__name__} has no {', '.join(unknown)}; use the lofi that wrote the folder"
        )
    if cls is MixedConfig:
        values["configs"] = [_config(one, where) for one in _stated(values.get("configs"), where)]
    try:
        return cls(**values)
    except (RecipeError, TypeError) as error:
        raise AdapterFileError(f"{where} is not a usable {cls.__name__}: {error}") from None


def _stated(configs: Any, where: str) -> list[Mapping[str, Any]]:
    """The records of a mixture's configs, each of a known type."""
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise AdapterFileError(f"{where}: configs is {configs!r}, expected a list of objects; save the adapter again")
    for one in configs:
        if one.get("peft_type") not in BY_PEFT_TYPE:
            raise AdapterFileError(
                f"{where}: configs holds peft_type {one.get('peft_type')!r}, expected one of "
                f"{', '.join(BY_PEFT_TYPE)}; use the lofi that wrote the folder"
            )
    return configs


def explicit_copies(config: AdapterConfig, keys: Any) -> AdapterConfig:
    """The config as it is: here modules_to_save holds paths, never PEFT's bare suffixes."""
    return config


def slots(adapter: Adapter, model: nn.Module) -> dict[str, Slot]:
    """For every exported tensor of an attached adapter, its place in the file."""
    return {
        f"{path}.{name}": Slot(f"{PREFIX}{path}.{name.removeprefix('copy.')}", "plain")
        for path, part in adapter.parts.items()
        for name in part.exported()
    }
