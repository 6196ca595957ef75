"""Checkpointed layers give the same gradients, with the adapter of the forward."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import LoraConfig
from lofi.adapters.registry import adapter_tensors
from lofi.adapters.switch import set_adapter
from lofi.errors import ModelError
from lofi.models import checkpointing
from lofi.models.loss import LanguageModelLoss


def adapted(tiny, family, dropout=0.0):
    model = tiny.model(family).train()
    for name in ("default", "other"):
        add_adapter(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout), name=name)
        generator = torch.Generator().manual_seed(len(name))
        for tensor in adapter_tensors(model, name).values():
            nn.init.normal_(tensor, std=0.1, generator=generator)
    return model


def gradients(model, between=lambda: None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 9), generator=generator)
    model.zero_grad()
    torch.manual_seed(4)
    loss = LanguageModelLoss(model)(model, {"input_ids": ids, "labels": ids}).loss_sum
    between()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_gradients_equal_those_without_checkpointing_also_under_dropout(tiny, family):
    model = adapted(tiny, family, dropout=0.3)
    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpointing.enable(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found = gradients(model)
    checkpointing.disable(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert expected.keys() == found.keys() and len(expected) > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_recomputation_keeps_the_adapter_of_the_forward_when_the_default_changes_before_backward(tiny):
    model = adapted(tiny, "llama")
    set_adapter(model, "default")
    expected = gradients(model)
    checkpointing.enable(model)
    found = gradients(model, between=lambda: set_adapter(model, "other"))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_layers_are_really_computed_again_and_frozen_embeddings_carry_no_gradient(tiny):
    model = adapted(tiny, "llama")
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: embedded.append(out.requires_grad))
    checkpointing.enable(model)
    settled = LanguageModelLoss(model)
    settled.settle()
    calls.clear()
    embedded.clear()
    ids = torch.arange(3, 12)[None]
    settled(model, {"input_ids": ids, "labels": ids}).loss_sum.backward()
    assert len(calls) == 2 and embedded == [False]


def test_a_model_without_adapters_is_checkpointed_too_and_an_unable_one_refused(tiny):
    model = tiny.model("llama").train()
    expected = gradients(model)
    checkpointing.enable(model)
    found = gradients(model)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="LlamaForCausalLM does not support gradient checkpointing"):
        checkpointing.enable(model)
