"""Prefix and prompt folders: real PEFT loads ours, we load PEFT's, and what neither can mean is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tests.adapters.virtual_models import DECODERS, P, some_ids, stirred, virtual_model
from tests.files.families import family_model, logits

import lofi
from lofi.adapters.methods import MixedConfig, PrefixConfig, PromptConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import AdapterFileError, LofiWarning
from lofi.files.adapter_folder import read_folder
from lofi.files.layout import save_safetensors

PREFIX, PROMPT = PrefixConfig(num_virtual_tokens=P), PromptConfig(num_virtual_tokens=P)


def in_peft(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def made_by_peft(model, folder, kind, **config):
    """A folder that PEFT wrote, and the logits of its model."""
    import peft

    torch.manual_seed(7)
    theirs = peft.get_peft_model(model, getattr(peft, kind)(num_virtual_tokens=P, **config)).eval()
    theirs.save_pretrained(str(folder))
    return theirs


def loaded(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LofiWarning)  # PEFT's folders do not say which base they belong to
        lofi.load_adapter(model, folder)
    return model


@pytest.mark.parametrize("config", [PREFIX, PROMPT], ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_peft_loads_ours_with_the_same_logits_and_gradients(family, config, tmp_path):
    model, ids = stirred(virtual_model(family), config), some_ids()
    lofi.save_adapter(model, tmp_path / "a")
    theirs = in_peft(virtual_model(family), tmp_path / "a")
    theirs.prompt_encoder.requires_grad_(True)
    their_logits = theirs(ids).logits[:, -9:]  # joined embeddings give the prompt's positions too
    our_logits = model(ids).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-5)
    (tensor,) = adapter_tensors(model).values()
    (ours,) = torch.autograd.grad(our_logits.square().sum(), tensor)
    (other,) = torch.autograd.grad(their_logits.square().sum(), theirs.prompt_encoder["default"].embedding.weight)
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
def test_we_load_pefts_with_the_same_logits(family, kind, tmp_path):
    theirs = made_by_peft(virtual_model(family), tmp_path / "a", kind, task_type="CAUSAL_LM")
    model = loaded(virtual_model(family), tmp_path / "a")
    with torch.no_grad():
        expected = theirs(some_ids()).logits[:, -9:]
        torch.testing.assert_close(model(some_ids()).logits, expected, rtol=0, atol=1e-5)


def test_a_projection_is_gone_from_the_file_and_pefts_own_loads(tmp_path):
    config = PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=7)
    model = stirred(virtual_model("llama"), config)
    lofi.save_adapter(model, tmp_path / "ours")
    again = lofi.load_adapter(other := virtual_model("llama"), tmp_path / "ours")
    assert list(again.tensors) == ["prompt_embeddings"]
    assert not again.config.prefix_projection
    assert torch.equal(other(some_ids()).logits, model(some_ids()).logits)
    options = {"prefix_projection": True, "encoder_hidden_size": 9, "task_type": "CAUSAL_LM"}
    theirs = made_by_peft(virtual_model("llama"), tmp_path / "theirs", "PrefixTuningConfig", **options)
    with torch.no_grad():
        mine = loaded(virtual_model("llama"), tmp_path / "theirs")(some_ids()).logits
        torch.testing.assert_close(mine, theirs(some_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "bert_tags", "roberta"])
def test_encoders_with_their_heads_go_there_and_back(family, tmp_path):
    model = stirred(family_model(family), PROMPT)
    lofi.save_adapter(model, tmp_path / "a")
    theirs, expected = in_peft(family_model(family), tmp_path / "a"), logits(model)
    tail = slice(-9, None) if family == "bert_tags" else slice(None)
    torch.testing.assert_close(logits(theirs)[:, tail], expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(loaded(family_model(family), tmp_path / "a")), expected)
    theirs.save_pretrained(str(tmp_path / "b"))
    torch.testing.assert_close(logits(loaded(family_model(family), tmp_path / "b")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_prompt_of_an_encoder_decoder_goes_there_and_back(family, tmp_path):
    model = stirred(virtual_model(family), PROMPT)
    lofi.save_adapter(model, tmp_path / "a")
    theirs, ids = in_peft(virtual_model(family), tmp_path / "a"), some_ids()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
        made_by_peft(virtual_model(family), tmp_path / "b", "PromptTuningConfig", task_type="SEQ_2_SEQ_LM")
        with pytest.raises(AdapterFileError, match="num_transformer_submodules=1"):
            lofi.load_adapter(virtual_model(family), tmp_path / "b")


def test_a_prefix_of_an_encoder_decoder_has_a_type_that_peft_refuses(tmp_path):
    from peft import PeftModel

    model = stirred(virtual_model("t5"), PREFIX)
    lofi.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LOFI_PREFIX_TUNING"
    assert torch.equal(logits(loaded(virtual_model("t5"), tmp_path / "a")), logits(model))
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(virtual_model("t5"), str(tmp_path / "a"))
    made_by_peft(virtual_model("t5"), tmp_path / "b", "PrefixTuningConfig", task_type="SEQ_2_SEQ_LM")
    with pytest.raises(AdapterFileError, match="every other layer twice"):
        lofi.load_adapter(virtual_model("t5"), tmp_path / "b")


@pytest.mark.parametrize("other", [PREFIX, PROMPT, PrefixConfig(num_virtual_tokens=P, prefix_projection=True)],
                         ids=["prefix", "prompt", "projection"])  # fmt: skip
def test_lora_beside_virtual_tokens_is_one_folder(other, tmp_path):
    model = stirred(virtual_model("llama"), MixedConfig(configs=(lofi.LoraConfig(r=3, lora_alpha=5), other)))
    lofi.save_adapter(model, tmp_path / "a")
    again = virtual_model("llama")
    lofi.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(some_ids(), **options), model.generate(some_ids(), **options))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_takes_virtual_tokens(kind, tmp_path):
    from tests.quantized_models import quantized

    wide = {"hidden_size": 64, "intermediate_size": 128}
    for config in (PREFIX, PROMPT):
        base = quantized(virtual_model("llama", **wide), kind)
        expected = base(some_ids()).logits
        model = stirred(base, config)
        folder = lofi.save_adapter(model, tmp_path / config.method)
        got = model(some_ids(), labels=some_ids())
        got.loss.backward()
        assert all(tensor.grad.abs().max() > 0 for tensor in adapter_tensors(model).values())
        with lofi.adapters_off(model):
            assert torch.equal(model(some_ids()).logits, expected)
        again = quantized(virtual_model("llama", **wide), kind)
        lofi.load_adapter(again, folder)
        assert torch.equal(again(some_ids()).logits, got.logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_virtual_tokens": 6}, r"prompt_embeddings has shape \(5, 72\).*say \(6, 72\)"),
     ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
     ({"num_transformer_submodules": 2}, "num_transformer_submodules=1|every other layer"),
     ({"prefix_dropout": 0.1}, "prefix_dropout is 0.1")],
)  # fmt: skip
def test_what_a_folder_cannot_mean_is_refused_by_name(changes, said, tmp_path):
    lofi.save_adapter(stirred(virtual_model("llama"), PREFIX), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterFileError, match=said):
        lofi.load_adapter(virtual_model("llama"), tmp_path / "a")


def test_an_unknown_key_that_is_not_in_use_is_noted(tmp_path):
    lofi.save_adapter(stirred(virtual_model("llama"), PROMPT), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_thing": None, "task_type": "QUESTION_ANS"}))
    notes = " ".join(read_folder(tmp_path / "a").notes)
    assert "unknown key 'new_thing'" in notes
    assert "QUESTION_ANS" in notes


@pytest.mark.parametrize("kind", ["P_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_other_prompt_learning_of_peft_stays_refused(kind, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_safetensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": torch.zeros(P, 24)})
    with pytest.raises(AdapterFileError, match=f"peft_type is '{kind}'"):
        lofi.load_adapter(virtual_model("llama"), tmp_path)
