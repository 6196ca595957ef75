"""Tasks, heads and tied names, asked of real classes."""

from __future__ import annotations

import pytest

from lofi.errors import ModelError
from lofi.models.counting import meta_model
from lofi.models.facts import (
    backbone,
    check_task,
    head_names,
    linear_counts,
    output_head_name,
    task_of,
    tied_groups,
    twin_tokens,
)
from lofi.models.load import load_model


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        ("llama", None, "CAUSAL_LM"),
        ("gpt2", None, "CAUSAL_LM"),
        ("t5", None, "SEQ_2_SEQ_LM"),
        ("bart", None, "SEQ_2_SEQ_LM"),
        ("bert", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("distilbert", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("llama", "AutoModelForSequenceClassification", "SEQ_CLS"),
    ],
)
def test_the_task_is_what_the_class_is_for(tiny, family, head, task):
    assert task_of(tiny.model(family, head=head)) == task


def test_a_model_without_a_task_is_refused(tiny):
    for head in ("AutoModel", "AutoModelForMaskedLM"):
        with pytest.raises(ModelError, match="has none of the tasks CAUSAL_LM"):
            task_of(tiny.model("bert", head=head))
    with pytest.raises(ModelError, match=r"did you mean TOKEN_CLS\?"):
        check_task("token_class")


def test_the_head_is_every_part_outside_the_backbone_and_every_new_tensors_owner(tiny):
    sequence, token = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
    assert head_names(tiny.model("llama", head=sequence)) == ["score"]
    assert head_names(tiny.model("bert", head=token)) == ["classifier"]
    assert head_names(tiny.model("distilbert", head=sequence)) == ["pre_classifier", "classifier"]
    bert = tiny.model("bert", head=sequence)
    bert.lofi_new_tensors = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.weight"]
    assert head_names(bert) == ["classifier", "bert.pooler.dense"]
    assert head_names(tiny.model("llama")) == [] == head_names(tiny.model("t5"))


def test_the_backbone_and_the_output_head_are_found(tiny):
    llama = tiny.model("llama")
    assert backbone(llama) is llama.model
    assert output_head_name(llama) == "lm_head" == output_head_name(tiny.model("t5"))
    assert output_head_name(tiny.model("llama", head="AutoModelForSequenceClassification")) is None


def test_names_of_one_tensor_form_a_group(tiny):
    assert tied_groups(tiny.model("llama")) == []
    assert tied_groups(tiny.model("llama_tied")) == [["lm_head.weight", "model.embed_tokens.weight"]]
    assert tied_groups(tiny.model("t5")) == [
        ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"]
    ]
    assert tied_groups(meta_model(tiny.config("llama_tied"))) == [["lm_head.weight", "model.embed_tokens.weight"]]


def test_matrices_are_counted_by_last_name_and_shape(tiny):
    counts = linear_counts(tiny.model("llama"))
    assert counts["q_proj", "24 x 24 Linear"] == 2 and counts["k_proj", "12 x 24 Linear"] == 2
    assert counts["embed_tokens", "97 x 24 Embedding"] == 1
    assert linear_counts(tiny.model("gpt2"))["c_attn", "24 x 72 Conv1D"] == 2


def test_tokens_that_pretraining_never_saw_are_twins_and_others_are_not(lofi_tiny):
    model = load_model(lofi_tiny)
    assert twin_tokens(model, 3) > 50  # <|im_end|>, which the shipped model never saw
    assert twin_tokens(model, 1) == 0  # <|endoftext|>, which it did


def test_a_model_without_an_output_head_has_no_twins(tiny):
    assert twin_tokens(tiny.model("bert", head="AutoModelForSequenceClassification"), 3) == 0
