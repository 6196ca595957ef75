"""The engine holds its cache against the plain forward before it serves a model, and says what it cannot serve."""

from __future__ import annotations

import pytest
import torch

from lofi.errors import ModelError, ProofError
from lofi.serve import masks, probe
from lofi.serve.engine import Engine
from lofi.serve.forward import Forward
from lofi.serve.probe import prove
from tiny_serving import FAMILIES, Shelf, alone, asks, decoder, run, tokenizer, with_adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_served_gives_the_plain_logits(family):
    proved = prove(decoder(family))
    assert proved.deviation < 1e-5
    layers, heads, size = (4 if family == "gemma3" else 3), (4 if family in ("gpt2", "neox", "opt") else 2), 6
    assert proved.bytes_per_token == layers * heads * size * 2 * 4


def test_a_model_in_bf16_deviates_by_its_rounding():
    assert 1e-4 < prove(decoder().bfloat16()).deviation < 0.05


def broken_mask(kind):
    original = masks.Masks._mask

    def shown(self, name, places, own):
        if kind == "one key too many":
            return original(self, name, places, own + 1)
        if kind == "one key too few":
            return original(self, name, places, (own - 1).clamp_min(0))
        return original(self, "full_attention", places, own)  # "no window"

    return shown


@pytest.mark.parametrize(
    ("kind", "family"),
    [("one key too many", "llama"), ("one key too few", "gpt2"), ("no window", "mistral"), ("no window", "gemma3")],
)
def test_a_mask_that_is_off_by_one_is_no_proof(monkeypatch, kind, family):
    monkeypatch.setattr(masks.Masks, "_mask", broken_mask(kind))
    with pytest.raises(ProofError, match="other logits row by row"):
        Engine(decoder(family), tokenizer())


def test_positions_that_are_off_by_one_are_no_proof(monkeypatch):
    original = Forward._run
    moved = lambda self, module, ids, positions, slots: original(self, module, ids, positions + 1, slots)  # noqa: E731
    monkeypatch.setattr(Forward, "_run", moved)
    with pytest.raises(ProofError):
        prove(decoder("gpt2"))


def test_without_the_proof_a_wrong_mask_would_give_wrong_answers(monkeypatch):
    monkeypatch.setattr(masks.Masks, "_mask", broken_mask("one key too few"))
    monkeypatch.setattr(probe, "_deviation", lambda *_: 0.0)
    model = decoder()
    requests = asks(4, seed=1)
    assert [one.ids for one in run(Engine(model, tokenizer(), rows=3), requests)] != [alone(model, a) for a in requests]


def test_a_route_that_is_off_by_a_row_would_give_wrong_answers(monkeypatch):
    original = Forward.route
    monkeypatch.setattr(Forward, "route", lambda self, slots, width=1: original(self, [*slots[1:], slots[0]], width))
    model = decoder()
    adapted = with_adapters(model)
    requests = asks(6, seed=1, adapters=(None, "a0", "a1"))
    heard = run(Engine(model, tokenizer(), Shelf(model, adapted, slots=3), rows=6), requests)
    assert [one.ids for one in heard] != [alone(adapted, asked) for asked in requests]


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=4)).eval()


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=3)).eval()


def t5():
    from tiny_training import tiny_t5

    return tiny_t5()


def hybrid():
    return decoder("qwen3", layer_types=["full_attention", "chunked_attention", "full_attention"])


def flash():
    model = decoder()
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [(mamba, "use lofi generate"), (bloom, "use lofi generate"), (t5, "an encoder"), (hybrid, "chunked_attention"),
     (flash, "attn_implementation='sdpa'")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_a_sentence(make, words):
    torch.manual_seed(0)
    with pytest.raises((ModelError, ProofError), match=words) as caught:
        Engine(make(), tokenizer())
    assert "\n" not in str(caught.value)


def test_the_proof_leaves_no_trace_in_the_model():
    model = decoder().train()
    before = torch.get_rng_state()
    prove(model)
    assert model.training and torch.equal(before, torch.get_rng_state())
