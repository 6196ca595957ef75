"""Backends for tests: native kernels by path; Triton on the GPU where there is one, else in its interpreter."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from lofi.quant.kernels.library import ISAS, Library, NativeMissing, runnable
from lofi.quant.kernels.native import NativeKernels

OURS = tuple(f"lofi.quant.kernels.triton_{name}" for name in ("nf4", "int8", "low_rank"))


def _is_python_of_triton(name: str) -> bool:
    return name in OURS or name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C"))


@pytest.fixture(scope="module")
def backend():
    """(kernels, device). Whether Triton interprets is settled when it is imported, and transformers has imported it by
    now, perhaps: so a second copy of its Python part is imported here, and is gone again afterwards."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    from lofi.quant.kernels.triton import load_triton

    if torch.cuda.is_available():
        kernels, reason = load_triton("cuda")
        assert kernels is not None, reason
        yield kernels, torch.device("cuda")
        return
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_python_of_triton(name)}
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    try:
        importlib.import_module("triton")
        kernels, reason = load_triton("cpu")
        assert kernels is not None, reason
        yield kernels, torch.device("cpu")
    finally:
        patch.undo()
        for name in [name for name in sys.modules if _is_python_of_triton(name)]:
            del sys.modules[name]
        sys.modules.update(held)


@pytest.fixture(scope="module", params=ISAS)
def kernels(request) -> NativeKernels:
    """The native kernels on each path that this CPU runs."""
    try:
        here = runnable(Library().handle)
    except NativeMissing as missing:
        pytest.skip(str(missing))
    if request.param not in here:
        pytest.skip(f"this CPU does not run {request.param}")
    return NativeKernels(Library(isa=request.param))


@pytest.fixture(params=[1, 2])
def threads(request):
    """torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
