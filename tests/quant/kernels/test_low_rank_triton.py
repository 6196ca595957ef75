"""The product of many adapters in Triton against float64: on a GPU where there is one, else in Triton's interpreter.

The interpreter cuts a float32 to bfloat16 where a GPU rounds it, and multiplies no matrices of bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from lofi.adapters.batched_product import PLAIN, reference
from lofi.errors import ModelError
from lofi.quant.kernels import low_rank_triton
from lofi.quant.kernels.dispatch import _low_rank
from lofi.quant.kernels.low_rank_triton import MANY, load_low_rank

UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FEW = [(1, 1, 1, 1, 1), (7, 3, 700, 33, 9), (4, 8, 50, 900, 20), (3, 17, 40, 30, 40), (70, 64, 33, 77, 12)]
PROMPTS = [(3, 5, 300, 140, MANY), (2, 20, 30, 31, MANY + 3), (1, 1, 129, 1, MANY + 17)]  # S, R, I, O, M


@pytest.fixture(scope="module")
def product(backend):
    """(the product, device)."""
    found, reason = load_low_rank(backend[1].type)
    assert found is not None, reason
    return found, backend[1]


def drawn(size, dtype, device):
    """(x, a, b, ranks, slots, out): ranks from 0 to R, of which R occurs; what is beyond them is NaN; runs of slots."""
    S, R, I, O, M = size  # noqa: E741
    random = torch.Generator().manual_seed(sum(size))
    a, b, x, out = (torch.randn(n, generator=random).to(dtype) for n in ((S, R, I), (S, R, O), (M, I), (M, O)))
    ranks = torch.randint(0, R + 1, (S,), generator=random, dtype=torch.int32)
    ranks[0] = R
    for s in range(S):
        a[s, ranks[s] :] = b[s, ranks[s] :] = float("nan")
    slots = torch.randint(-1, S, (M,), generator=random, dtype=torch.int32)
    slots[: M // 2 + 1] = slots[: M // 2 + 1].sort().values
    slots[0] = 0
    return tuple(t.to(device) for t in (x, a, b, ranks, slots, out))


def within(given, call, *, unit=None):
    """Whether the call's result is exact but for sums in float32 and one rounding."""
    x, a, b, ranks, slots, out = given
    wide, (wanted, size) = [t.double() for t in (x, a, b)], (out.double(), out.double().abs())
    reference(*wide, ranks, slots, wanted)
    reference(*(t.abs() for t in wide), ranks, slots, size)
    call(x, slots, out)
    bound = UNITS[out.dtype] if unit is None else unit
    return bool(((out.double() - wanted).abs() <= bound * wanted.abs() + 1e-6 * size).all())


@pytest.mark.parametrize("size", [*FEW, *PROMPTS])
@pytest.mark.parametrize("dtype", UNITS)
def test_every_row_is_multiplied_by_its_own_adapter_and_rounded_once(size, dtype, product):
    kernels, device = product
    cuts = device.type == "cpu" and dtype == torch.bfloat16
    if cuts and size[4] >= MANY:
        pytest.skip("the interpreter multiplies no matrices of bfloat16")
    given = drawn(size, dtype, device)
    assert within(given, kernels.prepare(*given[1:4]), unit=2.0**-7 if cuts else None)


@pytest.mark.parametrize("size", [(3, 6, 3000, 30, 5), (2, 6, 700, 30, MANY)])
def test_sums_in_splits_of_the_inputs_are_the_same_product(size, product, monkeypatch):
    kernels, device = product
    splits = []

    def many(tiles, inputs, tile, device):
        splits.append(-(-inputs // tile))
        return splits[-1], tile

    monkeypatch.setattr(low_rank_triton, "split_columns", many)
    given = drawn(size, torch.float32, device)
    assert within(given, kernels.prepare(*given[1:4])) and splits[0] >= 3


@pytest.mark.parametrize("size", [FEW[1], PROMPTS[1]])
def test_rows_of_no_slot_or_of_one_that_there_is_not_are_left_alone(size, product):
    kernels, device = product
    x, a, b, ranks, slots, out = drawn(size, torch.float32, device)
    slots[1:6], slots[6:] = torch.tensor([-1, -2, size[0], 1 << 30, -(1 << 31)], dtype=torch.int32), 0
    x[1:6] = float("nan")
    before = out.clone()
    kernels.prepare(a, b, ranks)(x, slots, out)
    assert torch.equal(out[1:6], before[1:6]) and bool((out[6:] != before[6:]).any(1).all())
    assert bool(out.isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_adapter_that_is_no_number_shows_in_its_own_rows_only(product):
    kernels, device = product
    for rows in (9, MANY):
        x, a, b, ranks, slots, out = drawn((3, 4, 40, 20, rows), torch.float32, device)
        ranks[:] = 4
        a[:], b[:], slots[:] = 1.0, 1.0, 0
        b[1], slots[2], slots[3] = float("inf"), 1, 2
        kernels.prepare(a, b, ranks)(x, slots, out)
        others = torch.tensor([m for m in range(rows) if m != 2], device=device)
        assert bool(out[others].isfinite().all()) and not bool(out[2].isfinite().any())


@pytest.mark.parametrize("rows", [20, MANY + 2])
def test_rows_that_are_not_in_one_piece_are_read_and_written_where_they_are(rows, product):
    kernels, device = product
    x, a, b, ranks, slots, out = drawn((3, 4, 40, 20, rows), torch.float32, device)
    call, wanted = kernels.prepare(a, b, ranks), out.clone()
    call(x, slots, wanted)
    wide = torch.full((2, rows // 2, 25), 7.0, device=device)
    wide[..., 2:22] = out.view(2, -1, 20)
    call(x.t().contiguous().t(), torch.stack([slots, slots], 1)[:, 0], wide[..., 2:22])
    assert torch.equal(wide[..., 2:22].reshape(rows, 20), wanted)
    assert bool((wide[..., :2] == 7).all()) and bool((wide[..., 22:] == 7).all())


def test_no_work_and_types_without_a_kernel(product):
    kernels, device = product
    x, a, b, ranks, slots, out = drawn((3, 4, 40, 20, 9), torch.float64, device)
    wanted = out.clone()
    reference(x, a, b, ranks, slots, wanted)
    kernels.prepare(a, b, ranks)(x, slots, out)
    assert torch.equal(out, wanted)
    a, b, x, out = (t.float() for t in (a, b, x, out))
    kernels.prepare(a, b, ranks)(x[:0], slots[:0], out[:0])
    before = out.clone()
    kernels.prepare(a[:, :0].contiguous(), b[:, :0].contiguous(), ranks * 0)(x, slots, out)
    assert torch.equal(out, before)
    with pytest.raises(ModelError, match="expected "):
        kernels.prepare(a, b, ranks)(x, slots[:-1], out)
    with pytest.raises(ModelError, match="stacked factors"):
        kernels.prepare(a, b[:, :3].contiguous(), ranks)


def test_a_device_without_triton_gets_plain_torch_or_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert load_low_rank("cpu") == (None, "the tensors are on cpu and Triton's kernels run on cuda")
    assert _low_rank.__wrapped__("mps", "") is PLAIN
