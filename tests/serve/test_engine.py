"""The engine answers every request as `generate` does alone, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest

from lofi.serve.engine import Engine
from lofi.serve.request import Asked
from tiny_serving import FAMILIES, Heard, Shelf, alone, asks, decoder, run, tokenizer, with_adapters


def engine_of(model, store=None, **changes):
    return Engine(model, tokenizer(), store, **({"rows": 4, "prefill_tokens": 16, "queue": 500} | changes))


def unequal(reference, requests, heard) -> list:
    """The requests whose answer is not what `generate` says, with both."""
    pairs = zip(requests, heard, strict=True)
    expected = [(asked, one.ids, alone(reference, asked)) for asked, one in pairs]
    return [found for found in expected if found[1] != found[2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_mixed_batch_are_those_of_generate_alone(family):
    model = decoder(family)
    requests = asks(24, seed=1)
    heard = run(engine_of(model), requests, arrive=lambda step: step % 3)
    assert not unequal(model, requests, heard)
    assert len({tuple(one.ids) for one in heard}) > 12  # the models do not all say the same


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_are_served(attention):
    model = decoder("gemma3", attention=attention)
    requests = asks(8, seed=2)
    assert not unequal(model, requests, run(engine_of(model), requests))


def test_a_request_whose_adapter_is_unloaded_before_its_turn_says_so_and_the_others_are_answered():
    model = decoder("llama")
    store = Shelf(model, with_adapters(model), slots=2)
    engine = engine_of(model, store)
    requests = [Asked(prompt=(5, 6, 7), adapter=name, max_tokens=3) for name in ("a0", "a1")]
    heard = [Heard() for _ in requests]
    for asked, one in zip(requests, heard, strict=True):
        engine.submit(asked, one)
    del store.packed["a0"]
    while not all(one.finish for one in heard):
        engine.step()
    assert (heard[0].finish, heard[0].error, heard[0].ids) == ("gone", "there is no adapter 'a0'", [])
    assert heard[1].finish == "length" and len(heard[1].ids) == 3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_request_has_its_own_adapter_among_others_that_come_and_go(family):
    model = decoder(family)
    adapted = with_adapters(model)
    requests = asks(40, seed=3, adapters=(None, "a0", "a1", "a2"))
    dice = random.Random(5)
    heard = run(engine_of(model, Shelf(model, adapted, slots=2)), requests, arrive=lambda _: dice.randint(0, 2))
    assert not unequal(adapted, requests, heard)
    base = [alone(adapted, Asked(prompt=one.prompt, max_tokens=one.max_tokens, stop_ids=(2,))) for one in requests]
    other = sum(one.ids != ids for one, ids in zip(heard, base, strict=True))
    assert other > 15  # the adapters say something else than the base
    assert any(one.cached for one in heard)  # and beginnings were shared, among those with the same adapter
