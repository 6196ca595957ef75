"""The product of many adapters in C++ against float64, on each path that this CPU runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lofi.adapters.batched_product import PLAIN, reference
from lofi.errors import ModelError, RequestError
from lofi.quant.kernels import dispatch
from lofi.quant.kernels.dispatch import low_rank_for
from lofi.quant.kernels.library import ISAS, Library
from lofi.quant.kernels.low_rank_native import LONGEST, NativeLowRank

UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from(list(UNITS))
seeds = st.integers(0, 2**31)
sizes = st.one_of(
    st.tuples(*(st.integers(1, most) for most in (70, 20, 70, 70, 60))),  # S, R, I, O, M
    st.sampled_from([(3, 64, 96, 160, 70), (70, 8, 130, 67, 90), (2, 16, 300, 33, 300), (4, 1, 513, 129, 9)]),
)


@pytest.fixture(scope="module")
def product(kernels) -> NativeLowRank:
    return NativeLowRank(Library(isa=ISAS[kernels._isa]))


def drawn(size, dtype, seed):
    """(x, a, b, ranks, slots, out): ranks from 0 to R, -1 among the slots, which come in runs of random length."""
    S, R, I, O, M = size  # noqa: E741
    random = torch.Generator().manual_seed(seed)
    a, b, x, out = (torch.randn(n, generator=random).to(dtype) for n in ((S, R, I), (S, R, O), (M, I), (M, O)))
    ranks = torch.randint(0, R + 1, (S,), generator=random, dtype=torch.int32)
    ranks[0] = R
    slots = torch.randint(-1, S, (M,), generator=random, dtype=torch.int32)
    lengths = torch.randint(1, 2 + seed % 40, (M,), generator=random)
    return x, a, b, ranks, slots.repeat_interleave(lengths)[:M].contiguous(), out


def exact(x, a, b, ranks, slots, out):
    """(the result, the magnitudes that its rounding scales with), both in float64."""
    wide = [t.double() for t in (x, a, b)]
    result, size = out.double(), out.double().abs()
    reference(*wide, ranks, slots, result)
    reference(*(t.abs() for t in wide), ranks, slots, size)
    return result, size


def within(found, wanted, size):
    return bool(((found.double() - wanted).abs() <= UNITS[found.dtype] * wanted.abs() + 1e-6 * size).all())


@examples
@given(size=sizes, dtype=dtypes, seed=seeds)
def test_every_row_is_multiplied_by_its_own_adapter_and_rounded_once(product, threads, size, dtype, seed):
    x, a, b, ranks, slots, out = drawn(size, dtype, seed)
    wanted = exact(x, a, b, ranks, slots, out)
    product.prepare(a, b, ranks)(x, slots, out)
    assert within(out, *wanted)


def test_a_product_that_rounds_between_the_factors_is_outside_that_bound():
    x, a, b, ranks, slots, out = drawn((3, 8, 70, 50, 20), torch.bfloat16, 1)
    slots[:] = 0
    wanted = exact(x, a, b, ranks, slots, out)
    out += (x.float() @ a[0].float().t()).bfloat16().float() @ b[0].float()
    assert not within(out, *wanted)


@examples
@given(size=sizes, dtype=dtypes, seed=seeds)
def test_a_row_has_the_same_bits_alone_and_in_any_company(product, threads, size, dtype, seed):
    x, a, b, ranks, slots, out = drawn(size, dtype, seed)
    call, alone = product.prepare(a, b, ranks), out.clone()
    for m in range(len(x)):
        call(x[m : m + 1], slots[m : m + 1], alone[m : m + 1])
    call(x, slots, out)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("dtype", UNITS)
def test_two_threads_give_the_bits_that_one_gives(product, dtype):
    x, a, b, ranks, slots, out = drawn((5, 32, 260, 170, 301), dtype, 2)  # enough for a second thread
    call, results, before = product.prepare(a, b, ranks), [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(out.clone())
        call(x, slots, results[-1])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", UNITS)
def test_what_no_row_uses_has_no_effect_even_where_it_is_no_number(product, dtype):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), dtype, 3)
    ranks[:] = torch.tensor([9, 1, 0, 3, 8, 9])
    slots[slots == 5], clean = -1, out.clone()
    product.prepare(a, b, ranks)(x, slots, clean)
    for stack in (a, b):
        stack[1, 1:] = stack[2] = stack[3, 3:] = stack[4, 8:] = stack[5] = float("nan")
    x[slots == -1] = float("nan")
    product.prepare(a, b, ranks)(x, slots, out)
    assert bool(out.isfinite().all()) and torch.equal(out, clean)


def test_a_value_that_is_no_number_shows_in_its_row_and_in_no_other(product):
    x, a, b, ranks, slots, out = drawn((2, 5, 45, 31, 40), torch.float32, 4)
    ranks[:], slots[:] = 5, 0
    slots[20:] = 1
    clean, call = out.clone(), product.prepare(a, b, ranks)
    call(x, slots, clean)
    x[3, 7], a[1, 4, 40] = float("nan"), float("inf")
    call(x, slots, out)
    assert bool(out[3].isnan().all()) and not bool(out[20:].isfinite().any())
    assert torch.equal(out[[0, 1, 2, *range(4, 20)]], clean[[0, 1, 2, *range(4, 20)]])


def test_rows_without_an_adapter_keep_their_bits(product):
    x, a, b, ranks, slots, _ = drawn((3, 5, 45, 31, 40), torch.float32, 5)
    ranks[2] = 0
    slots[:] = torch.arange(40) % 2 * 3 - 1  # -1 and 2
    out = torch.full((40, 31), -0.0)
    product.prepare(a, b, ranks)(x, slots, out)
    assert bool(out.signbit().all())


@pytest.mark.parametrize("wrong", [-2, 6, -(1 << 31), (1 << 31) - 1])
def test_a_slot_that_there_is_not_is_refused_before_anything_is_written(product, threads, wrong):
    """The stacks are the middle of larger ones, so that a slot beyond them would find factors and a rank there."""
    x, a, b, ranks, slots, out = drawn((8, 9, 45, 31, 50), torch.float32, 6)
    ranks[:], slots[:] = 9, 0
    before, slots[-1] = out.clone(), wrong
    with pytest.raises(IndexError, match="of a bank of 6, expected -1 to 5"):
        product.prepare(a[2:], b[2:], ranks[2:])(x, slots, out)
    with pytest.raises(IndexError, match="of a bank of 6, expected -1 to 5"):
        product.prepare(a[:6], b[:6], ranks[:6])(x, slots, out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("wrong", [-1, 10, -(1 << 31), (1 << 31) - 1])
def test_a_rank_that_there_is_no_room_for_is_refused_before_anything_is_written(product, wrong):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), torch.float32, 7)
    before, slots[30], ranks[4] = out.clone(), 4, wrong
    with pytest.raises(IndexError, match="of a bank with room for 9"):
        product.prepare(a, b, ranks)(x, slots, out)
    assert torch.equal(out, before)


def test_what_is_written_into_the_stacks_counts_from_the_next_call_on(product):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), torch.float32, 8)
    call = product.prepare(a, b, ranks)
    call(x, slots, out.clone())
    a[3], b[3], ranks[3] = 2.0, 0.5, 9
    slots[::2] = 3
    wanted = exact(x, a, b, ranks, slots, out)
    call(x, slots, out)
    assert within(out, *wanted)


def laid_out(out):
    """(a name, out in another layout, the memory around it)."""
    rows, outputs = out.shape
    wide = torch.full((rows, outputs + 5), 7.0, dtype=out.dtype)
    yield "columns of a wider one", wide[:, 2:-3], wide
    high = torch.full((3 * rows, outputs), 7.0, dtype=out.dtype)
    yield "every third row", high[::3], high
    turned = torch.full((outputs, rows + 2), 7.0, dtype=out.dtype)
    yield "transposed", turned[:, 1:-1].t(), turned
    deep = torch.full((5, rows // 5 + 1, outputs + 1), 7.0, dtype=out.dtype)
    yield "three dimensions with gaps", deep[:, :-1, :-1], deep


@pytest.mark.parametrize("dtype", UNITS)
def test_rows_that_are_not_in_one_piece_are_read_and_written_where_they_are(product, dtype):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), dtype, 9)
    call, wanted = product.prepare(a, b, ranks), out.clone()
    call(x, slots, wanted)
    for name, target, around in laid_out(out):
        target.copy_(out.view(target.shape))
        call(x, slots, target)
        assert torch.equal(target.reshape(out.shape), wanted), name
        target.fill_(7.0)
        assert bool((around == 7).all()), name
    strided = torch.stack([slots, slots], 1)[:, 0]
    for rows in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, 45:], x.view(10, 5, 45)):
        found = out.clone()
        call(rows, strided, found)
        assert torch.equal(found, wanted)


def test_no_rows_and_stacks_of_no_rank_are_no_work(product):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), torch.float32, 10)
    product.prepare(a, b, ranks)(x[:0], slots[:0], out[:0])
    before = out.clone()
    product.prepare(a[:, :0].contiguous(), b[:, :0].contiguous(), torch.zeros_like(ranks))(x, slots, out)
    assert torch.equal(out, before)


def test_rows_and_stacks_that_do_not_belong_together_are_refused_before_c_reads_them(product):
    x, a, b, ranks, slots, out = drawn((6, 9, 45, 31, 50), torch.float32, 11)
    call = product.prepare(a, b, ranks)
    for bad in (
        (x[:, :-1], slots, out), (x[:-1], slots, out), (x, slots[:-1], out), (x, slots, out[:, 1:]),
        (x.bfloat16(), slots, out), (x, slots.long(), out), (x, slots, out.double()), (x.to("meta"), slots, out),
        (x.view(45, 50), slots, out), (x, slots, out.view(31, 50)), (x, slots.to("meta"), out),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="expected "):
            call(*bad)
    with pytest.raises(ModelError, match="stacked factors"):
        product.prepare(a, b[:, :8].contiguous(), ranks)


def test_what_the_library_does_not_do_goes_to_the_reference(product):
    x, a, b, ranks, slots, out = drawn((3, 5, 11, 9, 20), torch.float64, 12)
    wanted = exact(x, a, b, ranks, slots, out)[0]
    product.prepare(a, b, ranks)(x, slots, out)
    assert torch.equal(out, wanted)
    x, a, b, ranks, slots, out = drawn((2, LONGEST + 1, 3, 2, 4), torch.float32, 13)
    ours = out.clone()
    product.prepare(a, b, ranks)(x, slots, ours)
    reference(x, a, b, ranks, slots, out)
    assert torch.equal(ours, out)


def test_the_most_ranks_that_the_library_holds_are_multiplied(product):
    x, a, b, ranks, slots, out = drawn((2, LONGEST, 5, 7, 6), torch.float32, 14)
    slots[:4] = 0
    wanted = exact(x, a, b, ranks, slots, out)
    product.prepare(a, b, ranks)(x, slots, out)
    assert within(out, *wanted)


def test_a_row_that_wants_a_gradient_gets_it(product):
    x, a, b, ranks, slots, out = drawn((3, 5, 11, 9, 20), torch.float32, 15)
    x.requires_grad_()
    y = out.clone()
    product.prepare(a, b, ranks)(x, slots, y)
    (found,) = torch.autograd.grad(y.sum(), x)
    y = out.clone()
    reference(x, a, b, ranks, slots, y)
    assert torch.equal(found, torch.autograd.grad(y.sum(), x)[0]) and bool(found.any())


def test_the_product_is_chosen_as_other_kernels_are(product, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("LOFI_KERNELS", "plain")
    assert low_rank_for(cpu) is PLAIN
    monkeypatch.setenv("LOFI_KERNELS", "native")
    assert low_rank_for(cpu).name.startswith("native ")
    monkeypatch.delenv("LOFI_KERNELS")
    assert low_rank_for(cpu).name.startswith("native ") and low_rank_for(torch.device("meta")) is PLAIN
    monkeypatch.setattr(dispatch, "_native_low_rank", lambda: (None, "it was not built"))
    dispatch._low_rank.cache_clear()
    assert low_rank_for(cpu) is PLAIN
    monkeypatch.setenv("LOFI_KERNELS", "native")
    with pytest.raises(RequestError, match="native kernels, but it was not built"):
        low_rank_for(cpu)
    dispatch._low_rank.cache_clear()
