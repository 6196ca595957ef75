"""Prefix tuning: the keys and values of the paper, what trains, where it starts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.virtual_models import P, some_ids, stirred, virtual_model
from tests.files.families import family_model

import lofi
from lofi.adapters.methods import MixedConfig, PrefixConfig, PromptConfig, virtual_length
from lofi.adapters.registry import adapter_tensors, exported_tensors, load_adapter_state
from lofi.errors import RecipeError, RequestError, TargetError
from lofi.evaluate.generation import check_room, context_length


@torch.no_grad()
def test_attention_reads_the_trained_keys_and_values_before_its_own():
    """One layer by hand: softmax(q [K_p; K]^T / sqrt(K)) [V_p; V], real tokens at positions P to P + T - 1."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = stirred(virtual_model("llama", num_hidden_layers=1), PrefixConfig(num_virtual_tokens=P))
    ids, layer, seen = some_ids(rows=1), model.model.layers[0], {}
    layer.self_attn.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True
    )
    model(ids)
    x, attention = seen["hidden_states"], layer.self_attn
    cos, sin = model.model.rotary_emb(x, torch.arange(P, P + 9)[None])
    q, k, v = (getattr(attention, name)(x).view(1, 9, -1, 6).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    trained = model.model.adapters["default"].prompt_embeddings.view(P, 2, 2, 6)  # tokens, keys and values, H, K
    k = torch.cat([trained[:, 0].transpose(0, 1)[None], k], dim=2).repeat_interleave(2, dim=1)
    v = torch.cat([trained[:, 1].transpose(0, 1)[None], v], dim=2).repeat_interleave(2, dim=1)
    mask = torch.cat([torch.ones(9, P), torch.ones(9, 9).tril()], dim=1) > 0
    scores = (q @ k.transpose(2, 3) / 6**0.5).masked_fill(~mask, -torch.inf)
    expected = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["out"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layers", "keys"),
    [("llama", 3, 12), ("qwen3", 3, 20), ("gpt2", 3, 24), ("opt", 3, 24), ("t5", 3, 24), ("bart", 3, 24)],
)
def test_what_trains_is_the_formula_of_the_lora_paper(family, layers, keys):
    """PreLayer: L l_p 2 (H K), which is 2 L D l_p where every head has keys (LoRA, arXiv 2106.09685, sec. 5.1)."""
    model = virtual_model(family)
    report = lofi.add_adapter(model, PrefixConfig(num_virtual_tokens=7))
    assert report.trainable == 2 * layers * keys * 7
    assert {key.rpartition(".")[2] for key in adapter_tensors(model)} == {"prompt_embeddings"}


def test_the_projection_trains_an_mlp_and_exports_what_it_computes():
    model = stirred(
        virtual_model("llama"), PrefixConfig(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=7)
    )
    trained = adapter_tensors(model)
    assert sum(t.numel() for t in trained.values()) == P * 12 + (12 * 7 + 7) + (7 * 72 + 72)
    (exported,) = exported_tensors(model).values()
    assert exported.shape == (P, 72)
    plain = virtual_model("llama")
    lofi.add_adapter(plain, PrefixConfig(num_virtual_tokens=P, init="random"))
    load_adapter_state(plain, "default", {"model.prompt_embeddings": exported.detach()})
    assert torch.equal(plain(some_ids()).logits, model(some_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "t5"])
def test_the_start_is_what_the_base_computes_for_tokens_of_its_vocabulary(family):
    """Prefix "vocab" acts as P real tokens before the input: the base on [tokens; input] gives the same logits."""
    model, ids = virtual_model(family), some_ids()
    decoder = model.get_decoder()
    torch.manual_seed(3)
    drawn = torch.randint(model.get_input_embeddings().num_embeddings, (1, P)).expand(2, -1)
    expected = decoder(input_ids=torch.cat([drawn, ids], dim=1)).last_hidden_state[:, P:]
    torch.manual_seed(3)
    lofi.add_adapter(model, PrefixConfig(num_virtual_tokens=P))
    torch.testing.assert_close(decoder(input_ids=ids).last_hidden_state, expected, rtol=0, atol=5e-5)


def test_random_is_normal_and_the_base_is_left_in_its_mode():
    model = virtual_model("llama").train()
    lofi.add_adapter(model, PrefixConfig(num_virtual_tokens=64, init="random"))
    (tensor,) = adapter_tensors(model).values()
    assert tensor.std().item() == pytest.approx(1, abs=0.05)
    lofi.add_adapter(model, PrefixConfig(num_virtual_tokens=3), "other")
    assert all(module.training for module in model.modules())


def test_a_step_of_training_moves_the_prefix_and_nothing_else():
    model = virtual_model("qwen3")
    lofi.add_adapter(model, PrefixConfig(num_virtual_tokens=P))
    before = {key: tensor.detach().clone() for key, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(some_ids(), labels=some_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    moved = [key for key, tensor in model.named_parameters() if not torch.equal(tensor, before[key])]
    assert moved == ["model.adapters.default.prompt_embeddings"]


@torch.no_grad()
def test_an_encoder_decoder_keeps_its_prefix_in_the_self_attention_of_the_decoder():
    """PEFT 0.21's rule for the position bias (T5) and for the position table (BART), layer by layer."""
    from peft import PrefixTuningConfig, get_peft_model

    for family in ("t5", "bart"):
        model = stirred(virtual_model(family), PrefixConfig(num_virtual_tokens=P))
        theirs = get_peft_model(
            virtual_model(family),
            PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_layers=3, token_dim=24),
        ).eval()
        ours = exported_tensors(model).popitem()[1].view(P, 3, 48)
        read = torch.empty_like(ours)
        for layer in range(3):
            read[:, 2 * layer % 3] = ours[:, layer]  # which of the file's layers PEFT gives to each layer
        theirs.prompt_encoder["default"].embedding.weight.copy_(read.flatten(1))
        ids = some_ids()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "bert_tags", "roberta", "deberta-v2"])
def test_an_encoder_has_no_keys_of_a_decoder(family):
    with pytest.raises(TargetError, match=r"needs a decoder's keys and values, which this \w+ does not have"):
        lofi.add_adapter(family_model(family), PrefixConfig())


def test_layers_without_plain_keys_and_values_are_refused():
    model = virtual_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(TargetError, match="linear_attention"):
        lofi.add_adapter(model, PrefixConfig())


@pytest.mark.parametrize(
    ("values", "said"),
    [({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"), ({"init": "zero"}, "init is 'zero'"),
     ({"encoder_hidden_size": 8}, "prefix_projection is not"),
     ({"init": "vocab", "prefix_projection": True}, "an MLP cannot start at")],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(values, said):
    with pytest.raises(RecipeError, match=said):
        PrefixConfig(**values)


def test_virtual_tokens_take_their_positions_of_the_context_while_they_are_active():
    model = stirred(virtual_model("gpt2"), PrefixConfig(num_virtual_tokens=P))
    assert context_length(model) == 64 - P
    check_room(model, [64 - P - 3], 3)
    with pytest.raises(RequestError, match=f"context of {64 - P} with 4 new tokens"):
        check_room(model, [64 - P - 3], 4)
    with lofi.adapters_off(model):
        assert context_length(model) == 64
    both = MixedConfig(configs=(lofi.LoraConfig(), PrefixConfig(num_virtual_tokens=7)))
    assert [virtual_length(c) for c in (both, PromptConfig(num_virtual_tokens=3), lofi.LoraConfig(), None)] == [
        7,
        3,
        0,
        0,
    ]


def test_a_prefix_cannot_be_merged():
    model = stirred(virtual_model("llama"), PrefixConfig(num_virtual_tokens=P))
    with pytest.raises((TargetError, lofi.LofiError), match="virtual tokens are read by attention"):
        lofi.merge_and_unload(model)
