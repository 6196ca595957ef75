"""A twin is the same model over the same memory, and what happens to one is not seen by the other."""

from __future__ import annotations

import threading

import pytest
import torch

import lofi
from adapters.mixes import mix, stir
from adapters.models import ids, toy
from files.families import V, family_model
from lofi.adapters.surgery import Adapted
from lofi.adapters.twin import twin
from quantized_models import quantized


def prompts() -> torch.Tensor:
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))


def model_of(kind: str):
    model = family_model("llama_tied")
    return quantized(model, kind) if kind != "dense" else model


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4", "int8"])
def test_every_tensor_is_in_the_same_memory_and_the_output_the_same_bits(kind):
    model = model_of(kind)
    made = twin(model)
    mine, its = dict(model.named_parameters()), dict(made.named_parameters())
    assert mine.keys() == its.keys() and all(mine[n].data_ptr() == its[n].data_ptr() for n in mine)
    assert all(b is dict(made.named_buffers())[n] for n, b in model.named_buffers())
    assert not {id(m) for m in model.modules()} & {id(m) for m in made.modules()}
    with torch.no_grad():
        assert torch.equal(made(prompts()).logits, model(prompts()).logits)


def test_what_is_tied_stays_tied_and_configs_are_its_own():
    model = family_model("llama_tied")
    made = twin(model)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.config is not model.config and made.generation_config is not model.generation_config
    assert made.config.to_dict() == model.config.to_dict()


def test_an_adapter_on_the_twin_leaves_the_model_as_trainable_and_as_plain_as_it_was():
    model = family_model("llama_tied")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    made = twin(model)
    lofi.add_adapter(made, lofi.LoraConfig(r=2, trainable_token_indices=[5]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable and any(trainable.values())
    assert not any(isinstance(m, Adapted) for m in model.modules()) and "lofi_registry" not in model.__dict__


def test_a_model_with_adapters_or_a_bank_has_a_twin_without():
    base = toy()(ids())
    model = toy()
    lofi.add_adapter(model, lofi.LoraConfig(r=2))
    stir(model, "default", 1)
    served = mix(toy(), lofi.LoraConfig(r=2, trainable_token_indices={"embed": [3]})).model
    for one in (model, served):
        made = twin(one)
        assert not any(isinstance(m, Adapted) or "adapters" in m._modules for m in made.modules())
        assert torch.equal(made(ids()), base)
        lofi.add_adapter(made, lofi.LoraConfig(r=3))
    assert "lofi_registry" in model.__dict__ and "lofi_bank" in served.__dict__


def test_the_model_answers_with_the_same_bits_while_adapters_come_and_go_on_its_twin():
    model = family_model("llama_tied")
    made, stop, faults = twin(model), threading.Event(), []
    with torch.no_grad():
        wanted = model(prompts()).logits

    def come_and_go() -> None:
        while not stop.is_set():
            lofi.add_adapter(made, lofi.LoraConfig(r=4, init_lora_weights=False))
            with torch.no_grad():
                if torch.equal(made(prompts()).logits, wanted):
                    faults.append("the adapter said nothing")
            lofi.unload(made, "default")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with torch.no_grad():
        same = [torch.equal(model(prompts()).logits, wanted) for _ in range(40)]
    stop.set()
    thread.join()
    assert all(same) and not faults
