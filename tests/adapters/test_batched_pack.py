"""An adapter as a bank takes it: its own copy, the scale folded in, and a refusal where a batch cannot hold it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lofi
from adapters.models import ids, stir, toy
from files.families import family_model
from lofi.adapters.batched import pack
from lofi.adapters.batched_pack import tensors_of
from lofi.adapters.registry import adapter_tensors
from lofi.errors import TargetError


def packed(config=None, **more):
    model = toy(**more)
    lofi.add_adapter(model, config or lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "embed"]))
    stir(model)
    return model, pack(model)


def test_a_times_b_is_the_update_with_its_scale():
    model, made = packed(lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "embed"], use_rslora=True))
    up, embed = made.parts["up"], made.parts["embed"]
    parts = model.lofi_registry.adapters["default"].parts
    assert up.a.shape == (3, 7) and up.b.shape == (3, 13) and embed.a.shape == (11, 3) and embed.b.shape == (3, 7)
    assert torch.allclose((up.a.t() @ up.b).t(), parts["up"].delta_weight(), atol=1e-6)
    assert torch.allclose(embed.a @ embed.b, parts["embed"].delta_weight(), atol=1e-6)


def test_a_shifted_start_takes_twice_its_rank():
    model, made = packed(lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], init_lora_weights="olora"))
    part = model.lofi_registry.adapters["default"].parts["up"]
    assert made.rank == 6
    assert torch.allclose((made.parts["up"].a.t() @ made.parts["up"].b).t(), part.delta_weight(), atol=1e-6)


def test_what_is_packed_is_a_copy_that_later_training_does_not_reach():
    model, made = packed(lofi.LoraConfig(r=3, target_modules=["up", "head"], trainable_token_indices={"embed": [3]}))
    held = [(path, name, tensor) for path, part in made.parts.items() for name, tensor in tensors_of(part).items()]
    before = [tensor.clone() for _, _, tensor in held]
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.zero_()
    assert {name for _, name, _ in held} == {"a", "b", "ids", "rows"}
    assert all(torch.equal(tensor, was) and was.abs().max() > 0 for (*_, tensor), was in zip(held, before, strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.parts["up"].a = before[0]


def test_tensors_are_in_the_bases_dtype_and_their_bytes_are_counted():
    _, made = packed(dtype=torch.bfloat16)
    assert {part.a.dtype for part in made.parts.values()} == {torch.bfloat16}
    assert made.bytes == 2 * 3 * (7 + 13 + 11 + 7) and made.rank == 3


def test_what_has_no_low_rank_part_has_rank_0():
    model = toy()
    lofi.add_adapter(model, lofi.LoraConfig(target_modules=["up"], r=2, trainable_token_indices={"embed": [3]}))
    assert pack(model).rank == 2
    del model.lofi_registry.adapters["default"].parts["up"]
    assert pack(model).rank == 0


REFUSED = {
    "a head trained in full": (lofi.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]), "head is copy"),
    "biases": (lofi.BitFitConfig(), "norm is bias"),
    "biases beside LoRA": (lofi.LoraConfig(r=2, target_modules=["up"], bias="all"), "norm is bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_share_a_batch_is_refused_by_name(kind):
    config, told = REFUSED[kind]
    model = toy()
    lofi.add_adapter(model, config)
    with pytest.raises(TargetError, match=rf"cannot share a batch with others: .*{told}.*merge it into the base"):
        pack(model)
    model(ids())  # and is still there


@pytest.mark.parametrize("config", [lofi.HoulsbyConfig(), lofi.PrefixConfig(), lofi.PromptConfig()])
def test_other_methods_are_refused(config):
    model = family_model("llama")
    lofi.add_adapter(model, config)
    with pytest.raises(TargetError, match="adapter 'default' cannot share a batch with others: its part at "):
        pack(model)


def test_fused_experts_and_single_experts_are_refused():
    model = family_model("mixtral")
    lofi.add_adapter(model, lofi.LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    with pytest.raises(TargetError, match="experts is experts"):
        pack(model)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    mixture = Mixture()
    lofi.add_adapter(mixture, lofi.LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(TargetError, match=r"experts\.0 is one expert of a mixture, which sees the tokens in an order"):
        pack(mixture)
