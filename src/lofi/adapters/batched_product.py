"""The product that many LoRA adapters in one batch come to: each row of x through the factors of its own slot.

Knows the arithmetic, in plain torch, and what a backend must offer (`LowRankProduct`); the kernels that compute the same
faster stand in quant/kernels, which adapters/ does not import: whoever makes a bank hands one in. Knows no modules, no
adapters and no slots' contents (batched.py).

Rejected: a loop over adapters with masks (PEFT's `adapter_names`: eight adapters take 2.25 times the base's time), since
a step then costs with the adapters there are; sorting rows by slot first, which changes nothing that gathering needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

GATHERED = 1 << 22
"""Numbers of A and B that `reference` gathers at once, at most (but for a single row's): 16 MB in float32."""

Bound = Callable[[Tensor, Tensor, Tensor], None]
"""(x (..., I), slots (M,) int32, out (..., O)) -> None, M the number of rows of both: adds each row's product to out."""


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
    Raises    IndexError: a slot outside -1 .. S - 1, on a CPU; on other devices, where looking would wait for them, such
              a row gets nothing

    Ranks and slots that are not used are masked, not multiplied by 0: what they hold, NaN even, has no effect.
    """
    rows, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
    result = out.view(-1, out.shape[-1])  # (M, O), which must be a view: it is written to
    check_slots(slots, len(a))
    size = max(1, GATHERED // max(1, a.shape[1] * (a.shape[2] + b.shape[2])))
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        slot = slots[part].long().clamp(0, len(a) - 1)
        kept = torch.arange(a.shape[1], device=a.device) < ranks[slot, None]  # (m, R)
        kept &= (slots[part] == slot)[:, None]
        left = a[slot].to(wide)  # (m, R, I)
        right = b[slot].to(wide).masked_fill_(~kept[:, :, None], 0)  # (m, R, O)
        hidden = torch.bmm(left, rows[part].to(wide)[:, :, None])[:, :, 0].masked_fill_(~kept, 0)  # (m, R)
        result[part] += torch.bmm(hidden[:, None], right)[:, 0]


def check_slots(slots: Tensor, count: int) -> None:
    """Raises  IndexError: a slot outside -1 .. count - 1, where looking costs no wait for a device."""
    if slots.is_cpu and slots.numel():
        least, most = (int(v) for v in slots.aminmax())
        if least < -1 or most >= count:
            raise IndexError(f"slots from {least} to {most} of a bank of {count}, expected -1 to {count - 1}")


class PlainProduct:
    """`LowRankProduct` by `reference`, on any device and in any floating type."""

    name = "plain torch"

    def prepare(self, a: Tensor, b: Tensor, ranks: Tensor) -> Bound:
        def call(x: Tensor, slots: Tensor, out: Tensor) -> None:
            reference(x, a, b, ranks, slots, out)

        return call


PLAIN = PlainProduct()
