"""The C++ backend against the reference, by each path that this CPU runs: bit-equal where it says so, else in bound."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lofi.errors import ModelError, RequestError
from lofi.quant import nf4
from lofi.quant.codes import code_of, nf4_code
from lofi.quant.kernels import library, native
from lofi.quant.kernels.library import FOLDER, ISAS, Library, NativeMissing, runnable
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.storage import FourBit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 150)),
    st.tuples(st.integers(1, 70), st.sampled_from([64, 128, 192, 320])),
    st.sampled_from([(257, 131), (300, 192)]),  # large enough for two threads
)
blocks = st.sampled_from([2, 6, 32, 64, 64, 64, 100, 128, 4096])
seeds = st.integers(0, 2**31)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random magnitudes from denormal to huge, with zeros, NaN and infinities now and then."""
    random = torch.Generator().manual_seed(seed)
    largest = 3.0 if dtype == torch.float16 else 37.0
    power = torch.rand((), generator=random) * (largest + 42) - 42
    weight = torch.randn(shape, generator=random) * (10.0 ** power.double()).float()
    for value in (0.0, 0.0, float("nan"), float("inf"), -float("inf")):
        if torch.rand((), generator=random) < 0.2:
            weight.view(-1)[torch.randint(weight.numel(), (1 + weight.numel() // 100,), generator=random)] = value
    return weight.to(dtype)


def stored_of(shape: tuple[int, ...], block: int, kind: str, seed: int, *, double: bool) -> FourBit:
    code = code_of(kind)
    weight = weight_of(shape, torch.float32, seed)
    if double:  # a mean over NaN or infinity would leave nothing to compare
        weight = weight.nan_to_num(0.0, 1.0, -1.0)
    codes, absmax = nf4.quantize_blockwise(weight, code, block)
    nested = None
    if double:
        absmax, nested = nf4.quantize_scales(absmax, 256 if seed % 2 else 3)
    return FourBit(codes, absmax, code, shape, block, nested)


def same(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Bit-equal, but for which NaN."""
    nan = reference.isnan()
    bits = BITS[reference.dtype]
    return torch.equal(ours.isnan(), nan) and torch.equal(ours.view(bits)[~nan], reference.view(bits)[~nan])


@examples
@given(shapes, blocks, st.sampled_from(["nf4", "fp4"]), st.booleans(), st.sampled_from(DTYPES), seeds)
def test_dequantized_weights_are_the_references_to_the_bit(kernels, threads, shape, block, kind, double, dtype, seed):
    stored = stored_of(shape, block, kind, seed, double=double)
    reference = nf4.dequantize_blockwise(stored, dtype)
    assert same(kernels.dequantize_blockwise(stored, torch.empty(shape, dtype=dtype)), reference)
    first, last = sorted((seed % shape[0], seed // 7 % shape[0]))
    out = torch.empty(last + 1 - first, shape[1], dtype=dtype)
    assert same(kernels.dequantize_rows(stored, first, out), reference[first : last + 1])


@examples
@given(shapes, blocks, st.sampled_from(["nf4", "fp4"]), st.sampled_from(DTYPES), seeds)
def test_codes_and_scales_are_the_references_to_the_bit(kernels, threads, shape, block, kind, dtype, seed):
    weight, code = weight_of(shape, dtype, seed), code_of(kind)
    codes, absmax = kernels.quantize_blockwise(weight, code, block)
    reference_codes, reference_absmax = nf4.quantize_blockwise(weight, code, block)
    assert torch.equal(codes, reference_codes)
    assert same(absmax, reference_absmax)


def bound_of(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x W^T in float64, the largest error that `few_rows` states)."""
    x, weight, inputs = x.double(), weight.double(), x.shape[1]
    exact, size = x @ weight.t(), x.abs() @ weight.abs().t()
    flushed = 2.0**-126 * (inputs + x.abs().sum(1)[:, None] + weight.abs().sum(1))
    return exact, inputs * 2.0**-24 * size + flushed


products = st.tuples(
    st.integers(1, 16),
    st.integers(1, 70),
    st.sampled_from([64, 128, 320, 2112]),
    st.sampled_from([64, 128, 4096]),
)


@examples
@given(products, st.booleans(), st.sampled_from(DTYPES), seeds)
def test_few_rows_are_products_with_the_dequantized_weight(kernels, threads, product, double, dtype, seed):
    rows, out, inputs, block = product
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=random) * 10 ** (seed % 4 - 3)
    codes, absmax = nf4.quantize_blockwise(weight, nf4_code(), block)
    nested = None
    if double:
        absmax, nested = nf4.quantize_scales(absmax)
    stored = FourBit(codes, absmax, nf4_code(), (out, inputs), block, nested)
    x = torch.randn(rows, inputs, generator=random).to(dtype)
    y = kernels.few_rows(x, stored)
    assert y is not None and y.dtype == dtype and y.shape == (rows, out)
    exact, bound = bound_of(x, nf4.dequantize_blockwise(stored, dtype))
    rounding = (exact.abs() + bound) * HALF_STEP[dtype] + SMALLEST[dtype]
    assert ((y.double() - exact).abs() <= bound + rounding).all()


def test_the_bound_of_few_rows_would_notice_one_wrong_code(kernels):
    stored = stored_of((3, 64), 64, "nf4", 4, double=False)
    stored = FourBit(stored.codes, torch.ones(3), stored.quant_map, (3, 64))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    exact, bound = bound_of(x, nf4.dequantize_blockwise(stored, torch.float32))
    stored.codes[5] ^= 1
    wrong = (kernels.few_rows(x, stored).double() - exact).abs()
    assert (wrong[:, 0] > bound[:, 0] + exact[:, 0].abs() * 2**-24).all()
    assert (wrong[:, 1:] <= bound[:, 1:] + exact[:, 1:].abs() * 2**-24).all()


def test_infinite_and_missing_values_of_x_come_through_few_rows(kernels):
    stored = stored_of((5, 128), 64, "nf4", 11, double=False)
    stored = FourBit(stored.codes, torch.ones(10), stored.quant_map, (5, 128))
    for dtype in DTYPES:
        x = torch.ones(3, 128, dtype=dtype)
        x[1, 70] = float("nan")
        y = kernels.few_rows(x, stored)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("rows", "shape", "block"),
    [(17, (4, 64), 64), (2, (4, 96), 64), (2, (4, 64), 32), (0, (4, 64), 64), (2, (2, 4, 64), 64)],
)
def test_few_rows_says_so_where_it_does_not_cover_a_shape(kernels, rows, shape, block):
    stored = stored_of(shape, block, "nf4", 1, double=False)
    assert kernels.few_rows(torch.randn(rows, shape[-1]), stored) is None


def test_types_that_the_library_does_not_know_go_to_the_reference(kernels):
    stored = stored_of((3, 64), 64, "nf4", 2, double=True)
    out = torch.empty(3, 64, dtype=torch.float64)
    assert torch.equal(kernels.dequantize_blockwise(stored, out), nf4.dequantize_blockwise(stored, torch.float64))
    assert torch.equal(kernels.dequantize_rows(stored, 1, out[1:]), REFERENCE.dequantize_rows(stored, 1, out[1:]))
    assert kernels.few_rows(torch.randn(2, 64).double(), stored) is None
    assert kernels.quantize_blockwise(torch.randn(3, 64).double(), nf4_code(), 64)[0].numel() == 96


def test_an_empty_weight_has_no_codes(kernels):
    codes, absmax = kernels.quantize_blockwise(torch.empty(0, 64), nf4_code(), 64)
    assert codes.numel() == absmax.numel() == 0
    out = torch.empty(0, 64)
    assert kernels.dequantize_blockwise(FourBit(codes, absmax, nf4_code(), (0, 64)), out) is out


def test_calls_from_several_python_threads_do_not_share_scratch_memory(kernels):
    stored = stored_of((40, 320), 64, "nf4", 8, double=False)
    stored = FourBit(stored.codes, torch.ones(200), stored.quant_map, (40, 320))
    xs = [torch.randn(1 + i % 16, 320, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    alone = [kernels.few_rows(x, stored) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: kernels.few_rows(x, stored), xs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def broken(stored: FourBit, **changes) -> FourBit:
    return FourBit(**{**vars(stored), **changes})


def test_a_weight_whose_tensors_have_other_sizes_or_types_is_refused_before_it_is_read(kernels):
    stored, double = (stored_of((6, 96), 64, "nf4", 3, double=double) for double in (False, True))
    nested = double.nested
    short = type(nested)(nested.absmax[:0], nested.offset, nested.quant_map, nested.block)
    for wrong in (
        broken(stored, codes=stored.codes[:-1]),
        broken(stored, codes=stored.codes.to(torch.int8)),
        broken(stored, absmax=stored.absmax[:-1]),
        broken(stored, absmax=stored.absmax.half()),
        broken(stored, absmax=stored.absmax.repeat_interleave(2)[::2]),
        broken(stored, quant_map=stored.quant_map[:8]),
        broken(stored, nested=nested),
        broken(double, nested=short),
    ):
        with pytest.raises(ModelError, match=r"a 4-bit weight of shape \(6, 96\) .* expected 288 and 9 on the CPU"):
            kernels.dequantize_blockwise(wrong, torch.empty(6, 96))


def test_rows_outside_the_weight_are_refused(kernels):
    stored = stored_of((6, 96), 64, "nf4", 3, double=False)
    for first in (-1, 4):
        with pytest.raises(IndexError, match="of a weight of 576"):
            kernels.dequantize_rows(stored, first, torch.empty(3, 96))


# ---- the library itself


@pytest.fixture(scope="module")
def here() -> Library:
    try:
        return Library()
    except NativeMissing as missing:
        pytest.skip(str(missing))


def test_the_best_path_of_this_cpu_is_taken_and_any_can_be_asked_for(here, monkeypatch):
    assert here.name == runnable(here.handle)[0]
    monkeypatch.setenv("LOFI_ISA", "plain")
    found, _ = native.load_native()
    assert found is not None and found.name == "native plain"


def test_a_path_that_this_cpu_does_not_run_is_refused_by_name(here, monkeypatch):
    absent = next(name for name in ISAS if name not in runnable(here.handle))
    monkeypatch.setenv("LOFI_ISA", absent)
    with pytest.raises(RequestError, match=f"LOFI_ISA is '{absent}', which this CPU does not run; it runs .*plain"):
        native.load_native()


def test_a_misspelt_path_is_refused_with_the_paths_that_there_are(here):
    with pytest.raises(RequestError, match=r"LOFI_ISA is 'avx51', expected one of .*plain"):
        Library(isa="avx51")


def test_a_library_of_another_version_is_refused(here, monkeypatch):
    monkeypatch.setattr(library, "ABI", 1)  # an older library and its module agreed on this one
    with pytest.raises(NativeMissing, match=r"another version of lofi \(interface 2, expected 1\); reinstall lofi"):
        Library()
    assert native.load_native()[0] is None


def test_a_file_that_is_no_library_is_refused(tmp_path):
    file = tmp_path / "_native.so"
    file.write_bytes(b"not one")
    with pytest.raises(NativeMissing, match=r"cannot be loaded .*; reinstall lofi"):
        Library(file=file)


def test_a_missing_library_says_what_the_installation_noted(tmp_path):
    with pytest.raises(NativeMissing, match=r"there is no .*; reinstall lofi \(a C\+\+ compiler is needed\)"):
        Library(file=tmp_path / "_native.so")
    (tmp_path / "_native.absent").write_text("no C++ compiler was found\n", encoding="utf-8")
    with pytest.raises(NativeMissing, match=r"not built when lofi was installed: no C\+\+ compiler was found$"):
        Library(file=tmp_path / "_native.so")


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings no OpenMP runtime to be found by name here")
def test_the_threads_are_torchs_own(here):
    assert here.handle.lofi_shares_threads() == 1


WITHOUT_TORCH = """
import ctypes, sys, numpy as np
native = ctypes.CDLL(sys.argv[1])
count = 100_001
codes = np.random.default_rng(0).integers(0, 256, count // 2 + 1, dtype=np.uint8)
absmax, map_ = np.ones(count // 64 + 1, dtype=np.float32), np.arange(16, dtype=np.float32)
out = np.full(count, -1, dtype=np.float32)
at = lambda array: ctypes.c_void_p(array.ctypes.data)
wide = ctypes.c_int64
weight = at(codes), at(absmax), None, None, None, at(map_), wide(64), wide(0)
done = native.lofi_nf4_dequantize(*weight, wide(0), wide(count), at(out), 0, 0, 3)
assert done == 0 and native.lofi_shares_threads() == 0, done
assert (out[::2] == codes >> 4).all() and (out[1::2] == (codes & 15)[:-1]).all()
"""


def test_without_an_openmp_runtime_threads_of_its_own_do_the_same(here):
    file: Path = FOLDER / "_native.so"
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
