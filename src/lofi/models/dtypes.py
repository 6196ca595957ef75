"""Which number format to compute in, on this device, with the reason in words.

A CPU is asked what it declares (AVX512-BF16, AMX, ARM bf16) and then measured, because a declared instruction may be
switched off in torch or emulated. Nothing is decided by a product name. The caller stores the choice with the run:
a resumed run reuses it, so a noisy measurement can never change a run half-way.
"""

from __future__ import annotations

import functools
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lofi.errors import ModelError, RecipeError

NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
_NATIVE_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "ARM bf16", "svebf16": "ARM SVE bf16"}
_WORTH_IT = 1.2  # bf16 must beat float32 by this much in the measured product


@dataclass(frozen=True)
class DtypeChoice:
    """A compute dtype and why; `autocast`: float32 weights that train run under autocast; `scaler`: fp16 needs one."""

    dtype: torch.dtype
    reason: str
    autocast: bool
    scaler: bool = False

    @property
    def name(self) -> str:
        """The recipe's word: bf16, fp16 or fp32."""
        return next(word for word, dtype in NAMES.items() if dtype == self.dtype)


def parse_dtype(given: str | torch.dtype) -> torch.dtype:
    """The torch dtype for bf16, fp16, fp32 (or torch's own names); RecipeError for anything else."""
    if isinstance(given, torch.dtype):
        return given
    if given not in NAMES:
        raise RecipeError(f"dtype '{given}' is not known; use auto, bf16, fp16 or fp32")
    return NAMES[given]


def resolve_device(given: str | torch.device = "auto") -> torch.device:
    """The device asked for; "auto" is cuda, else mps, else cpu. ModelError if it is not there."""
    if isinstance(given, str) and given == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ModelError(f"device '{given}' is not known; use auto, cpu, cuda, cuda:1 or mps") from None
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not present.get(device.type, lambda: True)():
        raise ModelError(f"device '{given}' was asked for, but torch sees none here; use device: auto or cpu")
    return device


def choose_dtype(device: str | torch.device, requested: str | torch.dtype = "auto") -> DtypeChoice:
    """bf16 where the device does it natively, fp16 with a scaler where only that is fast, else float32.

    Raises   RecipeError for an unknown word, or float16 on a CPU (slower than float32 and overflows)
    """
    device = resolve_device(device)
    if requested != "auto":
        return _as_requested(device, parse_dtype(requested))
    if device.type == "cuda":
        return cuda_choice(torch.cuda.get_device_capability(device))
    if device.type == "mps":
        return DtypeChoice(torch.bfloat16, "this Apple GPU multiplies in bf16", autocast=True)
    return cpu_choice(native_bf16(), measured_speedup)


def _as_requested(device: torch.device, dtype: torch.dtype) -> DtypeChoice:
    if dtype == torch.float16 and device.type == "cpu":
        raise RecipeError("dtype fp16 was asked for on a CPU, where fp32 is faster and does not overflow; use auto")
    reason = "as requested"
    if dtype == torch.bfloat16 and device.type == "cpu" and not native_bf16():
        reason = "as requested, though this CPU emulates bf16 and fp32 would be faster"
    return DtypeChoice(dtype, reason, autocast=dtype != torch.float32, scaler=dtype == torch.float16)


def cuda_choice(capability: tuple[int, int]) -> DtypeChoice:
    """bf16 from compute capability 8.0 (Ampere), fp16 with a scaler from 5.3, else float32."""
    words = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        return DtypeChoice(torch.bfloat16, f"{words} multiplies in bf16", autocast=True)
    if capability >= (5, 3):
        return DtypeChoice(torch.float16, f"{words} is fast in fp16 only", autocast=True, scaler=True)
    return DtypeChoice(torch.float32, f"{words} is fast in neither bf16 nor fp16", autocast=False)


def cpu_choice(native: tuple[str, ...] | None, speedup: object) -> DtypeChoice:
    """bf16 if the CPU declares it (or cannot be asked) and `speedup()` measures it as worth it, else float32."""
    if native == ():
        return DtypeChoice(torch.float32, "this CPU has no bf16 instructions", autocast=False)
    told = f"CPU with {' + '.join(native) if native else 'an unknown instruction set'}"
    ratio = speedup()  # type: ignore[operator]
    if ratio < _WORTH_IT:
        return DtypeChoice(torch.float32, f"{told}, but a bf16 product is only {ratio:.1f}x fp32", autocast=False)
    return DtypeChoice(torch.bfloat16, f"{told}: a bf16 product is {ratio:.1f}x fp32", autocast=True)


@functools.cache
def native_bf16() -> tuple[str, ...] | None:
    """The bf16 instruction sets that this CPU declares, () for none, None where the system cannot be asked."""
    if platform.system() != "Linux":
        return None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return declared_bf16(text)


def declared_bf16(cpuinfo: str) -> tuple[str, ...] | None:
    """The bf16 instruction sets named in a /proc/cpuinfo text; None if it names no features at all."""
    lines = [line for line in cpuinfo.splitlines() if line.lower().startswith(("flags", "features"))]
    if not lines:
        return None
    flags = set(lines[0].partition(":")[2].split())
    return tuple(name for flag, name in _NATIVE_FLAGS.items() if flag in flags)


@functools.cache
def measured_speedup() -> float:
    """How many times faster a 384 x 512 x 512 product is in bf16 than in float32 (best of several, once a process)."""
    for _ in range(3):  # a busy machine may spoil one round, not make bf16 look faster than it is three times
        ratio = _one_round()
        if ratio >= _WORTH_IT:
            break
    return ratio


def _one_round() -> float:
    a = torch.linspace(-1, 1, 384 * 512).view(384, 512)
    b = torch.linspace(-1, 1, 512 * 512).view(512, 512)
    pairs = {torch.float32: (a, b), torch.bfloat16: (a.bfloat16(), b.bfloat16())}
    best = dict.fromkeys(pairs, float("inf"))
    for repeat in range(9):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            torch.nn.functional.linear(left, right)
            if repeat > 1:  # the first two warm up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
