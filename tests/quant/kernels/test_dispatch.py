"""What is chosen, and what is said when that cannot be."""

from __future__ import annotations

import pytest
import torch

from lofi.errors import RequestError
from lofi.quant.codes import nf4_code
from lofi.quant.kernels import dispatch
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.linear import quantize_4bit
from lofi.quant.nf4 import dequantize_blockwise, quantize_blockwise

CPU = torch.device("cpu")


def test_plain_torch_is_there_when_asked_for(monkeypatch):
    monkeypatch.setenv("LOFI_KERNELS", "plain")
    assert kernels_for(CPU) is REFERENCE


def test_a_misspelt_choice_is_refused(monkeypatch):
    monkeypatch.setenv("LOFI_KERNELS", "nativ")
    with pytest.raises(RequestError, match="LOFI_KERNELS is 'nativ', expected one of plain, native, triton"):
        kernels_for(CPU)


def test_native_kernels_are_for_the_cpu(monkeypatch):
    monkeypatch.setenv("LOFI_KERNELS", "native")
    with pytest.raises(RequestError, match="native kernels, but the tensors are on meta; unset it"):
        kernels_for(torch.device("meta"))


def test_where_the_library_is_missing_plain_torch_runs_unless_native_was_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "_native", lambda: (None, "it was not built"))
    dispatch._chosen.cache_clear()
    try:
        monkeypatch.delenv("LOFI_KERNELS", raising=False)
        assert kernels_for(CPU) is REFERENCE
        monkeypatch.setenv("LOFI_KERNELS", "native")
        with pytest.raises(RequestError, match="native kernels, but it was not built"):
            kernels_for(CPU)
    finally:
        dispatch._chosen.cache_clear()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_plain_backend_fills_whole_weights_and_rows_as_the_reference_says(double_quant, dtype, monkeypatch):
    monkeypatch.setattr("lofi.quant.kernels.reference._PIECE", 100)
    stored = quantize_4bit(torch.randn(13, 77), double_quant=double_quant)
    expected = dequantize_blockwise(stored, dtype)
    assert torch.equal(REFERENCE.dequantize_blockwise(stored, torch.empty(13, 77, dtype=dtype)), expected)
    rows = REFERENCE.dequantize_rows(stored, 3, torch.empty(5, 77, dtype=dtype))
    assert torch.equal(rows, expected[3:8])


def test_the_plain_backend_quantizes_in_pieces_as_the_reference_does_at_once(monkeypatch):
    monkeypatch.setattr("lofi.quant.kernels.reference._PIECE", 300)
    weight = torch.randn(13, 77)
    pieces = REFERENCE.quantize_blockwise(weight, nf4_code(), 64)
    whole = quantize_blockwise(weight, nf4_code(), 64)
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_rows_of_a_stack_of_experts_are_rows_of_one_tall_matrix():
    stored = quantize_4bit(torch.randn(4, 3, 34))
    assert stored.shape == (4, 3, 34)
    rows = REFERENCE.dequantize_rows(stored, 6, torch.empty(3, 34))
    assert torch.equal(rows, dequantize_blockwise(stored, torch.float32)[2])
