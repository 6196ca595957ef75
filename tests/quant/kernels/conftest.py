"""The Triton backend for tests: on the GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

OURS = ("lofi.quant.kernels.triton_nf4", "lofi.quant.kernels.triton_int8")


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
