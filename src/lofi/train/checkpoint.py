"""What a checkpoint folder holds, and how it is read back: safetensors and JSON only.

    model.safetensors           a model without adapters: its parameters and buffers under their own names (tied once)
    adapters/NAME.safetensors   else what each adapter trains, and started from where that counts, float32
    optimizer.*, scheduler.*, scaler.*, rng.*     nested state as .safetensors + .json (lofi.files.tensors)
    progress.json, training_args.json, trainer_state.json
    checkpoint.json             written last: every file with its size; a folder without it, or that does not agree
                                with it, is not a checkpoint

Rejected: PEFT's folder as the checkpoint's form (its names fold tied and stacked tensors, and a checkpoint after one
step may rightly hold an adapter that is still zero; the finished adapter is written by `lofi.files.save_adapter`),
and torch.save (is pickle: loading rng_state.pth runs code, CVE-2026-1839).
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.registry import adapter_state, adapters_of, base_state, load_adapter_state
from lofi.errors import AdapterFileError, LofiError
from lofi.files.atomic import write_json
from lofi.files.tensors import read_safetensors, save_safetensors

SEAL = "checkpoint.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write what trains: each adapter's tensors, or the whole model where there is none.  Exact  bit for bit"""
    names = list(adapters_of(model))
    if not names:
        save_safetensors(folder / "model.safetensors", base_state(model))
        return
    (folder / "adapters").mkdir(exist_ok=True)
    for name in names:
        save_safetensors(folder / "adapters" / f"{name}.safetensors", adapter_state(model, name))


def read_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into the model, strictly both ways.

    Raises  AdapterFileError naming what is missing, unexpected or of another shape; the model is then as it was
    """
    names = list(adapters_of(model))
    if not names:
        _fill(base_state(model), read_safetensors(folder / "model.safetensors"), folder)
    for name in names:
        load_adapter_state(model, name, read_safetensors(folder / "adapters" / f"{name}.safetensors"))


@torch.no_grad()
def _fill(live: dict[str, Tensor], stored: dict[str, Tensor], folder: Path) -> None:
    faults = [f"missing {key}" for key in live.keys() - stored.keys()]
    faults += [f"unexpected {key}" for key in stored.keys() - live.keys()]
    faults += [f"{k} has another shape" for k in live.keys() & stored.keys() if live[k].shape != stored[k].shape]
    if faults:
        shown = "; ".join(sorted(faults)[:5])
        raise AdapterFileError(f"{folder} does not fit this model: {shown}; resume with the model it was made for")
    for key, value in stored.items():
        live[key].copy_(value)


def rng_state() -> dict[str, Any]:
    """The state of every random generator: Python, numpy, torch on the CPU and on each CUDA device."""
    import numpy

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator back where `rng_state` found it.

    Raises  LofiError when the state is of another number of CUDA devices
    """
    import numpy

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        raise LofiError(
            f"the checkpoint was made with {len(state['cuda'])} CUDA devices, this process sees {devices}; "
            "resume where it was started, or start a new run"
        )
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"]) if devices else None


def seal(folder: Path, step: int) -> None:
    """Write `checkpoint.json`, the list of what a whole checkpoint holds, as the last file of a folder."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / SEAL, {"format": 1, "step": step, "files": files})


def is_complete(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint: sealed, and every file there in its full size."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def last_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint-N with the highest N inside a folder; None where there is none."""
    return max((p for p in _numbered(folder) if is_complete(p)), key=step_of, default=None)


def _numbered(folder: str | Path) -> list[Path]:
    folder = Path(folder)
    return [p for p in folder.iterdir() if _NAME.match(p.name)] if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.match(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])
