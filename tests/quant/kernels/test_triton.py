"""The Triton kernels against the reference in plain torch: on a GPU where there is one, else in Triton's interpreter.

The interpreter cuts a float32 to bfloat16 where a GPU rounds it, and multiplies no matrices of bfloat16; what depends
on that is compared with the cut value, or in float16, and as it should be on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lofi.errors import RequestError
from lofi.quant import int8, nf4
from lofi.quant.codes import fp4_code, nf4_code
from lofi.quant.kernels.dispatch import _chosen, kernels_for
from lofi.quant.kernels.triton import load_triton
from lofi.quant.storage import FourBit, Nested

SHAPES = [(1, 1), (3, 7), (5, 64), (37, 131), (2, 9, 50)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight, device, *, block=64, double=True):
    codes, absmax = nf4.quantize_blockwise(weight, nf4_code(), block)
    absmax, nested = nf4.quantize_scales(absmax) if double else (absmax, None)
    if nested:
        nested = Nested(*(t.to(device) for t in (nested.absmax, nested.offset, nested.quant_map)), nested.block)
    return FourBit(codes.to(device), absmax.to(device), nf4_code().to(device), tuple(weight.shape), block, nested)


def expected(stored, dtype, device):
    values = nf4.dequantize_blockwise(stored, torch.float32)
    if dtype == torch.bfloat16 and device.type == "cpu":
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_the_references_to_the_bit(shape, dtype, backend):
    kernels, device = backend
    weight = normal(*shape, seed=1, dtype=dtype)
    for code, block in [(nf4_code(), 64), (fp4_code(), 128), (nf4_code(), 4096)]:
        codes, absmax = kernels.quantize_blockwise(weight.to(device), code.to(device), block)
        wanted = nf4.quantize_blockwise(weight, code, block)
        assert torch.equal(codes.cpu(), wanted[0]) and torch.equal(absmax.cpu(), wanted[1])


def test_blocks_of_zeros_are_coded_as_the_reference_codes_them(backend):
    kernels, device = backend
    weight = torch.zeros(3, 70)
    weight[1] = normal(70, seed=2)
    codes, absmax = kernels.quantize_blockwise(weight.to(device), nf4_code().to(device), 64)
    wanted = nf4.quantize_blockwise(weight, nf4_code(), 64)
    assert torch.equal(codes.cpu(), wanted[0]) and torch.equal(absmax.cpu(), wanted[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_dequantized_weights_are_the_references_to_the_bit(shape, dtype, double, backend):
    kernels, device = backend
    for block in (64, 256):
        stored = packed(normal(*shape, seed=3), device, block=block, double=double)
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        assert kernels.dequantize_blockwise(stored, out) is out
        assert torch.equal(out, expected(stored, dtype, device))


def test_rows_are_written_from_an_odd_element_on_and_nothing_beside_them(backend):
    kernels, device = backend
    stored = packed(normal(37, 131, seed=4), device)
    whole = expected(stored, torch.float32, device)
    for first, rows in [(1, 5), (0, 37), (36, 1), (7, 0)]:
        around = torch.full((rows * 131 + 200,), 7.0, device=device)
        kernels.dequantize_rows(stored, first, around[100:-100].view(rows, 131))
        assert torch.equal(around[100:-100].view(rows, 131), whole[first : first + rows])
        assert (around[:100] == 7).all() and (around[-100:] == 7).all()


def test_a_block_that_no_kernel_is_written_for_is_computed_in_plain_torch(backend):
    kernels, device = backend
    weight = normal(7, 50, seed=5)
    codes, absmax = kernels.quantize_blockwise(weight.to(device), nf4_code().to(device), 96)
    assert torch.equal(codes.cpu(), nf4.quantize_blockwise(weight, nf4_code(), 96)[0]) and len(absmax) == 4
    stored = packed(weight, device, block=96)
    out = torch.empty(3, 50, device=device)
    assert torch.equal(kernels.dequantize_rows(stored, 2, out), expected(stored, torch.float32, device)[2:5])


@pytest.mark.parametrize(("rows", "wide", "long"), [(1, 5, 64), (1, 33, 2304), (2, 17, 1600), (16, 33, 192)])
@pytest.mark.parametrize("double", [True, False])
def test_a_few_rows_are_multiplied_as_by_the_dense_weight(rows, wide, long, double, backend):
    kernels, device = backend
    stored = packed(normal(wide, long, seed=6), device, double=double)
    dense = nf4.dequantize_blockwise(stored, torch.float32).double()
    dtypes = [(torch.float32, 1e-6), (torch.float16, 6e-4)]
    for dtype, tolerance in dtypes + ([(torch.bfloat16, 5e-3)] if device.type == "cuda" else []):
        x = normal(rows, long, seed=7, dtype=dtype).to(device)
        y = kernels.few_rows(x, stored)
        assert y.dtype == dtype and y.shape == (rows, wide)
        assert relative(y, x.double() @ dense.t()) < tolerance
        broken = replace(stored, codes=stored.codes.clone())
        broken.codes[3] ^= 0x0F  # one weight
        assert relative(kernels.few_rows(x, broken), x.double() @ dense.t()) > tolerance


def test_a_block_longer_than_a_tile_is_multiplied_too(backend):
    kernels, device = backend
    stored = packed(normal(5, 2048, seed=8), device, block=1024)
    for rows in (1, 3):
        x = normal(rows, 2048, seed=9, dtype=torch.float16).to(device)
        wanted = x.double() @ nf4.dequantize_blockwise(stored, torch.float32).double().t()
        assert relative(kernels.few_rows(x, stored), wanted) < 6e-4


def test_what_the_fused_product_does_not_cover_is_left_to_the_caller(backend):
    kernels, device = backend
    stored = packed(normal(8, 128, seed=10), device)
    assert kernels.few_rows(torch.ones(17, 128, device=device), stored) is None
    assert kernels.few_rows(torch.ones(2, 100, device=device), packed(normal(8, 100), device)) is None
    assert kernels.few_rows(torch.ones(2, 64, device=device), packed(normal(2, 8, 64), device)) is None
    assert kernels.few_rows(torch.ones(2, 128, dtype=torch.float64, device=device), stored) is None
    odd = torch.empty(8 * 64 + 1, dtype=torch.uint8, device=device)[1:].copy_(stored.codes)
    assert kernels.few_rows(torch.ones(2, 128, device=device), replace(stored, codes=odd)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_the_references_to_the_bit(dtype, backend):
    kernels, device = backend
    weight = normal(7, 333, seed=11, dtype=dtype)
    weight[3] = 0
    stored, wanted = kernels.quantize_weight_rows(weight.to(device)), int8.quantize_weight_rows(weight)
    assert torch.equal(stored.codes.cpu(), wanted.codes) and torch.equal(stored.scale.cpu(), wanted.scale)
    for out in (torch.full((7, 333), float("nan"), dtype=kind, device=device) for kind in (torch.float32, torch.half)):
        assert torch.equal(kernels.dequantize_int8(stored, out).cpu(), int8.dequantize_int8(wanted, out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 2.501, 100.0])
def test_activations_are_split_and_coded_as_the_reference_does(dtype, threshold, backend):
    kernels, device = backend
    x = normal(5, 300, seed=12, dtype=dtype)
    x[2] = 0
    x[3, 7] = 2.5  # what 2.501 is in bfloat16
    rows, wanted = kernels.quantize_rows(x.to(device), threshold), int8.quantize_rows(x, threshold)
    for name in ("codes", "scale", "columns", "outliers"):
        found = getattr(rows, name)
        assert found.dtype == getattr(wanted, name).dtype and torch.equal(found.cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize(("rows", "wide", "long"), [(1, 5, 64), (17, 33, 300), (65, 19, 513)])
def test_the_int8_product_is_the_references(rows, wide, long, backend):
    kernels, device = backend
    stored = kernels.quantize_weight_rows(normal(wide, long, seed=13).to(device))
    x = normal(rows, long, seed=14).to(device)
    plain = kernels.quantize_rows(x, 0.0)
    assert torch.equal(kernels.int8_product(plain, stored, torch.float32), int8.int8_product(plain, stored))
    split = kernels.quantize_rows(x, 2.0)
    assert len(split.columns) > 0
    wanted = int8.int8_product(split, stored)
    assert relative(kernels.int8_product(split, stored, torch.float32), wanted) < 1e-6
    assert relative(kernels.int8_product(split, stored, torch.float16), wanted) < 1e-3
    broken = replace(split, outliers=split.outliers * 1.001)
    assert relative(kernels.int8_product(broken, stored, torch.float32), wanted) > 1e-6


def test_a_row_of_the_int8_product_does_not_depend_on_its_neighbours(backend):
    kernels, device = backend
    stored = kernels.quantize_weight_rows(normal(11, 200, seed=15).to(device))
    x = normal(4, 200, seed=16).to(device)
    x[1, ::3] *= 60
    together = kernels.int8_product(kernels.quantize_rows(x, 6.0), stored, torch.float32)
    for i in range(4):
        alone = kernels.int8_product(kernels.quantize_rows(x[i : i + 1], 6.0), stored, torch.float32)
        assert relative(together[i : i + 1], alone) < 1e-6


def test_asking_for_triton_where_it_cannot_run_is_one_sentence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("LOFI_KERNELS", "triton")
    _chosen.cache_clear()
    with pytest.raises(RequestError, match=r"asks for triton kernels, but the tensors are on cpu and .*; unset"):
        kernels_for(torch.device("cpu"))


def test_a_machine_without_triton_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert load_triton("cuda") == (None, "the package triton is not installed")


def test_choosing_kernels_does_not_import_triton():
    check = "import lofi.quant.kernels.dispatch, lofi.quant.kernels.triton, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")


@needs_gpu
def test_elements_past_two_to_the_32nd_are_read_and_written_where_they_stand(backend):
    kernels, device = backend
    rows, wide = (1 << 20) + 1, 4096
    n = rows * wide
    codes = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=device)
    stored = FourBit(codes, torch.rand(n // 64, device=device), nf4_code().to(device), (rows, wide))
    last = FourBit(codes[-wide // 2 :], stored.absmax[-wide // 64 :], stored.quant_map, (1, wide))
    out = kernels.dequantize_blockwise(stored, torch.empty(rows, wide, dtype=torch.bfloat16, device=device))
    assert torch.equal(out[-1:], nf4.dequantize_blockwise(last, torch.bfloat16))
    before = (1 << 31) // wide - 1  # these rows' first element and their count fit 31 bits, their last element does not
    some = kernels.dequantize_rows(stored, before, torch.empty(2, wide, dtype=torch.bfloat16, device=device))
    assert torch.equal(some, out[before : before + 2])
    x = normal(2, wide, seed=17, dtype=torch.bfloat16).to(device)
    assert relative(kernels.few_rows(x, stored)[:, -1:], x.double() @ out[-1:].double().t()) < 5e-3


@needs_gpu
def test_a_product_in_many_splits_is_the_same_bits_every_time(backend):
    kernels, device = backend
    stored = packed(normal(256, 8192, seed=18), device)
    for rows in (1, 8):
        x = normal(rows, 8192, seed=19, dtype=torch.bfloat16).to(device)
        first = kernels.few_rows(x, stored)
        assert all(torch.equal(first, kernels.few_rows(x, stored)) for _ in range(20))
