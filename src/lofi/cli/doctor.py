"""`lofi doctor`: what this machine offers, and what lofi will choose on it."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from lofi.cli import flags
from lofi.cli.output import speaking

PACKAGES = (
    *("lofi", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub"),
    *("numpy", "pydantic", "sacrebleu"),
)
OPTIONAL = ("tensorboard", "peft")


def doctor(device: flags.Device = "auto", as_json: flags.Json = False) -> None:
    """Say what this machine offers (kernels, dtypes, memory, versions) and what lofi will choose.

    \b
    Example:
      lofi doctor
    """
    with speaking(as_json) as out:
        found = examine(device)
        out.answer(found)
        for title, part in found.items():
            out.show(_table(title, part))


def examine(device: str) -> dict[str, Any]:
    """Machine, memory, kernels, choices and versions, as plain values (bytes are GiB with one decimal)."""
    import torch

    from lofi.models.dtypes import choose_dtype, resolve_device

    chosen = resolve_device(device)
    choice = choose_dtype(chosen)
    return {
        "machine": _machine(torch),
        "memory": _memory(torch, chosen),
        "kernels": _kernels(torch, chosen),
        "lofi will choose": {
            "device": str(chosen),
            "compute dtype": choice.name,
            "because": choice.reason,
            "gradient scaler": choice.scaler,
            "adapter weights": "fp32",
            "attention": "sdpa",
            "threads": torch.get_num_threads(),
        },
        "versions": {name: _version(name) for name in PACKAGES}
        | {name: _version(name) or "not installed (optional)" for name in OPTIONAL},
    }


def _machine(torch: Any) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "GPUs": ", ".join(gpus) or "none",
    }


def _memory(torch: Any, device: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"disk free here (GiB)": _gib(shutil.disk_usage(".").free)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        found["memory (GiB)"] = _gib(os.sysconf("SC_PHYS_PAGES") * page)
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found["memory free (GiB)"] = _gib(os.sysconf("SC_AVPHYS_PAGES") * page)
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        found |= {"GPU memory (GiB)": _gib(whole), "GPU memory free (GiB)": _gib(free)}
    return found


def _kernels(torch: Any, device: Any) -> dict[str, Any]:
    from lofi.models.dtypes import native_bf16

    bf16 = native_bf16()
    return {
        "CPU instructions torch uses": torch.backends.cpu.get_cpu_capability(),
        "CPU bf16": "cannot be asked here" if bf16 is None else " + ".join(bf16) or "none (emulated)",
        "oneDNN": torch.backends.mkldnn.is_available(),
        "CUDA": torch.version.cuda or "not in this torch",
        "lofi's own": _own(device),
    }


def _own(device: Any) -> str:
    """The kernels for quantized models that dispatch chooses, or why there are none and what is lost."""
    from lofi.quant.kernels.dispatch import kernels_for
    from lofi.quant.kernels.reference import REFERENCE

    kernels = kernels_for(device)
    if kernels is not REFERENCE:
        return kernels.name
    if os.environ.get("LOFI_KERNELS") == "plain":
        return f"{REFERENCE.name}, as LOFI_KERNELS asks"
    return f"{REFERENCE.name}, because {_why_none(device.type)}; quantized models work, but much slower"


def _why_none(device_type: str) -> str:
    from lofi.quant.kernels.native import load_native
    from lofi.quant.kernels.triton import load_triton

    if device_type == "cpu":
        return load_native()[1]
    return load_triton(device_type)[1] if device_type == "cuda" else f"there are none for {device_type}"


def _gib(count: int) -> float:
    return round(count / 2**30, 1)


def _version(name: str) -> str | None:
    from importlib import metadata  # 20 ms that `lofi --help` need not wait for

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _table(title: str, part: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
    for key, value in part.items():
        table.add_row(key, {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value))
    return table
