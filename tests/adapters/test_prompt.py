"""Prompt tuning: equal to joining the embeddings, on decoders by their keys, on encoders by their input."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.virtual_models import DECODERS, P, some_ids, stirred, virtual_model
from tests.files.families import family_model

import lofi
from lofi.adapters.methods import MixedConfig, PromptConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import RecipeError, TargetError

CONFIG = PromptConfig(num_virtual_tokens=P)


def joined(model, ids):
    """Logits of the base on [prompt; input] embeddings, without the prompt's own positions."""
    (prompt,) = (t for key, t in adapter_tensors(model).items() if key.endswith("prompt_embeddings"))
    with lofi.adapters_off(model):
        own = model.get_input_embeddings()(ids)
        return model(inputs_embeds=torch.cat([prompt.expand(len(ids), -1, -1), own], dim=1)).logits[:, P:]


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_gives_the_logits_and_gradients_of_joined_embeddings(family):
    model, ids = stirred(virtual_model(family), CONFIG), some_ids()
    (tensor,) = adapter_tensors(model).values()
    ours, theirs = model(ids).logits, joined(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    (mine,) = torch.autograd.grad(ours.square().sum(), tensor)
    (other,) = torch.autograd.grad(theirs.square().sum(), tensor)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_what_trains_is_the_formula_of_the_lora_paper():
    """PreEmbed: D l_p (LoRA, arXiv 2106.09685, sec. 5.1)."""
    assert lofi.add_adapter(virtual_model("qwen3"), PromptConfig(num_virtual_tokens=7)).trainable == 24 * 7


@torch.no_grad()
def test_its_keys_are_computed_once_until_a_parameter_changes(monkeypatch):
    model, ids = stirred(virtual_model("llama"), CONFIG), some_ids()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[1]))
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    assert calls == [P, 9, 9]
    (tensor,) = adapter_tensors(model).values()
    tensor.mul_(2)
    assert not torch.equal(model(ids).logits, first)
    torch.testing.assert_close(model(ids).logits, joined(model, ids), rtol=0, atol=2e-5)
    model.model.layers[1].mlp.up_proj.weight.mul_(1.5)  # the base's own weights count too
    torch.testing.assert_close(model(ids).logits, joined(model, ids), rtol=0, atol=2e-5)


def test_steps_of_a_fused_optimizer_are_seen_between_evaluations():
    """A fused step changes a parameter without raising its version."""
    model, ids = stirred(virtual_model("llama"), CONFIG), some_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, joined(model, ids), rtol=0, atol=2e-5)
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, joined(model, ids), rtol=0, atol=2e-5)


@torch.no_grad()
def test_lora_beside_a_prompt_acts_on_the_prompt_too():
    mixed = MixedConfig(configs=(lofi.LoraConfig(r=3, lora_alpha=5), CONFIG))
    model, ids = stirred(virtual_model("llama"), mixed), some_ids()
    got = model(ids).logits
    tensors = adapter_tensors(model)
    prompt = tensors["model.prompt_embeddings"].clone()
    embeddings = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    merged = virtual_model("llama")
    lofi.add_adapter(merged, lofi.LoraConfig(r=3, lora_alpha=5))
    for key, tensor in adapter_tensors(merged).items():
        tensor.copy_(tensors[key])
    torch.testing.assert_close(merged(inputs_embeds=embeddings).logits[:, P:], got, rtol=0, atol=5e-5)
    tensors["model.layers.0.self_attn.k_proj.lora_B"].add_(1)  # known to the keys that are kept
    assert (model(ids).logits - got).abs().max() > 1e-3


@torch.no_grad()
def test_an_encoder_gives_every_token_its_own_place_and_a_classifier_the_first():
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    tags = stirred(family_model("bert_tags"), CONFIG)
    assert tags(input_ids=ids, attention_mask=mask).logits.shape == (2, 9, 3)
    padded = tags(input_ids=ids, attention_mask=mask).logits[0, :7]
    torch.testing.assert_close(padded, tags(input_ids=ids[:1, :7]).logits[0], rtol=0, atol=1e-5)
    classes = stirred(family_model("bert"), CONFIG)
    short = classes(input_ids=ids[:1, :7]).logits
    torch.testing.assert_close(classes(input_ids=ids, attention_mask=mask).logits[:1], short, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_reads_the_joined_input(family):
    model, ids = stirred(virtual_model(family), CONFIG), some_ids()
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    batch = {"attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    ours = model(input_ids=ids, **batch).logits
    (prompt,) = adapter_tensors(model).values()
    with lofi.adapters_off(model):
        own = model.get_input_embeddings()(ids)
        both = torch.cat([prompt.expand(2, -1, -1), own], dim=1)
        wide = {**batch, "attention_mask": torch.nn.functional.pad(mask, (P, 0), value=1)}
        theirs = model(inputs_embeds=both, **wide).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(input_ids=ids, attention_mask=mask, **options)
    alone = model.generate(input_ids=ids[:1, :7], **options)[0]
    assert torch.equal(written[0, : len(alone)], alone)


def test_the_start_is_rows_of_the_vocabulary_a_text_or_noise(lofi_tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lofi_tiny)
    rows = model.get_input_embeddings().weight.detach().float()
    text = PromptConfig(num_virtual_tokens=11, prompt_tuning_init="TEXT", prompt_tuning_init_text="hello there")
    for name, config in (("vocab", PromptConfig(num_virtual_tokens=11)), ("text", text)):
        lofi.add_adapter(model, config, name)
        (tensor,) = adapter_tensors(model, name).values()
        ids = [int((rows - row).abs().sum(1).argmin()) for row in tensor.detach()]
        assert torch.equal(rows[ids], tensor.detach())
    told = AutoTokenizer.from_pretrained(lofi_tiny)("hello there")["input_ids"]
    assert torch.equal(tensor.detach(), rows[(told * 11)[:11]])
    lofi.add_adapter(model, PromptConfig(num_virtual_tokens=64, prompt_tuning_init="RANDOM"), "noise")
    assert adapter_tensors(model, "noise").popitem()[1].std().item() == pytest.approx(1, abs=0.05)


def test_a_text_needs_a_tokenizer_beside_the_model(tmp_path):
    config = PromptConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="hello")
    model = virtual_model("llama")
    with pytest.raises(TargetError, match="loaded from a folder with its tokenizer; use SAMPLE_VOCAB"):
        lofi.add_adapter(model, config)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(TargetError, match="which cannot be read"):
        lofi.add_adapter(model, config)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"num_virtual_tokens": True}, "num_virtual_tokens is True"), ({"prompt_tuning_init": "zero"}, "is 'zero'"),
     ({"prompt_tuning_init": "TEXT"}, "'TEXT' needs it"), ({"prompt_tuning_init_text": "a"}, "goes with 'TEXT'")],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(values, said):
    with pytest.raises(RecipeError, match=said):
        PromptConfig(**values)
