"""Golden prompts say the same again, and where a difference begins."""

from __future__ import annotations

import json

import pytest
import torch

from files.families import adapted, family_model
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapter_tensors
from lofi.adapters.switch import adapters_off
from lofi.files.golden import make_golden, replay, replay_forced
from quantized_models import quantized


def recorded(model, *args, **more) -> dict:
    return json.loads(json.dumps(make_golden(model, *args, **more)))


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "bert_tags", "gpt2"])
def test_the_same_model_says_the_same(family):
    model = adapted(family)
    golden = recorded(model)
    assert replay(model, golden) == []
    assert replay(merge_in_memory(model), golden) == []
    with adapters_off(model):
        assert {d.level for d in replay(model, golden)} == {"logits"}


def test_a_slightly_other_adapter_is_noticed_at_the_logits():
    model = adapted("llama")
    golden = recorded(model)
    for key, tensor in adapter_tensors(model).items():
        if key.endswith("lora_B"):
            tensor.data.mul_(1.01)
    difference = replay(model, golden)[0]
    assert difference.level == "logits" and "tolerance" in str(difference)


def test_bfloat16_is_given_room_but_not_for_another_adapter():
    model = adapted("llama").to(torch.bfloat16)
    golden = recorded(model, [[5, 6, 7]])
    assert replay(model, golden) == [] and golden["tolerance"] > 0.01
    for key, tensor in adapter_tensors(model).items():
        if key.endswith("lora_B"):
            tensor.data.mul_(1.03)  # no logit is off by more than one may be, all of them are by more than the mean may
    for said in (replay(model, golden), replay_forced(model, golden)):
        assert [d.level for d in said] == ["logits"] and "on average" in said[0].detail


def test_packed_weights_are_given_the_room_of_the_dtype_they_multiply_in():
    model = quantized(family_model("llama"), "nf4")  # float32 but for its products
    golden = recorded(model, [[5, 6, 7]])
    assert replay(model, golden) == [] and golden["tolerance"] > 0.01
    for module in model.modules():
        if hasattr(module, "packed_shapes"):
            module.compute_dtype = torch.float32
    assert recorded(model, [[5, 6, 7]])["tolerance"] < 0.001
    assert replay(model, golden) == []


def test_the_output_is_greedy_and_stops_at_a_stop_id():
    model = family_model("llama")
    golden = recorded(model, [[5, 9, 20]], max_new_tokens=6)
    output = golden["prompts"][0]["output"]
    theirs = model.generate(torch.tensor([[5, 9, 20]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert output == theirs[0, 3:].tolist() and not golden["prompts"][0]["stopped"]
    stop = output[3]
    stopped = recorded(model, [[5, 9, 20]], max_new_tokens=6, stop_ids=[stop])
    assert stopped["prompts"][0]["output"] == output[: output.index(stop) + 1] and stopped["prompts"][0]["stopped"]
    assert [d.level for d in replay(model, {**stopped, "stop_ids": []})] == ["stop"]


def test_a_tokenizer_that_splits_otherwise_is_noticed_first():
    model = family_model("llama")
    golden = recorded(model, [[5, 9]], texts=["ab"])

    def tokenizer(ids):
        return lambda text, add_special_tokens: {"input_ids": ids}

    assert replay(model, golden, tokenizer=tokenizer([5, 9])) == []
    difference = replay(model, golden, tokenizer=tokenizer([5, 8, 9]))[0]
    assert difference.level == "ids" and "3 tokens, recorded are 2, first other at 1" in difference.detail


def test_a_float32_record_is_replayed_by_a_bfloat16_model():
    model = adapted("llama")
    golden = recorded(model)
    assert replay(model.to(torch.bfloat16), golden) == []


def test_a_record_says_in_which_dtype_the_model_spoke():
    model = adapted("llama")
    assert recorded(model)["dtype"] == "fp32"
    assert recorded(model.to(torch.bfloat16))["dtype"] == "bf16"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_forward_along_the_record_says_what_the_replay_says(family):
    model = adapted(family)
    golden = recorded(model, max_new_tokens=6)
    assert replay_forced(model, golden) == []
    with adapters_off(model):
        assert [d.prompt for d in replay_forced(model, golden)] == [d.prompt for d in replay(model, golden)] != []


def test_one_forward_along_the_record_notices_a_slightly_other_adapter_and_another_likeliest_token():
    model = adapted("llama")
    golden = recorded(model)
    last = golden["prompts"][2]["top"][-1]
    last[-1][1] += 2 * golden["tolerance"]
    assert [(d.prompt, d.level) for d in replay_forced(model, golden)] == [(2, "logits")]
    golden = recorded(model)
    del golden["prompts"][1]["top"][5][0]
    (difference,) = replay_forced(model, golden)
    assert difference.prompt == 1 and "step 5, the largest logit is" in difference.detail
