"""The dtype choice, with the machine's answers put in its mouth."""

from __future__ import annotations

import re

import pytest
import torch

from lofi.errors import ModelError, RecipeError
from lofi.models.dtypes import choose_dtype, cpu_choice, cuda_choice, declared_bf16, measured_speedup, resolve_device


def never():
    raise AssertionError("nothing is to be measured here")


@pytest.mark.parametrize(
    ("native", "speedup", "dtype", "words"),
    [
        ((), never, torch.float32, "no bf16 instructions"),
        (("AVX512-BF16", "AMX"), lambda: 4.9, torch.bfloat16, r"AVX512-BF16 \+ AMX: a bf16 product is 4\.9x fp32"),
        (("AVX512-BF16",), lambda: 0.8, torch.float32, "only 0.8x fp32"),
        (None, lambda: 2.0, torch.bfloat16, "an unknown instruction set"),
        (None, lambda: 1.0, torch.float32, "an unknown instruction set"),
    ],
)
def test_a_cpu_must_declare_bf16_and_be_measured_faster(native, speedup, dtype, words):
    choice = cpu_choice(native, speedup)
    assert choice.dtype == dtype and not choice.scaler
    assert choice.autocast == (dtype != torch.float32)
    assert re.search(words, choice.reason), choice.reason


@pytest.mark.parametrize(
    ("capability", "name", "scaler"),
    [
        ((9, 0), "bf16", False),
        ((8, 0), "bf16", False),
        ((7, 5), "fp16", True),
        ((7, 0), "fp16", True),
        ((5, 0), "fp32", False),
    ],
)
def test_a_gpu_computes_in_bf16_from_ampere_on_and_with_a_scaled_fp16_before(capability, name, scaler):
    choice = cuda_choice(capability)
    assert (choice.name, choice.scaler, choice.autocast) == (name, scaler, name != "fp32")


def test_instruction_sets_are_read_from_cpuinfo_word_by_word():
    intel = "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_int8\nbugs\t: none\n"
    assert declared_bf16(intel) == ("AVX512-BF16", "AMX")
    assert declared_bf16("flags : fpu avx2 avx512f notbf16\n") == ()
    assert declared_bf16("Features\t: fp asimd bf16 i8mm\n") == ("ARM bf16",)
    assert declared_bf16("processor : 0\n") is None


def test_a_wish_is_followed_unless_it_is_fp16_on_a_cpu():
    assert choose_dtype("cpu", "fp32").name == "fp32"
    bf16 = choose_dtype("cpu", torch.bfloat16)
    assert bf16.name == "bf16" and bf16.autocast and "as requested" in bf16.reason
    with pytest.raises(RecipeError, match="dtype fp16 was asked for on a CPU"):
        choose_dtype("cpu", "fp16")
    with pytest.raises(RecipeError, match="dtype 'half' is not known"):
        choose_dtype("cpu", "half")


def test_the_choice_is_made_once_a_process():
    assert choose_dtype("cpu") == choose_dtype("cpu")
    assert measured_speedup() is measured_speedup() and measured_speedup() > 0


def test_a_device_that_is_not_there_is_named():
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' was asked for, but torch sees none here"):
            resolve_device("cuda")
