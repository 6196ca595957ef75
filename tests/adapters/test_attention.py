"""Virtual tokens: every cache, left padding, packed rows and recomputation give what one plain pass gives."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.virtual_models import DECODERS, P, some_ids, stirred, virtual_model

import lofi
from lofi.adapters import attention
from lofi.adapters.methods import MixedConfig, PrefixConfig, PromptConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import TargetError
from lofi.models import checkpointing
from lofi.models.attention import set_attention

_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0)
METHODS = {
    "prefix": PrefixConfig(num_virtual_tokens=P),
    "prompt": PromptConfig(num_virtual_tokens=P),
    "lora+prompt": MixedConfig(configs=(lofi.LoraConfig(r=3, lora_alpha=5), PromptConfig(num_virtual_tokens=P))),
}


def model_of(family: str, method: str = "prefix", **changes):
    quiet = _NO_DROPOUT if family in ("gpt2", "opt") else {}
    return stirred(virtual_model(family, **quiet, **changes), METHODS[method])


@pytest.fixture(
    params=[(family, "prefix") for family in DECODERS] + [("gemma3", "prompt"), ("opt", "lora+prompt")], ids="-".join
)
def model(request):
    return model_of(*request.param)


@torch.no_grad()
def test_step_by_step_with_a_cache_gives_the_logits_of_one_pass(model):
    from transformers import DynamicCache

    ids, cache = some_ids(), DynamicCache(config=model.config)
    pieces = [model(ids[:, :4], past_key_values=cache, use_cache=True).logits]
    pieces += [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=5e-5)
    assert cache.get_seq_length() == 9  # the user's cache never holds the virtual tokens


@torch.no_grad()
def test_generation_is_the_same_with_any_cache_and_without(model):
    ids, options = some_ids(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), plain)


@torch.no_grad()
def test_a_left_padded_batch_writes_what_its_rows_write_alone(model):
    ids, options = some_ids(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1, :6]], dim=1)
    batch = torch.cat([padded, ids[1:]])
    written = model.generate(batch, attention_mask=(batch > 0).long(), **options)
    assert torch.equal(written[0, 9:], model.generate(ids[:1, :6], **options)[0, 6:])
    assert torch.equal(written[1, 9:], model.generate(ids[1:], **options)[0, 9:])


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in DECODERS if f != "opt"])  # OPT's base does not pack either
def test_packed_rows_each_see_the_virtual_tokens_and_not_each_other(family):
    model, ids = model_of(family), some_ids(rows=1)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    packed = model(ids, position_ids=positions, attention_mask=None, use_cache=False).logits
    separate = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=5e-5)


def gradients(model):
    model.zero_grad()
    model.train()(some_ids(), labels=some_ids()).loss.backward()
    return {key: tensor.grad.clone() for key, tensor in adapter_tensors(model).items()}


def test_gradient_checkpointing_gives_the_gradients_of_none(model):
    plain = gradients(model)
    checkpointing.enable(model)
    again = gradients(model)
    assert all(tensor.abs().max() > 0 for tensor in plain.values())
    for key, tensor in plain.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-5, atol=1e-7)


def test_checkpointing_that_transformers_set_up_gets_the_virtual_tokens_too():
    model = model_of("llama", "prompt")
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model), plain, rtol=1e-5, atol=1e-7)
    model.eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TargetError, match="use_reentrant"):
        gradients(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_off_is_the_base_bit_for_bit_and_unload_gives_it_back(family, method):
    base, ids = virtual_model(family), some_ids()
    model = stirred(virtual_model(family), METHODS[method])
    expected = base(ids).logits
    with lofi.adapters_off(model):
        assert torch.equal(model(ids).logits, expected)
    assert (model(ids).logits - expected).abs().max() > 0.05
    lofi.unload(model)
    assert torch.equal(model(ids).logits, expected)
    assert type(model.get_decoder()) is type(base.get_decoder())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_later_change_of_the_attention_keeps_the_virtual_tokens(family):
    model, ids = model_of(family, attn_implementation="sdpa"), some_ids()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    fused = model(ids, attention_mask=mask).logits
    set_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask > 0], fused[mask > 0], rtol=0, atol=5e-5)


@torch.no_grad()
def test_a_sliding_window_reaches_the_virtual_tokens_as_it_reaches_any_at_their_positions():
    model = stirred(virtual_model("mistral", num_hidden_layers=1), PrefixConfig(num_virtual_tokens=P))
    ids = some_ids()
    before = model(ids).logits
    tensor = model.model.adapters["default"].prompt_embeddings
    tensor[0].add_(1)  # the virtual token at position 0: a window of 7 sees it from positions 5 and 6 alone
    moved = (model(ids).logits - before).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [True, True] + [False] * 7


@torch.no_grad()
def test_recorded_attentions_sum_to_one_over_virtual_and_real_tokens():
    model = model_of("llama", attn_implementation="eager")
    recorded = model(some_ids(), output_attentions=True, output_hidden_states=True)
    assert [tuple(h.shape) for h in recorded.hidden_states] == [(2, 9, 24)] * 4
    weights = recorded.attentions
    assert [tuple(w.shape) for w in weights] == [(2, 4, 9, P + 9)] * 3
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 4, 9))
    assert (weights[1][..., :P] > 0).all()


@pytest.mark.parametrize("config", [PrefixConfig(), PromptConfig()], ids=["prefix", "prompt"])
@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon_tagger"])
def test_attention_outside_the_interface_is_refused_with_the_reason(family, config):
    model = virtual_model(family)
    with pytest.raises(TargetError, match=r"through transformers' attention interface, which \w+Attention does not"):
        lofi.add_adapter(model, config)
    assert not hasattr(model, "lofi_registry") or not lofi.adapters_of(model)


def test_two_active_adapters_with_virtual_tokens_are_refused():
    model = model_of("llama")
    lofi.add_adapter(model, PromptConfig(num_virtual_tokens=3), "other")
    model(some_ids())
    lofi.set_adapter(model, ["default", "other"])
    with pytest.raises(TargetError, match="activate one of them"):
        model(some_ids())


def test_attention_with_masks_of_another_form_is_refused():
    model = model_of("llama")
    model.config._attn_implementation_internal = "flex_attention"
    layer, front = (
        model.model.layers[0].self_attn,
        attention.Front([(torch.zeros(1, 2, P, 6),) * 2], torch.arange(9)[None]),
    )
    with pytest.raises(TargetError, match="flex_attention; load it with attn_implementation='sdpa'"):
        attention.widened(layer, None, None, front)


def test_a_layer_called_without_its_decoder_says_what_to_call():
    model = model_of("llama")
    with pytest.raises(TargetError, match="call the model"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 24), None, None)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_widened_in_its_own_form(dtype):
    model = model_of("gemma3", attn_implementation="sdpa" if dtype == torch.bool else "eager")
    front = attention.Front([(torch.zeros(1, 2, P, 10),) * 2], torch.tensor([[5, 6, 7, 11, 12]]))
    mask = torch.zeros(2, 1, 5, 5, dtype=dtype)
    hidden = False if dtype == torch.bool else torch.finfo(dtype).min
    seen = True if dtype == torch.bool else 0
    sliding = attention.widened(model.model.layers[0].self_attn, mask, None, front)
    full = attention.widened(model.model.layers[1].self_attn, mask, None, front)
    assert sliding.shape == full.shape == (2, 1, 5, P + 5)
    assert (full[..., :P] == seen).all()
    reach = [[p - j < 7 for j in range(P)] for p in (5, 6, 7, 11, 12)]
    assert (sliding[0, 0, :, :P] == torch.tensor([[seen if r else hidden for r in row] for row in reach])).all()
