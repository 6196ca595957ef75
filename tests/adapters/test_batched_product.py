"""The product of many adapters in plain torch, against each row multiplied by itself in float64."""

from __future__ import annotations

import pytest
import torch

from lofi.adapters import batched_product
from lofi.adapters.batched_product import PLAIN, reference
from lofi.errors import ModelError

S, R, I, O, M = 5, 7, 37, 23, 60  # noqa: E741


def drawn(dtype=torch.float32, seed=0):
    """(x, a, b, ranks, slots, out): ranks from 0 to R, slots that come in runs and alone, some of none."""
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(S, R, n, generator=random).to(dtype) for n in (I, O))
    ranks = torch.tensor([7, 1, 0, 3, 7], dtype=torch.int32)
    slots = torch.randint(-1, S, (M,), generator=random, dtype=torch.int32)
    slots[10:25], slots[40:44] = 3, -1
    return (
        torch.randn(M, I, generator=random).to(dtype),
        a,
        b,
        ranks,
        slots,
        torch.randn(M, O, generator=random).to(dtype),
    )


def one_at_a_time(x, a, b, ranks, slots, out):
    rows = out.double()
    for m, s in enumerate(slots.tolist()):
        if s >= 0:
            r = int(ranks[s])
            rows[m] += (x[m].double() @ a[s, :r].double().t()) @ b[s, :r].double()
    return rows


@pytest.mark.parametrize("gathered", [1, 7000, 1 << 22])
def test_each_row_goes_through_the_factors_of_its_own_slot(gathered, monkeypatch):
    monkeypatch.setattr(batched_product, "GATHERED", gathered)
    x, a, b, ranks, slots, out = drawn()
    wanted = one_at_a_time(x, a, b, ranks, slots, out)
    reference(x, a, b, ranks, slots, out)
    assert bool(((out - wanted).abs() <= 1e-6 * wanted.abs().max()).all())


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 2**-50)])
def test_only_the_result_is_rounded(dtype, unit):
    given = drawn(dtype)
    wanted = one_at_a_time(*given)
    reference(*given)
    off, small = (given[5].double() - wanted).abs(), 1e-6 if dtype != torch.float64 else 1e-14
    assert bool((off <= unit * wanted.abs() + small * wanted.abs().max()).all()) and given[5].dtype == dtype


def test_rows_may_have_any_shape_and_out_is_written_in_place():
    x, a, b, ranks, slots, out = drawn()
    wanted = one_at_a_time(x, a, b, ranks, slots, out)
    wide = torch.zeros(M, O + 5)
    wide[:, 2:-3] = out
    PLAIN.prepare(a, b, ranks)(x.view(4, 15, I), slots, wide.view(4, 15, O + 5)[..., 2:-3])
    torch.testing.assert_close(wide[:, 2:-3].double(), wanted, rtol=1e-5, atol=1e-5)
    assert not wide[:, :2].any() and not wide[:, -3:].any()


def test_what_no_row_uses_has_no_effect_even_where_it_is_no_number():
    x, a, b, ranks, slots, out = drawn()
    wanted = one_at_a_time(x, a, b, ranks, slots, out)
    for stack in (a, b):
        stack[1, 1:] = stack[2] = stack[3, 3:] = float("nan")
    x[slots == -1] = float("inf")
    reference(x, a, b, ranks, slots, out)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slot", [-2, S, 1 << 30])
def test_a_slot_that_there_is_not_is_refused_before_anything_is_written(slot):
    x, a, b, ranks, slots, out = drawn()
    slots[-1], before = slot, out.clone()
    with pytest.raises(IndexError, match="of a bank of 5, expected -1 to 4"):
        reference(x, a, b, ranks, slots, out)
    assert torch.equal(out, before)


@pytest.mark.parametrize("rank", [-1, R + 1])
def test_a_rank_that_there_is_no_room_for_is_refused_if_a_row_has_it(rank):
    x, a, b, ranks, slots, out = drawn()
    ranks[2] = rank
    with pytest.raises(IndexError, match="of a bank with room for 7"):
        reference(x, a, b, ranks, slots, out)
    reference(x, a, b, ranks, slots.where(slots != 2, 0), out)


def test_stacks_that_do_not_belong_together_are_refused_with_what_they_are():
    _, a, b, ranks, *_ = drawn()
    for bad in (
        (a[:4], b, ranks), (a[:, :6].contiguous(), b, ranks), (a, b.double(), ranks), (a, b, ranks.long()),
        (a, b, ranks[:4]), (a[:, :, :-1], b, ranks), (a[0], b[0], ranks), (a.int(), b.int(), ranks),
        (a[:0], b[:0], ranks[:0]),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"stacked factors are \(.*expected contiguous \(S, R, I\)"):
            PLAIN.prepare(*bad)


def test_rows_that_the_stacks_do_not_multiply_are_refused_with_what_they_are():
    x, a, b, ranks, slots, out = drawn()
    call = PLAIN.prepare(a, b, ranks)
    for bad in (
        (x[:, :-1], slots, out), (x, slots[:-1], out), (x, slots, out[:-1]), (x.double(), slots, out),
        (x, slots.long(), out), (x, slots.view(4, 15), out), (x, slots, out.double()),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"expected \(\.\.\., 37\), int32 \(M,\) and \(\.\.\., 23\)"):
            call(*bad)
