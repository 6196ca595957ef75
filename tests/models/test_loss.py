"""The chunked loss against every family's own loss: value and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import LoraConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import ModelError
from lofi.models.chunked import chunk_length, chunked_cross_entropy
from lofi.models.loss import LanguageModelLoss

FAMILIES = [
    "llama", "llama_tied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "mixtral_router_loss",
    "gpt2", "opt", "bloom", "t5", "t5_untied", "bart", "phi", "cohere", "granite", "hyperclovax",
]  # fmt: skip


def batch(model, *, rows=3, length=11, packed=False):
    """A right-padded batch whose prompts are not trained; or one packed row of two sequences."""
    generator = torch.Generator().manual_seed(7)
    seq2seq = model.config.is_encoder_decoder
    ids = torch.randint(3, 97, (1 if packed else rows, length), generator=generator)
    labels = torch.randint(3, 97, (len(ids), 6 if seq2seq else length), generator=generator)
    labels[0, :4] = -100
    if packed:
        labels[0, 5] = -100  # the second sequence starts here: nothing may predict it
        return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])}
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def own_sum(model, inputs):
    labels = inputs["labels"] if model.config.is_encoder_decoder else inputs["labels"][:, 1:]
    return model(**inputs, use_cache=False).loss * (labels != -100).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, rtol):
    assert ours.keys() == theirs.keys()
    whole = max(float(g.norm()) for g in theirs.values())
    for name, expected in theirs.items():
        gap = float((ours[name] - expected).norm())
        assert gap <= rtol * max(float(expected.norm()), 1e-3 * whole), (name, gap, float(expected.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_sum_and_all_gradients_equal_the_models_own_in_three_token_chunks(tiny, family):
    model = tiny.model(family).double().train()  # in float64, so that only a wrong formula can differ
    if "mixtral" in family:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    inputs = batch(model)
    loss_of = LanguageModelLoss(model, chunk_tokens=3)
    torch.manual_seed(5)
    expected = own_sum(model, inputs)
    theirs = gradients(model, expected)
    loss_of.settle()
    torch.manual_seed(5)  # dropout, where the family has some, falls on the same places
    found = loss_of(model, inputs)
    assert loss_of.mode == "chunked", loss_of.reason
    assert found.tokens == (inputs["labels"][:, 0 if model.config.is_encoder_decoder else 1 :] != -100).sum()
    # transformers takes its own softmax in float32, which bounds the agreement whatever the model's dtype
    torch.testing.assert_close(found.loss_sum.double(), expected.double(), rtol=1e-6, atol=0)
    assert_same(gradients(model, found.loss_sum), theirs, rtol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gradients_agree_to_rounding_and_any_chunk_length_gives_the_same(tiny, family):
    model = tiny.model(family)
    inputs = batch(model)
    theirs = gradients(model, own_sum(model, inputs))
    for chunk in (None, 1, 4):
        found = LanguageModelLoss(model, chunk_tokens=chunk)(model, inputs)
        assert_same(gradients(model, found.loss_sum), theirs, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral"])
def test_packed_rows_give_the_sum_of_the_separate_sequences(tiny, family):
    model = tiny.model(family)
    loss_of = LanguageModelLoss(model)
    packed = batch(model, packed=True)
    whole = loss_of(model, packed)
    parts = [
        loss_of(model, {key: value[:, part] for key, value in packed.items()}) for part in (slice(0, 5), slice(5, 11))
    ]
    assert whole.tokens == sum(p.tokens for p in parts)
    torch.testing.assert_close(whole.loss_sum, sum(p.loss_sum for p in parts), rtol=1e-5, atol=0)


def test_a_loss_with_a_hidden_twist_falls_back_to_the_models_own_and_says_why(tiny):
    model = tiny.model("llama")
    plain = model.loss_function
    model.loss_function = lambda *, logits, **more: plain(logits=logits * 1.01, **more)
    loss_of = LanguageModelLoss(model)
    inputs = batch(model)
    found = loss_of(model, inputs)
    assert loss_of.mode == "own"
    assert "differs by" in loss_of.reason
    torch.testing.assert_close(found.loss_sum, own_sum(model, inputs))


def test_a_soft_cap_that_hardly_bends_small_logits_is_still_seen(tiny):
    model = tiny.model("gemma2", final_logit_softcapping=30.0)
    model.config.final_logit_softcapping = None  # what the model read from its config is gone: nothing caps any more
    assert LanguageModelLoss(model)._fault() is None
    model.config.final_logit_softcapping = 30.0  # it caps, and a plain transform must not pass for it
    assert LanguageModelLoss(model)._fault() is not None


def test_a_bfloat16_model_is_proved_and_keeps_its_dtype_in_the_gradient(tiny):
    model = tiny.model("cohere").bfloat16()
    loss_of = LanguageModelLoss(model, chunk_tokens=5)
    inputs = batch(model)
    theirs = gradients(model, own_sum(model, inputs))
    found = loss_of(model, inputs)
    assert loss_of.mode == "chunked" and found.loss_sum.dtype == torch.float32
    assert_same(gradients(model, found.loss_sum), theirs, rtol=2e-2)


def test_an_adapter_on_the_head_gets_the_models_own_gradient_and_an_idle_one_none(tiny):
    model = tiny.model("llama")
    add_adapter(model, LoraConfig(r=3, lora_alpha=7, target_modules=["lm_head", "q_proj"]))
    add_adapter(model, LoraConfig(r=2, lora_alpha=5, target_modules=["lm_head"]), name="idle")
    for tensor in adapter_tensors(model, "default").values():
        nn.init.normal_(tensor, std=0.1)
    inputs = batch(model)
    theirs = gradients(model, own_sum(model, inputs))
    ours = gradients(model, LanguageModelLoss(model, chunk_tokens=4)(model, inputs).loss_sum)
    assert any("lm_head" in name and "lora_B" in name for name in ours)
    assert not any("idle" in name for name in ours)
    assert_same(ours, theirs, rtol=2e-5)


def test_settling_leaves_the_model_its_mode_its_gradients_and_the_random_state_alone(tiny):
    model = tiny.model("t5").train()
    model.shared.eval()
    before = torch.random.get_rng_state()
    LanguageModelLoss(model).settle()
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training and not model.shared.training and model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.lm_head._forward_pre_hooks


def test_under_no_grad_and_inference_mode_the_sum_is_the_same(tiny):
    model = tiny.model("granite")
    inputs = batch(model)
    expected = LanguageModelLoss(model)(model, inputs).loss_sum
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss_of = LanguageModelLoss(model)
            found = loss_of(model, inputs).loss_sum
        assert loss_of.mode == "chunked" and not found.requires_grad
        torch.testing.assert_close(found, expected)


def test_a_batch_without_a_trained_token_adds_nothing_but_keeps_a_graph(tiny):
    for family in ("llama", "t5"):
        model = tiny.model(family)
        inputs = batch(model)
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        loss_of = LanguageModelLoss(model)
        for mode in ("chunked", "own"):
            loss_of.settle()
            loss_of.mode = mode
            found = loss_of(model, inputs)
            assert found.tokens == 0 and found.loss_sum.item() == 0
            found.loss_sum.backward()


def test_inputs_without_labels_are_refused(tiny):
    model = tiny.model("llama")
    with pytest.raises(ModelError, match="no 'labels'"):
        LanguageModelLoss(model)(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_upstream_scale_reaches_the_gradient_and_a_second_backward_is_refused():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = nn.Linear(5, 13)
    targets = torch.randint(13, (7,), generator=generator)
    expected = torch.autograd.grad(3 * nn.functional.cross_entropy(head(hidden), targets, reduction="sum"), hidden)[0]
    loss = chunked_cross_entropy(hidden, targets, head, head.parameters(), 2)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_the_logits_of_all_tokens_never_exist_at_once():
    widest = 0

    def head(h):
        nonlocal widest
        widest = max(widest, len(h))
        return h @ torch.ones(4, 50)

    hidden = torch.zeros(300, 4, requires_grad=True)
    chunked_cross_entropy(hidden, torch.zeros(300, dtype=torch.long), head, [], 64)
    assert widest == 64


@pytest.mark.parametrize(("vocabulary", "tokens"), [(512, 8192), (8192, 512), (65536, 128), (262144, 128)])
def test_small_vocabularies_take_one_chunk_and_big_ones_a_few_tokens(vocabulary, tokens):
    assert chunk_length(vocabulary) == tokens
    assert chunk_length(vocabulary, on_cpu=False) >= 4 * tokens
    assert chunk_length(vocabulary, trained=True) == max(tokens, 256)


def test_under_autocast_and_in_a_wrapper_the_gradients_are_the_models_own(tiny):
    class Wrapper(nn.Module):  # what DDP looks like from here
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model = tiny.model("gemma2")
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(model, own_sum(model, inputs))
        loss_of = LanguageModelLoss(model, chunk_tokens=6)
        ours = gradients(model, loss_of(Wrapper(model), inputs).loss_sum)
    assert loss_of.mode == "chunked" and {g.dtype for g in ours.values()} == {torch.float32}
    assert_same(ours, theirs, rtol=2e-2)
