"""Keys and values of earlier requests serve later ones with the same beginning and the same adapter, and no others."""

from __future__ import annotations

import random

import pytest

from lofi.serve.engine import Engine
from lofi.serve.request import Asked
from tiny_serving import Shelf, alone, asks, decoder, run, tokenizer, with_adapters

SYSTEM = tuple(range(10, 40))


def engine_of(model, store=None, **changes):
    return Engine(model, tokenizer(), store, **({"rows": 3, "prefill_tokens": 16, "queue": 90} | changes))


def asked(tail, adapter=None, tokens=6) -> Asked:
    return Asked(prompt=(*SYSTEM, *tail), adapter=adapter, max_tokens=tokens)


def test_a_second_turn_continues_where_the_first_one_ended():
    model = decoder()
    engine = engine_of(model)
    (first,) = run(engine, [asked((3, 4))])
    turn = Asked(prompt=(*SYSTEM, 3, 4, *first.ids, 7, 8), max_tokens=6)
    (second,) = run(engine, [turn])
    assert first.cached == 0
    assert second.cached == len(SYSTEM) + 2 + len(first.ids) - 1  # the last token of an answer has no keys yet
    assert second.ids == alone(model, turn)
    assert second.pieces[0].cached == second.cached  # said once, on the first piece


def test_a_beginning_is_shared_while_its_first_owner_runs():
    model = decoder()
    requests = [asked((3,), tokens=20), asked((4,)), asked((5, 6))]
    heard = run(engine_of(model, prefill_tokens=64), requests, arrive=lambda step: int(step in (0, 2, 4)))
    assert [one.cached for one in heard] == [0, 30, 30]
    assert [one.ids for one in heard] == [alone(model, one) for one in requests]


@pytest.mark.parametrize("key", ["other", "same"])
def test_another_adapter_never_takes_what_one_has_computed(key):
    """With the same key for all, the engine would: so it is the key that keeps them apart."""
    model = decoder()
    adapted = with_adapters(model)
    shelf = Shelf(model, adapted, slots=3)
    if key == "same":
        shelf.keys = dict.fromkeys(shelf.keys)
    names = [None, "a0", "a1", "a2"]
    requests = [asked((3,), name) for name in names] + [asked((5,), name) for name in names]
    heard = run(engine_of(model, shelf, rows=8), requests, arrive=lambda step: int(step % 12 == 0))
    expected = [alone(adapted, one) for one in requests]
    if key == "other":
        assert [one.cached for one in heard] == [0] * 4 + [30] * 4
        assert [one.ids for one in heard] == expected
    else:
        assert [one.cached for one in heard] == [0] + [30] * 7
        assert [one.ids for one in heard] != expected


def test_an_adapter_that_was_loaded_anew_under_its_name_begins_anew():
    model = decoder()
    shelf = Shelf(model, with_adapters(model), slots=3)
    engine = engine_of(model, shelf)
    run(engine, [asked((3,), "a0")])
    shelf.keys["a0"] = "another content"
    assert run(engine, [asked((4,), "a0")])[0].cached == 0


def test_the_switch_turns_it_off():
    model = decoder()
    engine = engine_of(model)
    engine.reuse_prefixes = False
    requests = [asked((3,)), asked((4,)), asked((5,))]
    heard = run(engine, requests, arrive=lambda step: int(step % 4 == 0))
    assert [one.cached for one in heard] == [0, 0, 0]
    assert [one.ids for one in heard] == [alone(model, one) for one in requests]


def test_the_least_recently_used_beginning_makes_room():
    engine = engine_of(decoder(), rows=2)
    other = tuple(range(40, 58))
    tell = lambda prompt: run(engine, [Asked(prompt=prompt, max_tokens=2)])[0].cached  # noqa: E731
    assert [tell((*SYSTEM, 3)), tell((*other, 3)), tell((*SYSTEM, 4))] == [0, 0, 30]
    assert tell((*other, 4)) == 0 or tell((*other, 5)) == 18  # two rows keep two of them at most
    assert len(engine._scheduler.places.order) == 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_those_of_generate_under_a_small_budget_with_cancellations(family):
    model = decoder(family, seed=2)
    adapted = with_adapters(model)
    requests = asks(16, seed=8, adapters=(None, "a0", "a1"), longest=50)
    engine = engine_of(model, Shelf(model, adapted, slots=2), rows=5, cache_tokens=256, prefill_tokens=9)
    dice, tickets = random.Random(4), []
    submit = engine.submit
    engine.submit = lambda *pair: tickets.append(submit(*pair))

    def after(step):
        places = engine._scheduler.places
        assert places.cache.capacity <= 256 and len(places.order) <= places.cache.rows
        if dice.random() < 0.1 and tickets:
            tickets[-1].cancel()

    heard = run(engine, requests, arrive=lambda _: dice.randint(0, 1), after_step=after)
    for one, request in zip(heard, requests, strict=True):
        expected = alone(adapted, request)
        assert one.ids == (expected[: len(one.ids)] if one.finish == "cancelled" else expected)
    assert {one.finish for one in heard} >= {"cancelled", "length"} and any(one.cached for one in heard)
    assert sorted(engine._scheduler._seats) == list(range(5)) and not any(engine.store.leases.values())
