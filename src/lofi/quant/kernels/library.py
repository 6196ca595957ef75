"""The native CPU library: finds it, checks that it is this version's, and chooses the path (instruction set).

Knows no kernel: native.py and native_int8.py bind the C functions of native/*.cpp, whose last two arguments are the
path and the number of threads, and which return one of the answers below. Rejected: nanobind or pybind11 (Python's
headers, a library a Python version) and torch's extension API (bound to one torch version). A call through ctypes costs
a few microseconds where functions and their argument types are looked up once and tensors are passed as addresses.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch  # before the library is asked for threads: it looks for the OpenMP runtime that torch brings

from lofi.errors import LofiError, RequestError

ABI = 2  # native/abi.h
ISAS = ("plain", "avx2", "avx512", "avx512_bf16", "neon")  # the numbers of native/cpu.h
BEST_FIRST = ("avx512_bf16", "avx512", "avx2", "neon", "plain")
FOLDER = Path(__file__).parent
DONE, NOT_COVERED, NO_SUCH_PATH, OUT_OF_RANGE = 0, 1, 2, 3  # native/abi.h

Address = ctypes.c_void_p
Count = ctypes.c_int64
Int = ctypes.c_int
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers of native/abi.h


class NativeMissing(LofiError):
    """There is no native library that can be used here; the message says why."""


class Library:
    """The loaded library and the path (instruction set) that its kernels shall take.

    Raises:
        NativeMissing: it was not built, cannot be loaded, or was left behind by another version of lofi.
        RequestError: `isa` is no path, or one that this CPU does not run.
    """

    def __init__(self, *, isa: str | None = None, file: Path = FOLDER / "_native.so") -> None:
        self.handle = _opened(file)
        self.name = _chosen(self.handle, isa)
        self.isa = ISAS.index(self.name)

    def function(self, name: str, *arguments: Any) -> Any:
        """The C function `name` with its argument types set; it returns one of the four answers above."""
        found = getattr(self.handle, name)
        found.argtypes, found.restype = arguments, ctypes.c_int
        return found


def runnable(handle: ctypes.CDLL) -> list[str]:
    """The paths that this CPU runs, best first."""
    return [name for name in BEST_FIRST if handle.lofi_runs(ISAS.index(name))]


def _opened(file: Path) -> ctypes.CDLL:
    if not file.exists():
        raise NativeMissing(_why_absent(file))
    try:
        handle = ctypes.CDLL(str(file))
        version = handle.lofi_abi()
    except (OSError, AttributeError) as error:
        raise NativeMissing(f"{file} cannot be loaded ({error}); reinstall lofi") from error
    if version != ABI:
        raise NativeMissing(
            f"{file} was built from another version of lofi (interface {version}, expected {ABI}); reinstall lofi"
        )
    return handle


def _why_absent(file: Path) -> str:
    note = file.with_name("_native.absent")
    if note.exists():
        return f"the native library was not built when lofi was installed: {note.read_text(encoding='utf-8').strip()}"
    return f"there is no {file}; reinstall lofi (a C++ compiler is needed)"


def _chosen(handle: ctypes.CDLL, isa: str | None) -> str:
    here = runnable(handle)
    if isa is None:
        return here[0]
    if isa not in ISAS:
        raise RequestError(f"LOFI_ISA is {isa!r}, expected one of {', '.join(here)}, or nothing for the best")
    if isa not in here:
        raise RequestError(f"LOFI_ISA is {isa!r}, which this CPU does not run; it runs {', '.join(here)}")
    return isa
