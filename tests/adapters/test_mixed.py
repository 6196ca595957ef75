"""Several methods as one adapter."""

from __future__ import annotations

import pytest
import torch

import lofi
from adapters.models import ids, stir, toy
from files import families
from files.families import family_model
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.methods import BitFitConfig, HoulsbyConfig, LastLayersConfig, MixedConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import RecipeError, TargetError

LORA = lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
HOULSBY = HoulsbyConfig(bottleneck_size=5)


def test_each_method_acts_as_it_would_alone():
    together = family_model("llama")
    base = families.logits(together)
    lofi.add_adapter(together, MixedConfig(configs=[LORA, HOULSBY]))
    assert torch.equal(families.logits(together), base)
    families.stir(together)
    apart = family_model("llama")
    for name, config in (("lora", LORA), ("houlsby", HOULSBY)):
        lofi.add_adapter(apart, config, name)
        with torch.no_grad():
            for key, tensor in adapter_tensors(apart, name).items():
                tensor.copy_(adapter_tensors(together)[key])
    lofi.set_adapter(apart, ["lora", "houlsby"])
    assert torch.equal(families.logits(together), families.logits(apart))
    for alone in ("lora", "houlsby"):
        with lofi.using(apart, alone):
            assert not torch.allclose(families.logits(together), families.logits(apart), atol=1e-2)
    lofi.unload(together)
    assert torch.equal(families.logits(together), base)


def test_what_merges_apart_merges_together():
    model = toy()
    lora = lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["embed"])
    lofi.add_adapter(model, MixedConfig(configs=[lora, BitFitConfig()]))
    stir(model)
    assert torch.allclose(merge_in_memory(model)(ids()), model(ids()), atol=1e-5)
    assert not torch.allclose(toy()(ids()), model(ids()), atol=1e-2)


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ([lofi.LoraConfig(r=3), HOULSBY], r"two methods of one adapter adapt model\.layers\.0\.\S*down_proj; leave it"),
        ([lofi.LoraConfig(r=3), LastLayersConfig(num_layers=1)], r"layers\.1 trains in full and model\.layers\.1\."),
        ([LastLayersConfig(num_layers=1), HOULSBY], r"model\.layers\.1 trains in full and .* is adapted inside it"),
        ([LORA, BitFitConfig()], "BitFit trains biases, but this LlamaForCausalLM has none"),
    ],
)  # fmt: skip
def test_methods_that_would_hide_each_other_are_refused(configs, words):
    model = family_model("llama")
    with pytest.raises(TargetError, match=words):
        lofi.add_adapter(model, MixedConfig(configs=configs))
    assert "lofi_registry" not in model.__dict__


@pytest.mark.parametrize("configs", [[LORA], [], [LORA, LORA], [LORA, MixedConfig()]])
def test_a_mixture_needs_two_different_methods(configs):
    with pytest.raises(RecipeError, match=r"expected at least two of different methods"):
        MixedConfig(configs=configs)
