"""4-bit blockwise quantization in plain torch: the executable spec of every NF4 kernel.

QLoRA (arXiv 2305.14314), section 3: a block of weights is divided by its largest magnitude and each quotient replaced
by the nearest of sixteen values; double quantization does the same to the block scales, in 8 bits. Equal to
bitsandbytes' CPU codes and dequantized values to the bit, whose layout (storage.py) is also the one on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lofi.quant.codes import dynamic_code
from lofi.quant.storage import FourBit, Nested

_SMALLEST = 1e-38  # what bitsandbytes divides by where a block is all zeros


def quantize_blockwise(weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 (ceil(n / 2),), absmax float32 (blocks,)) of a weight of n elements.

    The first of a pair is in the high nibble;
    code = number of midpoints between neighbours of the code book that lie below w * (1 / absmax), clamped to -1..1
    """
    flat = weight.reshape(-1).float()  # (n,)
    full = len(flat) // block * block
    rows = flat[:full].view(-1, block)
    absmax = rows.abs().amax(1) if full else flat.new_empty(0)
    scaled = (rows * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).reshape(-1)
    if full < len(flat):  # the short last block is divided, as bitsandbytes does: ties may fall otherwise
        last = flat[full:].abs().amax().clamp(min=_SMALLEST)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, flat[full:] / last])
    order = torch.argsort(code, stable=True)
    middles = (code[order][:-1] + code[order][1:]) / 2
    found = order[torch.bucketize(scaled.clamp(-1, 1), middles)].to(torch.uint8)
    if len(found) % 2:
        # the padding is a zero, as bitsandbytes pads
        found = torch.cat([found, order[torch.bucketize(torch.zeros(1, device=code.device), middles)].to(torch.uint8)])
    return (found[::2] << 4) | found[1::2], absmax


def quantize_scales(absmax: Tensor, block: int = 256) -> tuple[Tensor, Nested]:
    """Double quantization: (uint8 codes (blocks,), their Nested); each scale less the mean becomes 8 bits.

    absmax ~ map[code] * nested absmax + offset. 0.5 bit a parameter becomes 0.127 (block 64).
    """
    code = dynamic_code().to(absmax.device)
    offset = absmax.mean()
    flat = absmax - offset  # (blocks,)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = padded.abs().amax(1)  # (ceil(blocks / 256),)
    scaled = (padded * (1.0 / largest.clamp(min=_SMALLEST))[:, None]).reshape(-1)[: len(flat)]
    found = torch.bucketize(scaled.clamp(-1, 1), (code[:-1] + code[1:]) / 2)
    return found.to(torch.uint8), Nested(largest, offset, code, block)


def dequantize_blockwise(stored: FourBit, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for: map[code] * absmax in float32, rounded once to `dtype`."""
    pairs = torch.stack([stored.codes.view(-1) >> 4, stored.codes.view(-1) & 15], 1)  # (ceil(n / 2), 2)
    values = stored.quant_map[pairs.reshape(-1)[: stored.numel].long()]  # (n,)
    scales = stored.scales().repeat_interleave(stored.block)[: stored.numel]
    return (values * scales).to(dtype).view(stored.shape)
