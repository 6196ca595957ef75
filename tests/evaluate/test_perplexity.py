"""Losses per example: the model's own, whatever stands beside it in the batch."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from lofi.errors import RequestError
from lofi.evaluate import perplexity
from lofi.evaluate.intervals import bootstrap, exp_ratio
from lofi.evaluate.perplexity import token_losses


def examples_for(model, *, count: int = 9, seed: int = 0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randint(0, 66) for _ in range(rng.randint(3, 30))]
        if model.config.is_encoder_decoder:
            labels = [rng.randint(1, 66) for _ in range(rng.randint(1, 20))]
        else:
            start = rng.randint(0, len(ids) - 1)
            labels = [-100] * start + ids[start:]
            labels[-1] = ids[-1]
            if start + 2 < len(ids):
                labels[start + 1] = -100  # a hole, as between two turns of an assistant
        rows.append(SimpleNamespace(input_ids=ids, labels=labels))
    return rows


def own_loss(model, example) -> tuple[float, int]:
    labels = torch.tensor([example.labels])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([example.input_ids]), labels=labels, use_cache=False).loss
    tokens = int(((labels if model.config.is_encoder_decoder else labels[:, 1:]) != -100).sum())
    return float(loss) * tokens, tokens


def test_every_example_has_the_models_own_loss(family):
    examples = examples_for(family)
    found = token_losses(family, examples, batch_tokens=100)
    expected = np.array([own_loss(family, example) for example in examples])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(set(expected[:, 1])) > 3


def test_the_batch_changes_no_loss(family):
    examples = examples_for(family, seed=1)
    alone = token_losses(family, examples, batch_tokens=1)
    np.testing.assert_allclose(token_losses(family, examples, batch_tokens=10_000), alone, rtol=1e-5)


def test_capped_logits_are_the_models_own():
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes["head_dim"] = 8
    config = Gemma2Config(vocab_size=67, num_hidden_layers=2, final_logit_softcapping=1.5, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    examples = examples_for(model, count=4)
    expected = np.array([own_loss(model, example) for example in examples])
    np.testing.assert_allclose(token_losses(model, examples), expected, rtol=1e-5)
    model.config.final_logit_softcapping = None
    assert abs(own_loss(model, examples[0])[0] / expected[0, 0] - 1) > 1e-2  # the cap matters here


def test_a_vocabulary_too_large_for_the_batch_makes_smaller_batches_and_the_same_losses(tiny_llama, monkeypatch):
    model = tiny_llama()
    examples = examples_for(model)
    whole, seen = token_losses(model, examples), []
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 67 * 40)
    np.testing.assert_allclose(token_losses(model, examples, on_done=seen.append), whole, rtol=1e-5)
    assert len(seen) > 2
    assert seen[-1] == len(examples)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens(tiny_llama):
    model = tiny_llama()
    examples = examples_for(model)
    losses, tokens = zip(*(own_loss(model, example) for example in examples), strict=True)
    found = bootstrap(token_losses(model, examples), exp_ratio)
    assert found.value == pytest.approx(np.exp(sum(losses) / sum(tokens)), rel=1e-5)
    assert found.low < found.value < found.high


def test_dropout_is_off_and_the_mode_comes_back(tiny_llama):
    model = tiny_llama(attention_dropout=0.5)
    examples = examples_for(model)
    calm = token_losses(model, examples)
    np.testing.assert_array_equal(token_losses(model.train(), examples), calm)
    assert model.training


def test_an_example_without_a_label_is_refused(tiny_llama):
    examples = [SimpleNamespace(input_ids=[1, 2], labels=labels) for labels in ([-100, 2], [1, -100])]
    with pytest.raises(RequestError, match="example 1"):
        token_losses(tiny_llama(), examples)
