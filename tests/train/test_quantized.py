"""Runs over a quantized base: what recipe and folder make together, the memory they are given, checkpointing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lofi.errors import RecipeError
from lofi.models.checkpointing import enable
from lofi.recipe import make_recipe
from lofi.train.quantized import Wanted, held_bytes, wanted, workspace_bytes
from quantized_models import quantized
from tiny_training import tiny_llama, with_lora

WRITTEN = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def asked(method: str, quantization: str | None = None):
    overrides = [f"method={method}"] + ([f"quantization={quantization}"] if quantization else [])
    return make_recipe({"model": "here", "data": {"train": "t.jsonl"}, "output": "o"}, overrides)


def folder(kind: str | None) -> SimpleNamespace:
    return SimpleNamespace(**({"quantization_config": WRITTEN[kind]} if kind else {}))


@pytest.mark.parametrize(
    ("method", "quantization", "held", "expected"),
    [
        ("lora", None, None, (None, None)),
        ("full", None, None, (None, None)),
        ("qlora", None, None, ("nf4", "nf4")),
        ("lora", "nf4", None, ("nf4", "nf4")),
        ("int8-lora", None, None, ("int8", "int8")),
        ("lora", None, "nf4", ("nf4", None)),
        ("lora", None, "int8", ("int8", None)),
        ("lora", "nf4", "nf4", ("nf4", None)),
        ("qlora", None, "nf4", ("nf4", None)),
        ("qlora", None, "fp4", ("fp4", None)),
        ("int8-lora", None, "int8", ("int8", None)),
    ],
)
def test_a_folder_that_is_quantized_already_is_taken_as_it_is(method, quantization, held, expected):
    found = wanted(asked(method, quantization), folder(held))
    assert (found.kind, found.to_load) == expected
    assert bool(found.why) == (found.kind is not None)


@pytest.mark.parametrize(
    ("method", "held", "words"),
    [
        ("full", "nf4", "method is full, but here holds nf4-quantized weights, which cannot train; use method qlora"),
        ("full", "int8", "use method int8-lora"),
        ("qlora", "int8", "method qlora over nf4 was asked for, but here holds int8-quantized weights"),
        ("int8-lora", "nf4", "use method qlora, or give the dense model"),
    ],
)
def test_a_folder_quantized_otherwise_is_refused_with_the_remedy(method, held, words):
    with pytest.raises(RecipeError, match=words):
        wanted(asked(method), folder(held))


def test_nothing_is_wanted_of_a_dense_base():
    assert wanted(asked("lora"), folder(None)) == Wanted()


def test_memory_counts_one_dense_copy_of_the_largest_packed_weight():
    dense = tiny_llama()
    assert workspace_bytes(dense, 2) == 0
    assert workspace_bytes(quantized(tiny_llama(), "nf4"), 2) == 40 * 24 * 2  # gate, up and down: 40 x 24


def test_a_packed_base_holds_the_bytes_of_its_codes_and_tied_weights_once():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False))
    model[1].weight = model[0].weight
    assert held_bytes(model) == 4 * 6 * 4
    dense, packed = held_bytes(tiny_llama()), held_bytes(quantized(tiny_llama(), "int8"))
    linears = 2 * (24 * 24 * 2 + 2 * 24 * 8 + 3 * 24 * 40)
    rows = 2 * (24 + 24 + 8 + 8 + 40 + 40 + 24)
    assert dense - packed == linears * 3 - rows * 4  # 4 bytes become 1, and each row gets a scale


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_checkpointing_over_a_quantized_base_gives_the_same_gradients(kind):
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for checkpointing in (False, True):
        model = with_lora(quantized(tiny_llama(), kind), lora_dropout=0.25).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            enable(model)
        torch.manual_seed(3)  # the same dropout
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) == 28
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(bool(gradient.any()) for gradient in plain.values())
