"""The last k blocks, trained in full as copies: which they are, in what dtype, and what stays of the base."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import lofi
from adapters.models import toy
from files import families
from files.families import V, family_model
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.methods import LastLayersConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import RecipeError, TargetError
from quantized_models import quantized

LAST = LastLayersConfig(num_layers=1)
TOKENS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(9))


def says(model, **more):
    more |= {"decoder_input_ids": TOKENS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **more).logits


def by_hand(family, *, steps, **changes):
    """The same model with the last block thawed in place, trained by plain SGD; for comparison."""
    model = family_model(family, **changes)
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return train(model, steps)


def train(model, steps, rate=0.5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        says(model).pow(2).mean().backward()
        optimizer.step()
    return model


def test_training_copies_is_training_the_blocks_themselves():
    model = family_model("llama")
    lofi.add_adapter(model, LAST)
    train(model, 3)
    expected = families.logits(by_hand("llama", steps=3))
    assert torch.equal(families.logits(model), expected)
    assert not torch.allclose(expected, families.logits(family_model("llama")), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "t5", "bert_tags", "deberta-v2"])
def test_a_fresh_copy_is_its_block_bit_for_bit_and_merging_keeps_every_logit(family, dtype):
    model = family_model(family, dtype=dtype)
    bits = {key: t.clone() for key, t in model.state_dict().items()}
    base = families.logits(model)
    lofi.add_adapter(model, LAST)
    assert torch.equal(families.logits(model), base)
    assert all(t.dtype == torch.float32 for t in adapter_tensors(model).values())
    families.stir(model)
    changed = families.logits(model)
    assert changed.dtype == dtype and (changed - base).abs().max() > 1e-2
    if dtype == torch.float32 or "classifier" not in model._modules:  # a head computes in float32, merged in bf16
        assert torch.equal(families.logits(merge_in_memory(model)), changed)
    lofi.unload(model)
    assert torch.equal(families.logits(model), base)
    after = model.state_dict()
    assert list(after) == list(bits) and all(torch.equal(after[key], bits[key]) for key in bits)


def test_in_bf16_small_steps_gather_in_the_float32_masters():
    model = family_model("llama", dtype=torch.bfloat16)
    lofi.add_adapter(model, LAST)
    name = "model.layers.1.mlp.down_proj.weight"
    before = adapter_tensors(model)["model.layers.1.copy.mlp.down_proj.weight"].detach().clone()
    train(model, 2, rate=1e-3)
    moved = adapter_tensors(model)["model.layers.1.copy.mlp.down_proj.weight"].detach()
    assert not torch.equal(moved, before) and torch.equal(model.get_parameter(name).float(), before)


def test_gpt2_medium_trains_the_paper_s_25_19_million():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        report = lofi.add_adapter(model, LastLayersConfig())
    assert report.trainable == 2 * (12 * 1024**2 + 13 * 1024) == 25_192_448  # blocks alone: the final norm has 2048
    assert [m.path for m in report.matched] == ["transformer.h.22", "transformer.h.23"]


def test_of_an_encoder_decoder_the_decoders_blocks_train():
    report = lofi.add_adapter(family_model("t5", num_layers=3, num_decoder_layers=2), LastLayersConfig(num_layers=2))
    assert [m.path for m in report.matched] == ["decoder.block.0", "decoder.block.1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_writes_what_it_writes_without(family, dtype):
    model = family_model(family, dtype=dtype)
    lofi.add_adapter(model, LAST)
    families.stir(model)
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(TOKENS, use_cache=cache, **settings) for cache in (True, False))
    if dtype == torch.float32:  # in bf16 a prompt of several tokens rounds differently from one token at a time
        assert torch.equal(cached, plain)
    assert torch.equal(cached, merge_in_memory(model).generate(TOKENS, use_cache=True, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_activations_give_the_same_gradients_and_are_recomputed_once(family, dtype):
    model = family_model(family, dtype=dtype)
    lofi.add_adapter(model, LAST)
    model.train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(4)
        says(model).float().pow(2).mean().backward()
        return {key: t.grad.clone() for key, t in adapter_tensors(model).items()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    copied = next(m.adapters["default"].copy for m in model.modules() if hasattr(m, "adapters"))
    norm = copied.get_submodule("ln_1" if family == "gpt2" else "input_layernorm")
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    recomputed = gradients()
    assert len(calls) == 2  # the forward and its recomputation; a checkpoint in a checkpoint would make it three
    for key, grad in plain.items():
        assert grad.any() and (grad - recomputed[key]).abs().max() <= 1e-5 * grad.abs().max(), key


def test_a_later_change_of_the_attention_reaches_the_copies():
    model = family_model("llama")
    lofi.add_adapter(model, LAST)
    copied = model.model.layers[1].adapters["default"].copy
    model.set_attn_implementation("eager")
    assert copied.self_attn.config is model.model.layers[0].self_attn.config
    assert copied.self_attn.config._attn_implementation == "eager"
    attentions = model(input_ids=TOKENS, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[1].shape == (2, 4, 9, 9)


def test_hidden_states_are_recorded_once_a_block():
    model = family_model("llama")
    plain = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    lofi.add_adapter(model, LAST)
    adapted = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert len(adapted) == len(plain) == 3
    assert all(torch.equal(one, other) for one, other in zip(adapted, plain, strict=True))


def test_threads_that_share_a_bf16_copy_do_not_disturb_each_other():
    model = family_model("llama", dtype=torch.bfloat16)
    lofi.add_adapter(model, LAST)
    families.stir(model)
    expected, wrong = families.logits(model), []

    def ask():
        for _ in range(20):
            if not torch.equal(families.logits(model), expected):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
    assert all(t.dtype == torch.float32 for t in adapter_tensors(model).values())


def test_a_copy_is_of_the_base_without_the_adapters_that_stand_there():
    model = family_model("llama")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5), "lora")
    families.stir(model, "lora")
    with lofi.using(model, None):
        base = families.logits(model)
    report = lofi.add_adapter(model, LAST, "last")
    assert report.trainable == sum(p.numel() for p in family_model("llama").model.layers[1].parameters())
    with lofi.using(model, "last"):
        assert torch.equal(families.logits(model), base)
    with (
        lofi.using(model, ["lora", "last"]),
        pytest.raises(TargetError, match="one active adapter replaces a LlamaDecoderLayer in full and another adapts"),
    ):
        families.logits(model)


def test_two_adapters_that_replace_one_block_do_not_add_up():
    model = family_model("llama")
    lofi.add_adapter(model, LAST, "a")
    lofi.add_adapter(model, LAST, "b")
    with lofi.using(model, ["a", "b"]), pytest.raises(TargetError, match="2 active adapters each replace the same"):
        families.logits(model)


class Flat(nn.Module):
    """A model that keeps its blocks under names of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (lambda: family_model("llama"), {"num_layers": 3}, r"num_layers is 3, but this LlamaForCausalLM has 2 blocks "
         r"in model\.layers; give a number from 1 to 2"),
        (lambda: family_model("t5"), {"num_layers": 3}, r"has 2 blocks in decoder\.block"),
        (lambda: quantized(family_model("llama"), "nf4"), {}, r"layers\.0 holds quantized weights, .* base dense"),
        (lambda: quantized(family_model("llama"), "int8"), {"num_layers": 1}, r"model\.layers\.1 holds quantized"),
        (lambda: family_model("llama"), {"modules_to_save": ["layers.1.mlp"]}, r"names model\.layers\.1\.mlp, which "
         r"lies in the trained model\.layers\.1"),
        (Flat, {}, "this Flat keeps no list of blocks"),
        (toy, {}, "this Toy keeps no list of blocks"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_is_touched(model, config, words):
    model = model()
    with pytest.raises(TargetError, match=words) as caught:
        lofi.add_adapter(model, LastLayersConfig(**config))
    assert "\n" not in str(caught.value)
    assert "lofi_registry" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point() and p.dtype == torch.float32)


def test_no_block_at_all_is_refused():
    with pytest.raises(RecipeError, match="num_layers is 0, expected a whole number of at least 1; the paper takes 2"):
        LastLayersConfig(num_layers=0)
