"""Which form a folder has: one module for each, all with `to_record`, `from_record`, `explicit_copies` and `slots`."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lofi.adapters.methods import BY_PEFT_TYPE
from lofi.errors import AdapterFileError
from lofi.files import own_format, peft_format, virtual_format

_FORMATS: dict[str, ModuleType] = {
    "LORA": peft_format,
    "PREFIX_TUNING": virtual_format,
    "PROMPT_TUNING": virtual_format,
    virtual_format.OWN_PREFIX: virtual_format,
}


def format_of(peft_type: str) -> ModuleType:
    """The form of the folders of one `peft_type`."""
    return _FORMATS.get(peft_type, own_format)


def stated_format(record: Mapping[str, Any], where: str) -> ModuleType:
    """The form that an adapter_config.json says its folder has.

    Raises  AdapterFileError for a `peft_type` that lofi does not know
    """
    kind = record.get("peft_type")
    if kind not in BY_PEFT_TYPE and kind not in _FORMATS:
        raise AdapterFileError(
            f"{where}: peft_type is {kind!r}, expected one of {', '.join(BY_PEFT_TYPE)}; convert the adapter to LoRA"
        )
    return format_of(str(kind))
