"""Adapter folders for the tests of serving: stirred, saved with what training would have put on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lofi
from adapters.mixes import stir
from files.families import family_model
from lofi.adapters.attach import unload
from lofi.adapters.twin import twin
from lofi.files.golden import make_golden

FAMILY = "llama_tied"
ROWS = {"trainable_token_indices": [4, 9]}


def base(seed: int = 0, **more: Any) -> Any:
    return family_model(FAMILY, seed=seed, **more)


def saved(
    folder: Path, model: Any = None, *, seed: int = 0, size: float = 0.1, golden: bool = True, **config: Any
) -> Path:
    """A folder of a stirred adapter of rank 3; `model` stays as it is."""
    made = twin(base() if model is None else model)
    lofi.add_adapter(made, lofi.LoraConfig(**{"r": 3, "lora_alpha": 7, **config}))
    stir(made, "default", seed, size)
    record = {"golden": make_golden(made, max_new_tokens=4)} if golden else {}
    lofi.save_adapter(made, folder, record=record)
    unload(made)
    return folder
