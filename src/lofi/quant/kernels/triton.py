"""The backend in Triton for NVIDIA (Ampere and later) and AMD GPUs: which kernel a call goes to, in which tiles.

Knows shapes, grids and launch options; the kernels stand in triton_nf4.py and triton_int8.py, what they must compute in
quant/nf4.py and quant/int8.py. Blocks that are no power of two, or longer than 4096, which no known checkpoint has,
are computed in plain torch. `load_triton` says why where there is nothing to load; nothing here imports Triton before.

With TRITON_INTERPRET=1 Triton runs the same kernels in Python on the CPU: so the tests check them without a GPU.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lofi.quant.kernels.interface import Kernels
from lofi.quant.kernels.reference import REFERENCE
from lofi.quant.storage import EightBit, FourBit, RowCodes

_LONGEST_BLOCK = 4096
_TILE = 4096  # elements of a 4-bit weight a program dequantizes: 16 bytes a thread in, 64 (in half precision) out
_QUANTIZED = 1024  # elements a program quantizes: each is compared with fifteen middles, and waits in a register
HALF = (torch.bfloat16, torch.float16)
_WANTED = 4  # programs a multiprocessor, at least, of a product that only reads its weight


class TritonKernels:
    """`interface.Kernels` on GPU tensors."""

    name = "triton"

    def __init__(self) -> None:
        self._nf4: Any = importlib.import_module("lofi.quant.kernels.triton_nf4")
        self._int8: Any = importlib.import_module("lofi.quant.kernels.triton_int8")

    def quantize_blockwise(self, weight: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
        n = weight.numel()
        if not _covered(block) or not n:
            return REFERENCE.quantize_blockwise(weight, code, block)
        order = torch.argsort(code, stable=True)
        middles = (code[order][:-1] + code[order][1:]) / 2
        codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-n // block), dtype=torch.float32, device=weight.device)
        blocks = max(1, _QUANTIZED // block)
        with on_device(weight):
            self._nf4.quantize_kernel[(-(-absmax.numel() // blocks),)](
                weight.contiguous(), middles, order.to(torch.uint8), codes, absmax, n,
                QBLOCK=block, BLOCKS=blocks, enable_fp_fusion=False,
            )  # fmt: skip
        return codes, absmax

    def dequantize_blockwise(self, stored: FourBit, out: Tensor) -> Tensor:
        return self._dequantize(stored, 0, out)

    def dequantize_rows(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        return self._dequantize(stored, first * stored.shape[-1], out)

    def _dequantize(self, stored: FourBit, first: int, out: Tensor) -> Tensor:
        count = out.numel()
        if not count:
            return out
        if not _covered(stored.block):
            return REFERENCE.dequantize_rows(stored, first // stored.shape[-1], out)
        blocks = max(1, _TILE // stored.block)
        touched = -(-(first + count) // stored.block) - first // stored.block
        with on_device(out):
            self._nf4.dequantize_kernel[(-(-touched // blocks),)](
                _tensors(stored), out, first, count, stored.codes.numel(),
                BLOCKS=blocks, enable_fp_fusion=False, **_constants(stored),
            )  # fmt: skip
        return out

    def few_rows(self, x: Tensor, stored: FourBit) -> Tensor | None:
        """One row, and float32, by multiply-adds, the rest by matrix units; weights whose rows are whole blocks."""
        rows, rows_in = x.shape
        whole = len(stored.shape) == 2 and _covered(stored.block) and stored.block >= 8 and not rows_in % stored.block
        known = x.dtype == torch.float32 or x.dtype in HALF
        if not (whole and known and rows_in and 0 < rows <= 16) or stored.codes.storage_offset() % 4:
            return None
        by_matrix = rows > 1 and x.dtype in HALF
        tile_o, tile_i = (64, 128) if by_matrix else (16, 512)
        tiles = -(-stored.shape[0] // tile_o)
        splits, per_split = split_columns(tiles * (1 if by_matrix else rows), rows_in, tile_i, x.device)
        out = x.new_empty(rows, stored.shape[0])
        parts = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device)
        shape = (rows, rows_in, stored.shape[0], per_split)
        sizes = {"BLOCK_O": tile_o, "BLOCK_I": tile_i, **_constants(stored)}
        words = (stored.codes.view(-1).view(torch.int32), *_tensors(stored)[1:])
        x = x.contiguous()
        with on_device(x):
            if by_matrix:
                self._nf4.few_rows_kernel[(tiles, splits)](x, words, parts, shape, **sizes)
            else:
                self._nf4.one_row_kernel[(tiles, splits, rows)](x, words, parts, shape, **sizes)
            if splits > 1:
                grid = (-(-out.numel() // 256),)
                self._nf4.add_splits_kernel[grid](parts, out, out.numel(), splits, BLOCK=256, num_warps=2)
        return out

    def quantize_weight_rows(self, weight: Tensor) -> EightBit:
        codes, scale, _ = self._row_codes(weight, 0.0)
        return EightBit(codes, scale)

    def dequantize_int8(self, stored: EightBit, out: Tensor) -> Tensor:
        rows, columns = out.shape
        if out.numel():
            block = _row_block(columns)
            with on_device(out):
                self._int8.dequantize_int8_kernel[(rows, -(-columns // block))](
                    stored.codes, stored.scale, out, columns, BLOCK=block, enable_fp_fusion=False
                )
        return out

    def quantize_rows(self, x: Tensor, threshold: float) -> RowCodes:
        """Finding which columns hold outliers waits for the GPU: how many there are is a shape."""
        threshold = torch.tensor(threshold, dtype=x.dtype).item()  # one number for the kernel and for what follows
        codes, scale, flags = self._row_codes(x, threshold)
        if threshold <= 0:
            return RowCodes(codes, scale, x.new_empty(0, dtype=torch.int64), x.new_empty(len(x), 0))
        columns = flags.nonzero()[:, 0]  # (U,)
        taken = x[:, columns]  # (M, U)
        return RowCodes(codes, scale, columns, taken.where(taken.abs() >= threshold, 0))

    def _row_codes(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = x.shape
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scale = torch.zeros(rows, dtype=torch.float32, device=x.device)
        flags = torch.zeros(columns if threshold > 0 else 1, dtype=torch.int8, device=x.device)
        if codes.numel():
            block = _row_block(columns)
            with on_device(x):
                self._int8.row_codes_kernel[(rows,)](
                    x.contiguous(), codes, scale, flags, columns, float(threshold),
                    SPLIT=threshold > 0, BLOCK=block, num_warps=max(1, block // 512), enable_fp_fusion=False,
                )  # fmt: skip
        return codes, scale, flags

    def int8_product(self, rows: RowCodes, stored: EightBit, dtype: torch.dtype) -> Tensor:
        (count, rows_in), rows_out = rows.codes.shape, stored.codes.shape[0]
        out = torch.empty((count, rows_out), dtype=dtype, device=rows.codes.device)
        if not out.numel():
            return out
        tile_m, tile_o, tile_i, warps = _product_tile(count, rows.outliers.dtype)
        grid = (-(-count // tile_m) * -(-rows_out // tile_o),)
        with on_device(out):
            self._int8.int8_product_kernel[grid](
                (rows.codes, rows.scale, rows.columns, rows.outliers.contiguous()), (stored.codes, stored.scale), out,
                (count, rows_out, rows_in, len(rows.columns)), APART=len(rows.columns) > 0,
                BLOCK_M=tile_m, BLOCK_O=tile_o, BLOCK_I=tile_i,
                num_warps=warps, num_stages=3, enable_fp_fusion=False,
            )  # fmt: skip
        return out


def load_triton(device_type: str) -> tuple[Kernels | None, str]:
    """The kernels for tensors on "cuda" (NVIDIA or AMD), or None and the reason why there are none."""
    reason = why_no_triton(device_type)
    return (None, reason) if reason else (TritonKernels(), "")


def why_no_triton(device_type: str) -> str:
    """Why Triton's kernels cannot run on tensors of that device, or nothing."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interpreted):
        return f"the tensors are on {device_type} and Triton's kernels run on cuda"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "the package triton is not installed"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere, which they are written for"
    return ""


def _covered(block: int) -> bool:
    return 2 <= block <= _LONGEST_BLOCK and not block & (block - 1)


def _tensors(stored: FourBit) -> tuple[Tensor, ...]:
    nested = stored.nested
    rest = (nested.absmax, nested.offset, nested.quant_map) if nested else (stored.quant_map,) * 3
    return stored.codes, stored.absmax, stored.quant_map, *rest


def _constants(stored: FourBit) -> dict[str, Any]:
    return {"QBLOCK": stored.block, "PER_NESTED": stored.nested.block if stored.nested else 0}


def split_columns(tiles: int, rows_in: int, tile_i: int, device: torch.device) -> tuple[int, int]:
    """(splits, elements of I to a split): programs enough that every multiprocessor reads, each two tiles or more."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    steps = -(-rows_in // tile_i)
    wanted = min(-(-_WANTED * processors // tiles), steps // 2) or 1
    per_split = -(-steps // wanted)
    return -(-steps // per_split), per_split * tile_i


def _row_block(columns: int) -> int:
    """Columns of a row that are worked on at once."""
    return min(4096, max(256, 1 << (columns - 1).bit_length()))


def _product_tile(rows: int, outliers: torch.dtype) -> tuple[int, int, int, int]:
    """(M, O, I, warps) of a tile of the int8 product: few rows are bound by reading the weight, many by the product."""
    if rows <= 16:
        return 16, 32, 256, 4
    if rows <= 64:
        return 64, 64, 128, 4
    return 64 if outliers == torch.float32 else 128, 128, 128, 8  # float32's small product needs more registers


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
