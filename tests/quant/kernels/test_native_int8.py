"""LLM.int8() in C++ against the reference, on each path that this CPU runs: codes bit-equal, sums within bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lofi.errors import ModelError
from lofi.quant.kernels import native_int8
from lofi.quant.kernels.library import Library, NativeMissing, runnable
from lofi.quant.kernels.native_int8 import NativeInt8
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.storage import EightBit, RowCodes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
examples = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from(DTYPES)
thresholds = st.sampled_from([0.0, 6.0, 6.0, 2.013, 1e-30])  # 2.013 is none of the 16-bit types' numbers
seeds = st.integers(0, 2**31)
sizes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 150)),  # M, O, I
    st.sampled_from([(1, 130, 64), (33, 200, 77), (259, 9, 65), (5, 70, 2113), (40, 131, 4097), (2, 17, 2048)]),
)


def draw(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Entries with outliers in some columns and in some places, rows of zeros, a row of another magnitude."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random)
    x[:, torch.rand(width, generator=random) < 0.05] *= 40
    x[torch.rand(rows, width, generator=random) < 0.01] *= -30
    x[torch.rand(rows, generator=random) < 0.1] = 0
    x[torch.rand(rows, generator=random) < 0.1] *= 1e-6
    return x.to(dtype)


def random_codes(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def same(ours: RowCodes, theirs: RowCodes) -> bool:
    pairs = zip(vars(ours).values(), vars(theirs).values(), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@examples
@given(size=sizes, dtype=dtypes, threshold=thresholds, seed=seeds)
def test_codes_scales_and_outliers_of_activations_are_the_references(kernels, threads, size, dtype, threshold, seed):
    x = draw(size[0], size[2], dtype, seed)
    assert same(kernels.quantize_rows(x, threshold), REFERENCE.quantize_rows(x, threshold))


@examples
@given(size=sizes, dtype=dtypes, to=dtypes, seed=seeds)
def test_weights_are_coded_and_given_back_to_the_bit(kernels, threads, size, dtype, to, seed):
    weight = draw(size[1], size[2], dtype, seed)
    ours, theirs = kernels.quantize_weight_rows(weight), REFERENCE.quantize_weight_rows(weight)
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)
    back = [k.dequantize_int8(ours, torch.empty(weight.shape, dtype=to)) for k in (kernels, REFERENCE)]
    assert torch.equal(*back) and back[0].dtype == to


@examples
@given(size=sizes, seed=seeds)
def test_the_integer_part_of_a_product_is_exact(kernels, threads, size, seed):
    """With scales of 127 the result is the integer sums themselves, which float32 holds below 2^24."""
    m, o, i = size
    codes, weight = random_codes(m, i, seed=seed), random_codes(o, i, seed=seed + 1)
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(m, 0)
    rows = RowCodes(codes, torch.full((m,), 127.0), *nothing)
    y = kernels.int8_product(rows, EightBit(weight, torch.full((o,), 127.0)), torch.float32)
    exact = codes.long() @ weight.long().t()
    unit = torch.tensor(127.0) * torch.tensor(1 / 127)  # what the scales come to: 1, or next to it
    assert torch.equal(y, exact.float() * unit * unit)


def test_the_largest_sums_there_can_be_are_exact(kernels):
    """Codes of 127 against 127 and -128 saturate 16-bit sums of four, where a kernel has those."""
    for x, w in ((127, 127), (127, -128), (-127, -128), (-127, 127)):
        rows = RowCodes(torch.full((3, 1000), x, dtype=torch.int8), torch.full((3,), 127.0), *no_outliers(3))
        y = kernels.int8_product(
            rows, EightBit(torch.full((9, 1000), w, dtype=torch.int8), torch.full((9,), 127.0)), torch.float32
        )
        assert bool((y - 1000.0 * x * w).abs().max() <= abs(1000.0 * x * w) * 2**-22)


def no_outliers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, dtype=torch.int64), torch.empty(rows, 0)


@examples
@given(size=sizes, dtype=dtypes, threshold=thresholds, seed=seeds)
def test_a_product_is_the_references_within_its_sums_rounding(kernels, threads, size, dtype, threshold, seed):
    m, o, i = size
    rows = REFERENCE.quantize_rows(draw(m, i, dtype, seed), threshold)
    stored = REFERENCE.quantize_weight_rows(draw(o, i, torch.float32, seed + 1))
    y, expected = kernels.int8_product(rows, stored, torch.float32), REFERENCE.int8_product(rows, stored, torch.float32)
    apart = (
        rows.outliers.float().abs() @ (stored.codes[:, rows.columns].float().abs() * stored.scale[:, None] / 127).t()
    )
    bound = 1e-6 * expected.abs() + 2.0**-22 * (len(rows.columns) + 1) * apart
    assert bool(((y - expected).abs() <= bound).all())
    if dtype != torch.float32:  # rounded once from the same float32
        assert torch.equal(kernels.int8_product(rows, stored, dtype), y.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_its_neighbours(kernels, dtype):
    stored = REFERENCE.quantize_weight_rows(draw(75, 130, torch.float32, 1))
    x = draw(35, 130, dtype, 2)
    together = kernels.int8_product(kernels.quantize_rows(x, 6.0), stored, dtype)
    alone = torch.cat([kernels.int8_product(kernels.quantize_rows(row[None], 6.0), stored, dtype) for row in x])
    assert torch.equal(together, alone) and len(kernels.quantize_rows(x, 6.0).columns) > 3


def test_planted_outliers_cost_a_fifteenth_of_what_they_cost_plain_int8(kernels):
    """Seven columns at 60 times the others, against the product with the dequantized weight."""
    stored = kernels.quantize_weight_rows(draw(120, 256, torch.float32, 3))
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    x[:, torch.randperm(256, generator=torch.Generator().manual_seed(5))[:7]] *= 60
    exact = x @ REFERENCE.dequantize_int8(stored, torch.empty(120, 256)).t()
    apart, plain = (
        (kernels.int8_product(kernels.quantize_rows(x, t), stored, torch.float32) - exact).abs().mean().item()
        for t in (6.0, 0.0)
    )
    assert 0 < apart <= plain / 15


def test_rows_of_outliers_alone_are_the_product_with_the_dequantized_weight(kernels):
    stored = kernels.quantize_weight_rows(draw(67, 193, torch.float32, 6))
    x = torch.full((5, 193), 50.0).bfloat16()
    x[2] = 0
    y = kernels.int8_product(kernels.quantize_rows(x, 6.0), stored, torch.float32)
    exact = x.double() @ REFERENCE.dequantize_int8(stored, torch.empty(67, 193)).double().t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    assert not y[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_contiguous_are_read_where_they_are(kernels, dtype):
    wide = draw(40, 3 * 70, dtype, 7)
    for x in (wide[:, 70:140], wide[::3, :70], wide.t()[:70], wide[:1, :70].expand(6, 70), wide[:0], wide[:, :1]):
        assert same(kernels.quantize_rows(x, 6.0), REFERENCE.quantize_rows(x, 6.0))


def test_a_value_that_is_no_number_shows_in_its_row_and_in_no_other(kernels):
    stored = kernels.quantize_weight_rows(draw(19, 70, torch.float32, 8))
    clean = draw(4, 70, torch.float32, 9)
    x = clean.clone()
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y, expected = (kernels.int8_product(kernels.quantize_rows(v, 6.0), stored, torch.float32) for v in (x, clean))
    assert bool(y[1].isnan().all()) and not bool(y[2].isfinite().any())
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_infinities_and_numbers_too_small_to_divide_by_are_coded_as_the_reference_does(kernels, threshold):
    x = torch.zeros(6, 70)
    x[0, 3], x[1, 4], x[2, 5], x[3, 6] = float("inf"), float("nan"), 1e-45, -1e-39
    x[4], x[5] = torch.linspace(-2e-38, 2e-38, 70), torch.linspace(-3e38, 3e38, 70)
    ours, theirs = kernels.quantize_rows(x, threshold), REFERENCE.quantize_rows(x, threshold)
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.columns, theirs.columns)
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0, atol=0, equal_nan=True)


def test_sums_made_by_torch_give_the_same_bits_as_the_librarys_own(kernels):
    rows = kernels.quantize_rows(draw(70, 300, torch.bfloat16, 10), 6.0)
    stored = kernels.quantize_weight_rows(draw(150, 300, torch.float32, 11))
    before, both = kernels._sums_elsewhere, []
    for kernels._sums_elsewhere in (float("inf"), 1):
        both.append(kernels.int8_product(rows, stored, torch.bfloat16))
    kernels._sums_elsewhere = before
    assert torch.equal(*both)


def test_many_rows_go_to_torch_only_with_amx_or_without_byte_products(monkeypatch):
    try:
        paths = {name: Library(isa=name) for name in runnable(Library().handle)}
    except NativeMissing as missing:
        pytest.skip(str(missing))
    for amx in (True, False):
        monkeypatch.setattr(native_int8, "has_amx", lambda amx=amx: amx)
        for name, library in paths.items():
            elsewhere = NativeInt8(library)._sums_elsewhere == native_int8.MANY
            assert elsewhere == (name in ("plain", "neon") or (amx and name == "avx512_bf16"))


def test_types_that_the_library_does_not_know_take_the_reference(kernels):
    x = draw(3, 20, torch.float64, 12)
    stored = kernels.quantize_weight_rows(x)
    rows = kernels.quantize_rows(x, 6.0)
    assert same(rows, REFERENCE.quantize_rows(x, 6.0)) and stored.codes.dtype == torch.int8
    assert kernels.int8_product(rows, stored, torch.float64).dtype == torch.float64
    assert kernels.dequantize_int8(stored, torch.empty(3, 20, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("wrong", ["codes", "scale", "kind"])
def test_a_weight_of_the_wrong_size_is_refused_before_c_reads_it(kernels, wrong):
    codes, scale = torch.zeros(8, 20, dtype=torch.int8), torch.ones(8)
    bad = {
        "codes": EightBit(codes[:, :19], scale),
        "scale": EightBit(codes, scale[:7]),
        "kind": EightBit(codes.to(torch.uint8), scale),
    }[wrong]
    with pytest.raises(ModelError, match="expected int8 "):
        kernels.int8_product(kernels.quantize_rows(torch.ones(2, 20), 6.0), bad, torch.float32)
    with pytest.raises(ModelError, match="expected int8 "):
        kernels.dequantize_int8(bad, torch.empty(8, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_weights_are_the_peers(kernels, dtype):
    """bitsandbytes casts weights to half first: codes and scales of what half holds are equal to the bit."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(53, 77, torch.float32, 13).half().to(dtype)
    weight = weight.half().to(dtype)  # values that both types hold
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    ours = kernels.quantize_weight_rows(weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.scale, scale.float())


def test_a_linear_is_the_peers_within_the_half_precision_that_it_computes_in(kernels):
    """In half, with outliers in whole columns (so that both take out the same entries)."""
    peer = pytest.importorskip("bitsandbytes")
    random = torch.Generator().manual_seed(14)
    x, weight = torch.randn(7, 130, generator=random), torch.randn(45, 130, generator=random) / 11
    x[:, [3, 50, 90]] = 20 + x[:, [3, 50, 90]]
    x = x.half()
    stored = kernels.quantize_weight_rows(weight.half())
    state = peer.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = stored.codes, stored.scale, 6.0, False
    theirs = peer.matmul(x, stored.codes, state=state, threshold=6.0).float()
    ours = kernels.int8_product(kernels.quantize_rows(x, 6.0), stored, torch.float32)
    # two roundings of theirs to half, of the sums and of the outliers' product, and of each weight of that product
    bound = 3 * 2.0**-11 * (theirs.abs() + x[:, [3, 50, 90]].abs().float().sum(1, keepdim=True) * weight.abs().max())
    assert bool(((ours - theirs).abs() <= bound).all()) and not torch.equal(ours, theirs)
