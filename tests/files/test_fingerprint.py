"""The base is recognised whatever its dtype, and another base is told apart in words."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lofi
from files.families import adapted, family_model, stir
from lofi.adapters.registry import base_state
from lofi.files.fingerprint import base_fingerprint, compare
from lofi.files.quantized import packed_weights
from quantized_models import quantized


def stored(model, **more) -> dict:
    return json.loads(json.dumps(base_fingerprint(model, **more)))


def test_the_same_base_has_no_reasons_and_the_same_digest():
    a, b = stored(family_model("llama")), stored(family_model("llama"))
    assert compare(a, b) == [] and a["digest"] == b["digest"]


@pytest.mark.parametrize("origin", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_is_the_same_base_in_every_dtype(origin, loaded):
    checkpoint = family_model("llama", dtype=origin)
    with torch.no_grad():  # weights of every size, also those that fp16 keeps only in part
        for i, parameter in enumerate(checkpoint.parameters()):
            parameter.mul_(10.0 ** -(i % 7))
    record = stored(checkpoint)
    assert compare(record, stored(checkpoint.to(loaded))) == []
    assert compare(stored(checkpoint), record) == []


def test_an_adapter_of_any_kind_leaves_the_fingerprint_alone():
    plain = stored(family_model("llama"))
    model = adapted("llama", target_modules=["q_proj", "embed_tokens"], bias="all")
    assert stored(model) == plain


def test_other_weights_of_the_same_shape_are_counted_and_the_first_is_named():
    record, model = stored(family_model("llama")), family_model("llama")
    with torch.no_grad():
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            model.get_parameter(name).mul_(1.05)
    total = len(base_state(model))
    expected = f"same shapes, other weights: 2 of {total} tensors differ, first: model.layers.0.mlp.up_proj.weight"
    assert compare(record, stored(model)) == [expected]


def test_many_steps_of_one_are_other_weights_too():
    record, model = stored(family_model("llama")), family_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2.0**-8)  # about half a bfloat16 step
    assert "other weights" in compare(record, stored(model))[0]


def test_another_seed_is_another_base():
    reasons = compare(stored(family_model("llama")), stored(family_model("llama", seed=1)))
    assert len(reasons) == 1 and "same shapes, other weights" in reasons[0]


def test_another_architecture_is_told_by_its_numbers():
    reasons = compare(stored(family_model("llama")), stored(family_model("llama", hidden_size=48, num_hidden_layers=3)))
    assert "hidden_size 48 against 24" in reasons and "num_hidden_layers 3 against 2" in reasons
    assert any(r.startswith("9 tensors of this base are new") for r in reasons)
    assert any("other shapes, first: " in r for r in reasons)


def test_what_does_not_change_the_function_does_not_count():
    a, b = family_model("llama"), family_model("llama", use_cache=False, attention_dropout=0.3)
    b.config._name_or_path = "/somewhere/else"
    assert compare(stored(a), stored(b)) == []


def test_rope_does_count():
    parameters = {"rope_type": "default", "rope_theta": 500000.0}
    reasons = compare(stored(family_model("llama")), stored(family_model("llama", rope_parameters=parameters)))
    assert reasons == ["rope_parameters.rope_theta 500000.0 against 10000.0"]


def test_a_field_that_only_a_newer_release_writes_is_ignored():
    record = stored(family_model("llama"))
    record["architecture"]["from_the_future"] = 3
    assert compare(record, stored(family_model("llama"))) == []


def test_a_resized_vocabulary_is_another_base_unless_the_record_was_resized_too():
    def resized():
        model = family_model("llama")
        torch.manual_seed(4)
        model.resize_token_embeddings(60, mean_resizing=False)
        return model

    assert compare(stored(resized()), stored(resized())) == []
    reasons = compare(stored(family_model("llama")), stored(resized()))
    assert "vocab_size 60 against 53" in reasons


def test_a_new_head_does_not_count_on_either_side():
    def classifier(seed):
        model = family_model("bert", seed=0)
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight)
        return model

    trained = classifier(1)
    lofi.add_adapter(trained, lofi.LoraConfig(r=3))
    stir(trained)
    fresh = classifier(2)
    assert compare(stored(trained), stored(fresh)) == []
    fresh_only = classifier(2)
    fresh_only.lofi_new_tensors = ["classifier.weight"]
    assert compare(stored(fresh_only), stored(classifier(3))) == []
    assert compare(stored(classifier(1)), stored(classifier(2)))


def test_a_plain_module_and_odd_tensors_work():
    class Odd(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(float(fill)))
            self.register_buffer("count", torch.tensor([1, 2, 3]))
            self.register_buffer("none", torch.empty(0, 3))
            self.turned = nn.Parameter(torch.arange(15.0).reshape(3, 5).t())

    assert compare(stored(Odd(1)), stored(Odd(1))) == []
    assert compare(stored(Odd(1)), stored(Odd(2))) == [
        "same shapes, other weights: 1 of 4 tensors differ, first: scalar"
    ]


@pytest.mark.parametrize("kind", ["nf4", "nf4 single", "int8"])
def test_a_quantized_base_is_its_dense_origin(kind):
    dense, packed = stored(family_model("llama")), stored(quantized(family_model("llama"), kind))
    assert packed == dense  # names, shapes, samples, digest
    other = stored(quantized(family_model("llama", seed=1), kind))
    assert "same shapes, other weights" in compare(dense, other)[0]
    assert "same shapes, other weights" in compare(other, dense)[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_experts_are_their_dense_origin(kind, tmp_path):
    family_model("mixtral").save_pretrained(tmp_path / "mixtral")
    packed = lofi.load_model(tmp_path / "mixtral", quantization=kind, device="cpu")
    assert any("experts.down_proj" in weight.full_name for weight in packed_weights(packed))
    assert stored(packed)["digest"] == stored(lofi.load_model(tmp_path / "mixtral", device="cpu"))["digest"]


def test_a_quantized_base_that_nobody_sampled_is_compared_by_its_shapes_alone():
    dense, unknown = stored(family_model("llama")), stored(quantized(family_model("llama"), "nf4", sampled=False))
    assert compare(dense, unknown) == compare(unknown, dense) == []
    for seed in (0, 1):  # embeddings and norms are dense: another base is still told by them
        other = stored(quantized(family_model("llama", seed=seed + 1), "nf4", sampled=False))
        assert "other weights" in compare(dense, other)[0]
    wider = stored(quantized(family_model("llama", intermediate_size=36), "nf4", sampled=False))
    assert any("other shapes" in reason for reason in compare(dense, wider))


def test_an_adapter_on_a_quantized_base_leaves_its_fingerprint_alone():
    plain = stored(quantized(family_model("llama"), "nf4"))
    model = quantized(family_model("llama"), "nf4")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7))
    stir(model)
    assert stored(model) == plain


def test_a_weight_stored_the_other_way_round_is_its_packed_form_too(tmp_path):
    dense = family_model("gpt2")
    dense.save_pretrained(tmp_path / "gpt2")
    for kind in ("nf4", "int8"):
        packed = lofi.load_model(tmp_path / "gpt2", quantization=kind, device="cpu")
        assert compare(stored(dense), stored(packed)) == compare(stored(packed), stored(dense)) == []
        assert stored(packed)["digest"] == stored(dense)["digest"]
        packed.save_pretrained(tmp_path / kind)
        again = lofi.load_model(tmp_path / kind, device="cpu")
        assert stored(again)["digest"] == stored(dense)["digest"]
