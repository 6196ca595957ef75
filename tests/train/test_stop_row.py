"""A stop token that the frozen head cannot tell from others gets its own row trained."""

from __future__ import annotations

from types import SimpleNamespace

import lofi
from lofi.train.job import with_stop_row


def rule(*stops: int) -> SimpleNamespace:
    return SimpleNamespace(stop_ids=list(stops))


def test_the_row_of_a_stop_token_that_pretraining_never_saw_is_trained_and_said(lofi_tiny):
    config, note = with_stop_row(lofi.load_model(lofi_tiny), lofi.LoraConfig(), rule(3, 1))
    assert config.trainable_token_indices == [3]
    assert "id 3" in note
    assert "its own row trains too" in note


def test_a_stop_token_that_stands_apart_needs_nothing(lofi_tiny):
    config, note = with_stop_row(lofi.load_model(lofi_tiny), lofi.LoraConfig(), rule(1))
    assert (config.trainable_token_indices, note) == (None, None)


def test_what_the_user_asked_for_stands(lofi_tiny):
    model = lofi.load_model(lofi_tiny)
    for asked in (lofi.LoraConfig(trainable_token_indices=[7]), lofi.LoraConfig(target_modules=["embed_tokens"])):
        assert with_stop_row(model, asked, rule(3)) == (asked, None)


def test_an_untied_head_is_named_as_the_remedy(lofi_tiny):
    import torch

    model = lofi.load_model(lofi_tiny)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    config, note = with_stop_row(model, lofi.LoraConfig(), rule(3))
    assert config.trainable_token_indices is None
    assert "add the output head to lora.target_modules" in note
