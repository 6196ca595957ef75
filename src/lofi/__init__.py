"""lofi: low-rank fine-tuning, high fidelity.

Importing lofi loads neither torch nor transformers: each public name is imported from its room when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOM_OF = {
    "LofiError": "lofi.errors",
    "RequestError": "lofi.errors",
    "RecipeError": "lofi.errors",
    "TargetError": "lofi.errors",
    "DataError": "lofi.errors",
    "ModelError": "lofi.errors",
    "AdapterFileError": "lofi.errors",
    "ProofError": "lofi.errors",
    "NonFiniteError": "lofi.errors",
    "Interrupted": "lofi.errors",
    "LofiWarning": "lofi.errors",
    "LoraConfig": "lofi.adapters.config",
    "HoulsbyConfig": "lofi.adapters.methods",
    "LinConfig": "lofi.adapters.methods",
    "PrefixConfig": "lofi.adapters.methods",
    "PromptConfig": "lofi.adapters.methods",
    "BitFitConfig": "lofi.adapters.methods",
    "LastLayersConfig": "lofi.adapters.methods",
    "MixedConfig": "lofi.adapters.methods",
    "add_adapter": "lofi.adapters.attach",
    "unload": "lofi.adapters.attach",
    "print_trainable_parameters": "lofi.adapters.registry",
    "set_adapter": "lofi.adapters.switch",
    "using": "lofi.adapters.switch",
    "adapters_off": "lofi.adapters.switch",
    "load_model": "lofi.models.load",
    "NF4Config": "lofi.models.quantization",
    "Int8Config": "lofi.models.quantization",
    "save_adapter": "lofi.files.adapter_folder",
    "load_adapter": "lofi.files.adapter_folder",
    "merge_and_unload": "lofi.merge.memory",
    "LofiTrainer": "lofi.train.trainer",
}

__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lofi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
