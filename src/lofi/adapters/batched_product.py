"""The product that many LoRA adapters in one batch come to: each row of x through the factors of its own slot.

Knows the arithmetic, in plain torch, and what a backend must offer (`LowRankProduct`); the kernels that compute the
same faster stand in quant/kernels, which adapters/ does not import: whoever makes a bank hands one in. Knows no
modules, no adapters and no slots' contents (batched.py).

Rejected: a loop over adapters with masks (PEFT's `adapter_names`: eight adapters take 2.25 times the base's time): a
step then costs with the adapters there are; sorting rows by slot first, which changes nothing that gathering needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lofi.errors import ModelError

GATHERED = 1 << 22
"""Numbers of A and B that `reference` gathers at once, at most (but for a single row's): 16 MB in float32."""

Bound = Callable[[Tensor, Tensor, Tensor], None]
"""(x (..., I), slots (M,) int32, out (..., O)) -> None, with M rows in x and out: adds each row's product to out."""


class LowRankProduct(Protocol):
    """A backend of the product: plain torch here, C++ and Triton in quant/kernels (dispatch.low_rank_for)."""

    name: str
    """What reports print, with the instruction set: "plain torch", "native avx512_bf16", "triton"."""

    def prepare(self, a: Tensor, b: Tensor, ranks: Tensor) -> Bound:
        """A call for these stacks, checked once: a (S, R, I), b (S, R, O) of one dtype, ranks (S,) int32, contiguous.

        The call reads the tensors anew each time, so what is written into them in place is what counts from then on;
        other tensors (a larger R, more slots) need another call. It keeps the three alive.

        Raises:
            ModelError: shapes, dtypes, devices or layouts that do not belong together.
        """
        ...


def reference(x: Tensor, a: Tensor, b: Tensor, ranks: Tensor, slots: Tensor, out: Tensor) -> None:
    """Add to each row of `out` the low-rank product of its slot, in place.

    Formula   out_m += (x_m A_s^T) B_s over the first ranks_s of R, s = slots_m; nothing where s is -1
              (LoRA, arXiv 2106.09685 section 4.1, with the scale folded into B; batched as S-LoRA, arXiv 2311.03285)
    Shapes    x (..., I), a (S, R, I), b (S, R, O), ranks (S,), slots (M,), out (..., O), M rows of x and of out
    Exact     sums in float32 (float64 for float64), x A^T is not rounded, out is rounded once
    Raises    IndexError: a slot outside -1 .. S - 1, or a rank beyond R, on a CPU; on other devices, where looking
              would wait for them, a row of no such slot gets nothing

    Ranks and slots that are not used are masked, not multiplied by 0: what they hold, NaN even, has no effect.
    """
    rows, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
    result = out.view(-1, out.shape[-1])  # (M, O), which must be a view: it is written to
    check_slots(slots, ranks, a.shape[1])
    size = max(1, GATHERED // max(1, a.shape[1] * (a.shape[2] + b.shape[2])))
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        slot = slots[part].long().clamp(0, len(a) - 1)
        kept = torch.arange(a.shape[1], device=a.device) < ranks[slot, None]  # (m, R)
        kept &= (slots[part] == slot)[:, None]
        left = a[slot].to(wide)  # (m, R, I)
        right = b[slot].to(wide).masked_fill_(~kept[:, :, None], 0)  # (m, R, O)
        hidden = torch.bmm(left, rows[part].to(wide)[:, :, None])[:, :, 0].masked_fill_(~kept, 0)  # (m, R)
        result[part].add_(torch.bmm(hidden[:, None], right)[:, 0])


def check_slots(slots: Tensor, ranks: Tensor, most: int) -> None:
    """Raises  IndexError: a slot outside -1 .. S - 1, or one whose rank is not in 0 .. most; looks on a CPU only."""
    if not slots.is_cpu or not slots.numel():
        return
    least, largest = (int(v) for v in slots.aminmax())
    if least < -1 or largest >= len(ranks):
        raise IndexError(f"slots from {least} to {largest} of a bank of {len(ranks)}, expected -1 to {len(ranks) - 1}")
    used = ranks[slots[slots >= 0].long()]
    if used.numel() and (used.min() < 0 or used.max() > most):
        raise IndexError(f"ranks from {int(used.min())} to {int(used.max())} of a bank with room for {most}")


def check_stacks(a: Tensor, b: Tensor, ranks: Tensor) -> None:
    """Raises  ModelError: stacks (see LowRankProduct.prepare) that do not belong together."""
    fits = a.ndim == b.ndim == 3 and a.shape[:2] == b.shape[:2] and ranks.shape == a.shape[:1] and len(a) > 0
    same = a.dtype == b.dtype and a.dtype.is_floating_point and a.device == b.device == ranks.device
    whole = a.is_contiguous() and b.is_contiguous() and ranks.is_contiguous()
    if not (fits and same and whole and ranks.dtype == torch.int32):
        raise ModelError(
            f"stacked factors are {_said(a)}, {_said(b)} and ranks {_said(ranks)}, expected contiguous (S, R, I) and "
            "(S, R, O) of one floating type with ranks (S,) of int32, on one device"
        )


def check_call(stacks: tuple[Tensor, Tensor, Tensor], x: Tensor, slots: Tensor, out: Tensor) -> None:
    """Raises  ModelError: rows that these stacks do not multiply."""
    a, b, _ = stacks
    rows = slots.numel()
    fits = x.shape[-1:] == a.shape[2:] and out.shape[-1:] == b.shape[2:] and slots.ndim == 1
    counted = x.numel() == rows * a.shape[2] and out.numel() == rows * b.shape[2]
    same = x.dtype == out.dtype == a.dtype and slots.dtype == torch.int32
    if not (fits and counted and same and x.device == out.device == slots.device == a.device):
        raise ModelError(
            f"x is {_said(x)}, slots {_said(slots)} and out {_said(out)}, expected (..., {a.shape[2]}), int32 (M,) and "
            f"(..., {b.shape[2]}), M rows each, x and out in {a.dtype}, on {a.device}"
        )


def _said(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}{layout}"


class PlainProduct:
    """`LowRankProduct` by `reference`, on any device and in any floating type."""

    name = "plain torch"

    def prepare(self, a: Tensor, b: Tensor, ranks: Tensor) -> Bound:
        check_stacks(a, b, ranks)

        def call(x: Tensor, slots: Tensor, out: Tensor) -> None:
            check_call((a, b, ranks), x, slots, out)
            reference(x, a, b, ranks, slots, out)

        return call


PLAIN = PlainProduct()
