"""Impossible values are refused where they are made, all at once."""

from __future__ import annotations

import pytest

import lofi


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 0}, "r is 0, expected a whole number of at least 1"),
        ({"r": True}, "r is True"),
        ({"r": 2.5}, "r is 2.5"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"bias": "some"}, "bias is 'some', expected one of 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "magic"}, "init_lora_weights is 'magic'"),
        ({"task_type": "CAUSAL"}, "task_type is 'CAUSAL'"),
        ({"target_modules": []}, "adapts nothing"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern\\[q_proj\\] is 0"),
        ({"layers_pattern": "layers"}, "layers_to_transform is not"),
    ],
)
def test_impossible_values_are_refused_with_what_was_expected(values, words):
    with pytest.raises(lofi.RecipeError, match=words):
        lofi.LoraConfig(**values)


def test_every_fault_is_reported_at_once():
    with pytest.raises(lofi.RecipeError) as error:
        lofi.LoraConfig(r=0, lora_alpha=-1, bias="x")
    assert all(word in str(error.value) for word in ("r is 0", "lora_alpha is -1", "bias is 'x'"))


def test_the_defaults_are_the_documented_ones():
    config = lofi.LoraConfig()
    assert (config.r, config.lora_alpha, config.target_modules, config.lora_dropout) == (16, 32, "all-linear", 0.0)
