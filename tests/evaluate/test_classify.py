"""Chosen labels and tags: those of the rows alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from lofi.errors import RequestError
from lofi.evaluate.classify import choose_label_sets, choose_labels, choose_tags

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(kind=BertForSequenceClassification):
    torch.manual_seed(1)
    model = kind(BertConfig(num_labels=5, initializer_range=0.6, **SIZES))
    return model.eval()


def llama(pad):
    torch.manual_seed(1)
    config = LlamaConfig(num_labels=5, pad_token_id=pad, initializer_range=0.6, **SIZES)
    return LlamaForSequenceClassification(config).eval()


def rows(seed: int = 0, count: int = 20):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [rng.randint(5, 49) for _ in range(rng.randint(2, 15))]
        labels = [rng.choice([-100, 0, 1]) for _ in ids]
        found.append(SimpleNamespace(input_ids=ids, labels=labels))
    return found


def logits(model, row) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids])).logits[0]


MAKERS = {"bert": bert, "llama": lambda: llama(0), "llama without pad": lambda: llama(None)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_labels_are_those_of_each_row_alone(make, batch_tokens):
    model, examples = make(), rows()
    expected = [int(logits(model, row).argmax()) for row in examples]
    assert choose_labels(model, examples, batch_tokens=batch_tokens) == expected
    assert len(set(expected)) > 1


def test_label_sets_are_those_above_the_threshold():
    model, examples = bert(), rows()
    expected = [(logits(model, row).sigmoid() > 0.6).nonzero().flatten().tolist() for row in examples]
    assert choose_label_sets(model, examples, batch_tokens=60, threshold=0.6) == expected
    assert {len(one) for one in expected} >= {1, 2}


def test_tags_are_taken_where_a_label_stands():
    model, examples = bert(BertForTokenClassification), rows(seed=2)
    expected = [
        [int(tag) for tag, label in zip(logits(model, row).argmax(-1), row.labels, strict=True) if label != -100]
        for row in examples
    ]
    assert choose_tags(model, examples, batch_tokens=60) == expected


def test_the_mode_comes_back_and_progress_is_told():
    model, seen = bert().train(), []
    choose_labels(model, rows(), batch_tokens=60, on_done=seen.append)
    assert model.training
    assert seen[-1] == 20


def test_an_impossible_threshold_is_refused():
    with pytest.raises(RequestError, match="threshold is 1"):
        choose_label_sets(bert(), rows(), threshold=1.0)
