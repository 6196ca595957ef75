"""The 4-bit reference: the published errors, the peer's codes, and what the layout says."""

from __future__ import annotations

import pytest
import torch

from lofi.quant.codes import fp4_code, nf4_code
from lofi.quant.nf4 import dequantize_blockwise, quantize_blockwise, quantize_scales
from lofi.quant.storage import FourBit

SHAPES = [(53, 24), (7, 64), (5, 77), (1, 1), (3, 43), (64, 128)]


def packed(weight, *, block=64, double=False, code=None):
    code = nf4_code() if code is None else code
    codes, absmax = quantize_blockwise(weight, code, block)
    absmax, nested = quantize_scales(absmax) if double else (absmax, None)
    return FourBit(codes, absmax, code, tuple(weight.shape), block, nested)


@pytest.mark.parametrize(("block", "published"), [(64, 0.072798), (256, 0.080337), (4096, 0.092547)])
def test_the_mean_error_on_normal_weights_is_the_published_one(block, published):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = (dequantize_blockwise(packed(weight, block=block), torch.float32) - weight).abs().mean().item()
    assert error == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_values_are_the_peers_to_the_bit(shape, dtype, kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
    ours = packed(weight, code=nf4_code() if kind == "nf4" else fp4_code())
    assert torch.equal(ours.codes, theirs.view(-1)) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(dequantize_blockwise(ours, dtype), functional.dequantize_4bit(theirs, state))


def test_doubly_quantized_scales_read_as_the_peers_do():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(300, 100, generator=torch.Generator().manual_seed(2))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = packed(weight, double=True)
    same = (ours.absmax == state.absmax).float().mean()
    assert same > 0.99  # the peer's CPU search does not always take the nearer of two codes
    theirs = FourBit(codes.view(-1), state.absmax, nf4_code(), (300, 100), 64, ours.nested)
    assert torch.equal(theirs.nested.absmax, state.state2.absmax) and torch.equal(theirs.nested.offset, state.offset)
    read = functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantize_blockwise(theirs, torch.float32), read)


def test_double_quantization_saves_0_373_bits_a_parameter():
    weight = torch.randn(4096, 1024)
    bits = [8 * packed(weight, double=double).bytes() / weight.numel() for double in (False, True)]
    assert bits[0] == 4.5 and bits[1] == pytest.approx(4.127, abs=1e-3)


def test_double_quantization_hardly_adds_to_the_error():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(3))
    errors = [
        (dequantize_blockwise(packed(weight, double=double), torch.float32) - weight).abs().mean().item()
        for double in (False, True)
    ]
    assert errors[0] != errors[1] and errors[1] < 1.01 * errors[0]


def test_the_first_of_a_pair_is_in_the_high_nibble_and_blocks_run_across_rows():
    weight = torch.tensor([[1.0, -1.0, 0.0], [8.0, -8.0, 4.0]])
    ours = packed(weight, block=2)
    assert ours.absmax.tolist() == [1.0, 8.0, 8.0]
    assert ours.codes.tolist() == [0xF0, 0x7F, 0x0C]


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(3, 50)
    weight[0, 0] = 2.0
    back = dequantize_blockwise(packed(weight), torch.bfloat16)
    assert torch.equal(back.float(), weight)
    assert not dequantize_blockwise(packed(torch.zeros(4, 64), double=True), torch.float32).any()


def test_values_that_the_code_book_holds_come_back_exactly():
    weight = (nf4_code() * 3.0).repeat(4).view(1, 64)
    assert torch.equal(dequantize_blockwise(packed(weight), torch.float32), weight)
