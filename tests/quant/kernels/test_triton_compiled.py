"""The Triton kernels through Triton's compiler, without a GPU: the launches as the backend makes them, to machine code.

The interpreter does not know what a compiler refuses, nor where it makes one rounding of a product and a sum.
"""

from __future__ import annotations

import importlib
import os
import re

import pytest
import torch

from lofi.quant.codes import nf4_code
from lofi.quant.kernels.low_rank_triton import MANY, TritonLowRank
from lofi.quant.kernels.triton import TritonKernels
from lofi.quant.nf4 import quantize_blockwise, quantize_scales
from lofi.quant.storage import EightBit, FourBit, RowCodes

triton = pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set")

TARGETS = {"Ampere": ("cuda", 80, 32), "Hopper": ("cuda", 90, 32), "MI300": ("hip", "gfx942", 64)}


class Recorder:
    """In place of a module of kernels: keeps what was launched, with what."""

    def __init__(self, module, launches):
        self.module, self.launches = importlib.import_module(f"lofi.quant.kernels.{module}"), launches

    def __getattr__(self, kernel):
        def launch(*args, **options):
            self.launches[kernel] = getattr(self.module, kernel), args, options

        return type("Launcher", (), {"__getitem__": lambda _, grid: launch})()


@pytest.fixture(scope="module")
def launches():
    """What the backend launches for weights of 128 x 2048 and bfloat16 activations, by kernel."""
    kernels, seen = TritonKernels(), {}
    kernels._nf4, kernels._int8 = Recorder("triton_nf4", seen), Recorder("triton_int8", seen)
    weight = torch.randn(128, 2048)
    codes, absmax = quantize_blockwise(weight, nf4_code(), 64)
    scales, nested = quantize_scales(absmax)
    stored = FourBit(codes, scales, nf4_code(), (128, 2048), 64, nested)
    eight = EightBit(torch.zeros(128, 2048, dtype=torch.int8), torch.ones(128))
    half = weight.bfloat16()
    kernels.quantize_blockwise(half, nf4_code(), 64)
    kernels.dequantize_blockwise(stored, half)
    assert kernels.few_rows(half[:1], stored) is not None and kernels.few_rows(half[:3], stored) is not None
    kernels.dequantize_int8(eight, half)
    kernels._row_codes(half, 6.0)
    one = RowCodes(eight.codes[:1], eight.scale[:1], torch.arange(1), half[:1, :1])
    kernels.int8_product(one, eight, torch.bfloat16)
    seen["int8_product_kernel of one row"] = seen["int8_product_kernel"]
    kernels.int8_product(RowCodes(eight.codes, eight.scale, torch.arange(3), half[:, :3]), eight, torch.bfloat16)
    many = TritonLowRank()
    many._kernels = Recorder("triton_low_rank", seen)
    for rows, stacks in ((3, half[:16].view(2, 8, 2048)), (MANY, half[:34].view(2, 17, 2048))):
        x, slots = half[:1].expand(rows, -1), torch.zeros(rows, dtype=torch.int32)
        many.prepare(stacks, stacks, torch.zeros(2, dtype=torch.int32))(x, slots, torch.zeros_like(x))
    modules = (kernels._nf4.module, kernels._int8.module, many._kernels.module)
    kernels_there = {name for module in modules for name in dir(module)}
    assert {name.split()[0] for name in seen} == {
        name for name in kernels_there if name.endswith("_kernel")
    }  # every kernel, once
    return seen


class Device:
    """In place of a GPU's driver: says which GPU it is. Nothing can be launched on it."""

    def __init__(self, target):
        self.target = triton.backends.compiler.GPUTarget(*TARGETS[target])

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # one number a target: compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0


def compiled(launch, target):
    """To machine code, by the launcher's own path, which finds out what is 1 and what a multiple of 16."""
    kernel, args, keywords = launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Device(target))
        return kernel.warmup(*args, grid=(1,), **keywords)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what is checked is this compiler's work, not an older one's


@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles(target, launches):
    for name, launch in launches.items():
        made = compiled(launch, target)
        assert target != "MI300" or ".vgpr_spill_count: 0" in made.asm["amdgcn"], name
        if target == "Hopper" and any(
            word in name for word in ("row_kernel", "rows_kernel", "product", "shrink", "expand")
        ):
            assert not re.search(r"\b(STL|LDL)\b", made.asm["sass"]), name  # registers suffice


def test_dequantization_rounds_the_product_and_the_sum_each(launches):
    kernel, args, keywords = launches["dequantize_kernel"]
    assert not re.search(r"\bFFMA", compiled((kernel, args, keywords), "Hopper").asm["sass"])
    contracted = compiled((kernel, args, {**keywords, "enable_fp_fusion": True}), "Hopper")
    assert re.search(r"\bFFMA", contracted.asm["sass"])  # what the launch's option prevents


def test_products_of_codes_of_few_rows_and_of_prompts_use_matrix_units(launches):
    for kernel, unit in [
        *(("int8_product_kernel", r"IGMMA|IMMA"), ("few_rows_kernel", r"HGMMA|HMMA")),
        ("shrink_tile_kernel", r"HGMMA|HMMA"),
    ]:
        assert re.search(unit, compiled(launches[kernel], "Hopper").asm["sass"])
