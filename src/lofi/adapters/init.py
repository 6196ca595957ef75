"""Where the factors of LoRA start: draws, and starts that are taken from the frozen weight.

    True        A Kaiming-uniform(sqrt 5), B zero                     LoRA (arXiv 2106.09685), as PEFT has it
    "gaussian"  A normal(1 / r), B zero                               LoRA, section 4.1
    "olora"     B0 = Q[:, :r], A0 = R[:r] of W = Q R                  OLoRA (arXiv 2406.01775), algorithm 1
    "pissa"     B0 = U_r sqrt(S_r / s), A0 = sqrt(S_r / s) V_r^T      PiSSA (arXiv 2404.02948), eqs. 2 and 3
    "orthogonal"  A0 and B0 through orthogonal halves of one basis, so that B0 A0 = 0, even rank (PEFT's)

The last three start from both factors in use, so they are shifted: the update is s (B A - B0 A0), computed as
[B, B - B0] [A - A0; A0] with the differences in float32 before any cast. It is zero at step 0 whatever the dtype, and
keeps what was learned where B A - B0 A0 would cancel (in bf16, after factors moved by 1 %: relative error 0.004 for
0.33). The frozen weight is never changed. Rejected: writing W - s B0 A0 into the base, as the papers' code and PEFT
do: a second adapter, switching off, and loading elsewhere all go wrong then, and a quantized base cannot hold it.
Does not know modules or configs beyond one weight; `LoraConfig.finished` says what a saved folder is then.

Notation: R rank, I in, O out, s the effective multiplier.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lofi.errors import TargetError

OVERSAMPLED = 10
"""Columns that randomised PiSSA looks at beside the rank.   Halko et al. (arXiv 0909.4061), section 4.2"""


@torch.no_grad()
def draw_factors(a: Tensor, b: Tensor, init: bool | str) -> None:
    """A (R, I) and B (O, R) at step 0: B is zero, so the adapter changes nothing, unless `init` is False."""
    if init == "gaussian":
        a.normal_(std=1.0 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    else:
        b.zero_()


@torch.no_grad()
def start_from(a: Tensor, b: Tensor, init: str, weight: Tensor, scale: float) -> None:
    """Fill A (R, I) and B (O, R) with the start that `init` takes from a weight (O, I).

    Dtypes  computed in float32 ("pissa" in float64), on the weight's device; a meta weight is left alone
    Raises  TargetError if the weight has fewer than R directions
    """
    rank = a.shape[0]
    if init != "orthogonal" and rank > min(weight.shape):
        raise TargetError(
            f"init_lora_weights {init!r} takes {rank} directions of a weight of shape {tuple(weight.shape)}, which has "
            f"{min(weight.shape)}; lower r (or its rank_pattern), or start from True"
        )
    if weight.is_meta:
        return
    if init == "orthogonal":
        a0, b0 = orthogonal(rank, weight.shape[1], weight.shape[0], device=weight.device)
    elif init == "olora":
        a0, b0 = olora(weight.float(), rank)
    else:
        a0, b0 = pissa(weight, rank, scale, iterations=_iterations(init))
    a.copy_(a0)
    b.copy_(b0)


def _iterations(init: str) -> int | None:
    return int(init.rpartition("_")[2]) if init.startswith("pissa_niter_") else None


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A0 = R[:r], B0 = Q[:, :r] of W = Q R.   OLoRA (arXiv 2406.01775), algorithm 1

    Q[:, :r] depends on the first r columns of W alone and R[:r] = Q[:, :r]^T W, so one QR of (O, r) and one product
    do, in O(O I r) where the QR of all of W costs O(O I min(O, I)).
    Shapes  weight (O, I) -> (r, I), (O, r)
    Exact   in exact arithmetic the same as the full QR's, signs included (LAPACK's); here up to rounding
    """
    q, _ = torch.linalg.qr(weight[:, :rank])  # (O, R)
    return q.t() @ weight, q


def pissa(weight: Tensor, rank: int, scale: float, *, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S_r / s) V_r^T, B0 = U_r sqrt(S_r / s) of W = U S V^T.   PiSSA (arXiv 2404.02948), eqs. 2 and 3

    Without `iterations` from the eigenvectors of the smaller Gram matrix in float64, several times quicker than an
    SVD; with them by randomised subspace iteration (section 3.3).
    Shapes  weight (O, I) -> (r, I), (O, r)
    Exact   s B0 A0 is the best approximation of rank r, to about 1e-7 of ||W||; randomised: near it, drawn from
            torch's generator. The signs of the directions are arbitrary
    """
    if iterations is not None:
        columns = min(rank + OVERSAMPLED, *weight.shape)
        u, s, v = torch.svd_lowrank(weight.float(), q=columns, niter=iterations)
        root = (s[:rank] / scale).sqrt()
        return root[:, None] * v[:, :rank].t(), u[:, :rank] * root
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    rows = wide.t() if tall else wide  # (min, max)
    values, vectors = torch.linalg.eigh(rows @ rows.t())  # ascending
    left = vectors[:, -rank:].flip(1)  # (min, R)
    lengths = values[-rank:].flip(0).clamp_min(0).sqrt()
    root = (lengths / scale).sqrt()
    right = (left.t() @ rows) / torch.where(lengths > 0, lengths, 1.0)[:, None]  # (R, max)
    near, far = left * root, root[:, None] * right
    return (near.t(), far.t()) if tall else (far, near)


def orthogonal(rank: int, in_features: int, out_features: int, *, device: Any = None) -> tuple[Tensor, Tensor]:
    """A0 (R, I) through the even rows of a random orthogonal basis, B0 (O, R) through the odd ones: B0 A0 = 0.

    Entries are of size 1/10, as PEFT draws them. Each factor has rank R / 2.
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, device=device))
    a = basis[0::2].t() @ torch.randn(rank // 2, in_features, device=device)
    b = torch.randn(out_features, rank // 2, device=device) @ basis[1::2]
    return a / 10.0, b / 10.0


def from_start(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of B A - B0 A0: [A - A0; A0] (..., 2R, I) and [B, B - B0] (..., O, 2R); A and B where no start is.

    B (A - A0) + (B - B0) A0 = B A - B0 A0, the differences in the factors' own dtype (float32).
    """
    if a0 is None or b0 is None:
        return a, b
    return torch.cat([a - a0, a0], dim=-2), torch.cat([b, b - b0], dim=-1)


def is_zero(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> bool:
    """Whether no term of B A (of B (A - A0) + (B - B0) A0) can be anything but zero."""
    if a0 is None or b0 is None:
        return not (a.any() and b.any())
    return not ((b.any() and (a != a0).any()) or ((b != b0).any() and a0.any()))


def frozen_weight(module: Any, *, transposed: bool = False) -> Tensor:
    """The weight (O, I) of a linear or embedding as the base has it: dequantized in float32 where it holds codes."""
    if "weight" not in getattr(module, "packed_shapes", {}):
        weight: Tensor = module.weight.detach()
        return weight.t() if transposed else weight
    if module.weight.is_meta:
        return torch.empty(module.logical_shape, device="meta")
    return module.dense_weight(torch.float32)
