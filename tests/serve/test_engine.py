"""The engine answers every request as `generate` does alone, whatever else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from lofi.serve.engine import Engine
from lofi.serve.request import Asked, Drawing
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
    requests = asks(14, seed=1)
    heard = run(engine_of(model), requests, arrive=lambda step: step % 3)
    assert not unequal(model, requests, heard)
    assert len({tuple(one.ids) for one in heard}) > 7  # the models do not all say the same


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
    requests = asks(24, seed=3, adapters=(None, "a0", "a1", "a2"))
    dice = random.Random(5)
    heard = run(engine_of(model, Shelf(model, adapted, slots=2)), requests, arrive=lambda _: dice.randint(0, 2))
    assert not unequal(adapted, requests, heard)
    base = [alone(adapted, Asked(prompt=one.prompt, max_tokens=one.max_tokens, stop_ids=(2,))) for one in requests]
    other = sum(one.ids != ids for one, ids in zip(heard, base, strict=True))
    assert other > 9  # the adapters say something else than the base
    assert any(one.cached for one in heard)  # and beginnings were shared, among those with the same adapter


def test_adapters_with_rows_of_their_own_in_a_tied_embedding_share_a_batch(lofi_tiny):
    """Such rows change the head too, which the prompts' forward does not reach."""
    import lofi
    from lofi.adapters.registry import adapter_tensors
    from lofi.adapters.twin import twin
    from lofi.models.load import load_tokenizer

    model = lofi.load_model(str(lofi_tiny), dtype="fp32", device="cpu").eval()
    adapted = twin(model)
    for i in range(2):
        rows = {"trainable_token_indices": [1, 17, 200 + i]} if i else {}
        lofi.add_adapter(adapted, lofi.LoraConfig(r=3, lora_alpha=7, **rows), name=f"a{i}")
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for tensor in adapter_tensors(adapted, f"a{i}").values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    adapted.eval()
    requests = asks(6, seed=2, adapters=(None, "a0", "a1"), vocabulary=8192)
    engine = Engine(model, load_tokenizer(lofi_tiny), Shelf(model, adapted, slots=2), rows=4)
    heard = run(engine, requests)
    assert {asked.adapter for asked in requests} == {None, "a0", "a1"}
    assert not unequal(adapted, requests, heard)


def test_the_text_is_that_of_the_tokens_without_the_one_that_stops():
    model = decoder()
    words = lambda ids: tokenizer().decode(ids, skip_special_tokens=True)  # noqa: E731
    plain = [Asked(prompt=(7, 8, i), max_tokens=12) for i in range(9, 13)]
    expected = [alone(model, asked) for asked in plain]
    requests = [replace(asked, stop_ids=(ids[6],)) for asked, ids in zip(plain, expected, strict=True)]
    heard = run(engine_of(model), [*plain, *requests])
    assert [one.text for one in heard[:4]] == [words(ids) for ids in expected]
    assert [one.finish for one in heard] == ["length"] * 4 + ["stop"] * 4
    for one, ids in zip(heard[4:], expected, strict=True):
        end = ids.index(ids[6])
        assert one.ids == ids[: end + 1]  # the token that stops is counted
        assert one.text == words(ids[:end])  # and not shown


def test_a_stop_text_ends_an_answer_and_its_row_serves_the_next():
    model = decoder()
    (plain,) = run(engine_of(model), [Asked(prompt=(7, 8, 9), max_tokens=12)])
    stop = " ".join(plain.text.split(" ")[4:6])
    engine = engine_of(model, rows=1)
    heard = run(engine, [Asked(prompt=(7, 8, 9), max_tokens=12, stop=(stop, "never"))] * 2)
    for one in heard:
        assert one.finish == "stop" and one.text == plain.text[: plain.text.index(stop)]
        assert len(one.ids) < len(plain.ids)


def test_drawn_answers_depend_on_their_seed_and_not_on_the_batch():
    model = decoder()
    drawing = Drawing(temperature=1.2, top_p=0.9, seed=4, repetition_penalty=1.1)
    drawn = Asked(prompt=(7, 8, 9), max_tokens=20, drawing=drawing, logprobs=2)
    (lonely,) = run(engine_of(model), [drawn])
    crowd = [drawn, *asks(8, seed=3), drawn, replace(drawn, drawing=replace(drawing, seed=5))]
    heard = run(engine_of(model), crowd, arrive=lambda step: step % 2)
    assert heard[0].ids == heard[-2].ids == lonely.ids != heard[-1].ids
    logged = [entry for piece in lonely.pieces for entry in piece.logprobs]
    assert [entry.token for entry in logged] == lonely.ids and all(len(entry.top) == 2 for entry in logged)


def test_a_long_prompt_is_read_in_chunks_while_others_go_on():
    engine = engine_of(decoder(), prefill_tokens=8)
    going, late = Heard(), Heard()
    engine.submit(Asked(prompt=(3, 4), max_tokens=30), going)
    engine.step()
    engine.submit(Asked(prompt=tuple(range(3, 53)), max_tokens=2), late)
    counts = []
    while not late.ids:
        before = len(going.ids)
        engine.step()
        counts.append(len(going.ids) - before)
    assert counts == [1] * 7  # 49 tokens by 8 a step, and the first token of the answer in the last of them


def test_the_figures_are_those_of_what_was_done():
    requests = asks(6, seed=4)
    engine = engine_of(decoder())
    heard = run(engine, requests)
    stats = engine.stats()
    assert stats.generated_tokens == sum(len(one.ids) for one in heard)
    assert stats.prompt_tokens == sum(len(asked.prompt) for asked in requests)
    assert sum(stats.finished.values()) == 6 and stats.finished["error"] == 0
    assert (stats.rows, stats.running, stats.waiting, stats.cache_capacity) == (4, 0, 0, 4 * 128)
    assert stats.tokens_per_second > 0
