"""4-bit kernels in Triton: dequantize, quantize, and products of a few rows, on any GPU that Triton compiles for.

Knows tiles, pointers and rounding; what the numbers mean stands in quant/nf4.py, which weight goes to which kernel in
triton.py. All offsets into a weight are 64-bit. A tile is always whole blocks of the weight, so a block's scale is read
(and, under double quantization, decoded) once a block and not once an element. `stored` is a tuple of tensors: codes,
absmax, quant_map, nested absmax, nested offset, nested map; PER_NESTED is 0 where there is no double quantization. The
products read codes as 32-bit words: eight elements by a shift and a mask each.

Exactness rests on `enable_fp_fusion=False` at the launch: otherwise the compiler contracts the decoded scale's product
and sum into one fused multiply-add, which rounds once where the format rounds twice.

Rejected: autotuning (a first call of seconds, other results on every machine; the sizes here follow from bytes a
thread), a table in global memory (the pipeliner copies every look-up asynchronously), atomics for the sums of split
products (their order, and so the result, would change from run to run).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scales(stored, at, mask, PER_NESTED: tl.constexpr):
    """Scales of the blocks `at`: stored as they are, or map[code] * nested absmax + offset, each step rounded."""
    _, absmax, _, nested_absmax, nested_offset, nested_map = stored
    scale = tl.load(absmax + at, mask=mask, other=0)
    if PER_NESTED:
        spread = tl.load(nested_absmax + at // PER_NESTED, mask=mask, other=0.0)
        scale = tl.load(nested_map + scale.to(tl.int32)) * spread + tl.load(nested_offset)
    return scale


@triton.jit
def _look_up(stored, code):
    """quant_map[code] through shared memory: sixteen floats lie in sixteen banks, so that no two threads collide."""
    book = tl.load(stored[2] + tl.arange(0, 16))
    return tl.reshape(tl.gather(book, tl.reshape(code, [code.numel]), 0), code.shape)


@triton.jit
def dequantize_kernel(
    stored,
    out,  # (count,)
    first,  # of the flat weight, the element that goes to out[0]
    count,
    bytes_there,  # ceil(n / 2)
    QBLOCK: tl.constexpr,
    PER_NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[i] = quant_map[code of element first + i] * its block's scale, one rounding to out's dtype."""
    block = first // QBLOCK + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    scale = _scales(stored, block, block * QBLOCK - first < count, PER_NESTED)  # first + count may pass 2^31
    place = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]  # (BLOCKS, QBLOCK / 2) bytes
    pair = tl.load(stored[0] + place, mask=place < bytes_there, other=0).to(tl.int32)
    values = _look_up(stored, tl.interleave(pair >> 4, pair & 15)) * scale[:, None]  # (BLOCKS, QBLOCK)
    at = block[:, None] * QBLOCK + tl.arange(0, QBLOCK)[None, :] - first
    tl.store(out + at, values.to(out.dtype.element_ty), mask=(at >= 0) & (at < count))


@triton.jit
def quantize_kernel(
    weight,  # (n,)
    middles,  # (15,) float32: between neighbours of the ascending code book
    order,  # (16,) uint8: the code of the k-th smallest value
    codes,  # (ceil(n / 2),) uint8
    absmax,  # (blocks,) float32
    n,
    QBLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Codes and scale of whole blocks: code = middles that lie below w * (1 / absmax); a short last block divides."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    at = block[:, None] * QBLOCK + tl.arange(0, QBLOCK)[None, :]  # (BLOCKS, QBLOCK)
    w = tl.load(weight + at, mask=at < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(w), axis=1)  # (BLOCKS,)
    divisor = tl.maximum(largest, tl.full([BLOCKS], 1e-38, tl.float32))  # the reference's, where a block is all zeros
    short = (block + 1) * QBLOCK > n
    inverse = tl.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)
    quotient = tl.div_rn(w, tl.broadcast_to(divisor[:, None], [BLOCKS, QBLOCK]))
    scaled = tl.where(short[:, None], quotient, w * inverse[:, None])
    rank = tl.zeros([BLOCKS, QBLOCK], dtype=tl.int32)
    for i in tl.static_range(15):
        rank += (scaled > tl.load(middles + i)).to(tl.int32)
    code = tl.load(order + rank).to(tl.int32)
    high, low = tl.split(tl.reshape(code, [BLOCKS, QBLOCK // 2, 2]))
    place = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
    tl.store(codes + place, ((high << 4) | low).to(tl.uint8), mask=place * 2 < n)
    tl.store(absmax + block, tl.where(short, divisor, largest), mask=block * QBLOCK < n)


@triton.jit
def _tile(stored, o, i, shape, QBLOCK: tl.constexpr, PER_NESTED: tl.constexpr, BLOCKS: tl.constexpr, SUB: tl.constexpr):
    """Words (len(o), BLOCKS, SUB / 8) and scales (len(o), BLOCKS) of the rows o from column i on, SUB to a scale."""
    _, rows_in, rows_out, _ = shape
    sub = i // SUB + tl.arange(0, BLOCKS)  # (BLOCKS,)
    there = (o < rows_out)[:, None] & (sub < rows_in // SUB)[None, :]
    at = o[:, None] * (rows_in // SUB) + sub[None, :]  # (len(o), BLOCKS)
    place = at[:, :, None] * (SUB // 8) + tl.arange(0, SUB // 8)[None, None, :]
    words = tl.load(stored[0] + place, mask=there[:, :, None], other=0)
    return words, _scales(stored, at // (QBLOCK // SUB), there, PER_NESTED)


@triton.jit
def _values(stored, words):
    """The eight elements of a word, (..., 2, 2, 2), in order: within a byte the high nibble is the first."""
    c0 = tl.join(tl.join((words >> 4) & 15, (words >> 20) & 15), tl.join((words >> 12) & 15, (words >> 28) & 15))
    c1 = tl.join(tl.join(words & 15, (words >> 16) & 15), tl.join((words >> 8) & 15, (words >> 24) & 15))
    return _look_up(stored, tl.join(c0, c1))


@triton.jit
def _product_of_eights(a, b):
    """Sum of a * b over the last three axes, by splits: they keep what belongs to a word in the thread that read it."""
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    a00, a01 = tl.split(a0)
    a10, a11 = tl.split(a1)
    b00, b01 = tl.split(b0)
    b10, b11 = tl.split(b1)
    a000, a001 = tl.split(a00)
    a010, a011 = tl.split(a01)
    a100, a101 = tl.split(a10)
    a110, a111 = tl.split(a11)
    b000, b001 = tl.split(b00)
    b010, b011 = tl.split(b01)
    b100, b101 = tl.split(b10)
    b110, b111 = tl.split(b11)
    left = a000 * b000 + a001 * b001 + a010 * b010 + a011 * b011
    return left + a100 * b100 + a101 * b101 + a110 * b110 + a111 * b111


@triton.jit
def one_row_kernel(
    x,  # (M, I)
    stored,
    out,  # (splits, M, O)
    shape,  # M, I, O, columns to a split; I a multiple of QBLOCK, columns to a split of BLOCK_I
    QBLOCK: tl.constexpr,
    PER_NESTED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[split, m, o] = sum over the split's i of x[m, i] W[o, i]; scales multiply sums of pairs, not elements.

    A grid of (O / BLOCK_O, splits, M). The next tile is asked for before this one is worked on; even and odd elements
    are summed apart, so that the nibbles of a byte need not be brought into order; what a thread reads of x serves
    several rows of W.
    """
    SUB: tl.constexpr = QBLOCK if QBLOCK < BLOCK_I else BLOCK_I
    BLOCKS: tl.constexpr = BLOCK_I // SUB
    _, rows_in, rows_out, per_split = shape
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)  # (BLOCK_O,)
    x += tl.program_id(2).to(tl.int64) * rows_in
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, rows_in)
    words, scale = _tile(stored, o, begin, shape, QBLOCK, PER_NESTED, BLOCKS, SUB)
    total = tl.zeros([BLOCK_O, BLOCKS, SUB // 8], dtype=tl.float32)
    for i in range(begin, end, BLOCK_I):
        next_words, next_scale = _tile(stored, o, i + BLOCK_I, shape, QBLOCK, PER_NESTED, BLOCKS, SUB)
        place = i + tl.arange(0, BLOCK_I)
        columns = tl.load(x + place, mask=place < rows_in, other=0.0).to(tl.float32)
        columns = tl.reshape(columns, [1, BLOCKS, SUB // 8, 2, 2, 2])
        total += _product_of_eights(_values(stored, words), columns) * scale[:, :, None]
        words, scale = next_words, next_scale
    y = tl.sum(tl.sum(total, axis=2), axis=1)  # (BLOCK_O,)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out + row * rows_out + o, y.to(out.dtype.element_ty), mask=o < rows_out)


@triton.jit
def few_rows_kernel(
    x,  # (M, I), half precision
    stored,
    out,  # (splits, M, O)
    shape,  # M <= 16, I, O, columns to a split
    QBLOCK: tl.constexpr,
    PER_NESTED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out[split] = x W^T over the split's part of I by matrix units, W's tile the left operand, x padded to 16 rows.

    A grid of (O / BLOCK_O, splits). The tile of W is rounded to x's dtype, as the dense weight would be.
    """
    SUB: tl.constexpr = QBLOCK if QBLOCK < BLOCK_I else BLOCK_I
    BLOCKS: tl.constexpr = BLOCK_I // SUB
    rows, rows_in, rows_out, per_split = shape
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.arange(0, 16)
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, rows_in)
    total = tl.zeros([BLOCK_O, 16], dtype=tl.float32)
    for i in range(begin, end, BLOCK_I):
        words, scale = _tile(stored, o, i, shape, QBLOCK, PER_NESTED, BLOCKS, SUB)
        values = tl.reshape(_values(stored, words), [BLOCK_O, BLOCKS, SUB])
        tile = (values * scale[:, :, None]).to(x.dtype.element_ty)
        at = i + tl.arange(0, BLOCK_I)
        known = (m < rows)[None, :] & (at < rows_in)[:, None]
        columns = tl.load(x + m[None, :] * rows_in + at[:, None], mask=known, other=0.0)  # (BLOCK_I, 16)
        total = tl.dot(tl.reshape(tile, [BLOCK_O, BLOCK_I]), columns, total)
    at_out = (tl.program_id(1).to(tl.int64) * rows + m[None, :]) * rows_out + o[:, None]
    written = (m < rows)[None, :] & (o < rows_out)[:, None]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=written)


@triton.jit
def add_splits_kernel(parts, out, n, splits, BLOCK: tl.constexpr):
    """out[i] = the splits' float32 sums added in order, so that a result does not change from run to run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(parts + at, mask=at < n, other=0.0)
        parts += n
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)
