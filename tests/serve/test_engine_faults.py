"""What goes wrong ends the requests that it concerns, with a sentence, and no other."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from lofi.errors import AdapterFileError, RequestError
from lofi.serve.engine import Engine
from lofi.serve.request import Asked, Draining, Overloaded, UnknownAdapter
from tiny_serving import Heard, Shelf, alone, asks, decoder, run, tokenizer, with_adapters


def engine_of(model, store=None, **changes):
    return Engine(model, tokenizer(), store, **({"rows": 3, "prefill_tokens": 16, "queue": 50} | changes))


def idle(engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.cache_tokens == 0


LONG = Asked(prompt=tuple(range(3, 40)), max_tokens=50)


def test_a_cancelled_request_ends_wherever_it_is_and_the_others_do_not_notice():
    model = decoder()
    engine = engine_of(model, rows=2, prefill_tokens=4)
    others = asks(6, seed=1)
    heard, gone = [Heard() for _ in others], [Heard() for _ in range(3)]
    decoding = engine.submit(Asked(prompt=(5, 6), max_tokens=50), gone[0])
    engine.step()
    reading = engine.submit(LONG, gone[1])
    engine.step()
    waiting = engine.submit(LONG, gone[2])
    for asked, one in zip(others, heard, strict=True):
        engine.submit(asked, one)
    assert engine.stats().running == 2 and gone[0].ids and not gone[1].ids
    for ticket in (decoding, reading, waiting, decoding):
        ticket.cancel()
    while not all(one.finish for one in heard):
        engine.step()
    assert [one.finish for one in gone] == ["cancelled"] * 3
    assert [one.ids for one in heard] == [alone(model, asked) for asked in others]
    assert idle(engine) and engine.stats().finished["cancelled"] == 3
    decoding.cancel()  # and after its end it means nothing
    engine.step()
    assert engine.stats().finished["cancelled"] == 3


@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_deadline_ends_a_request_with_a_sentence(place):
    engine = engine_of(decoder(), rows=1)
    first, late = Heard(), Heard()
    if place == "waiting":
        engine.submit(Asked(prompt=(3,), max_tokens=40), first)
        engine.step()
    engine.submit(Asked(prompt=(3,), max_tokens=60, timeout=0.05), late)
    engine.step()
    time.sleep(0.06)
    engine.step()
    assert late.finish == "deadline" and "0.05" in late.error
    assert bool(late.ids) == (place == "running")
    assert not first.finish


class Failing:
    """Raises in the chosen calls of a module's forward."""

    def __init__(self, monkeypatch, module, *calls: int) -> None:
        self.calls, self.count = calls, 0
        original = module.forward

        def forward(*args, **kwargs):
            self.count += 1
            if self.count in self.calls:
                raise RuntimeError("out of memory\nand more lines")
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failing_forward_ends_the_requests_of_that_forward_and_no_other(monkeypatch, caplog, call):
    """Of three decoder layers the last fails, so the first two have written keys by then."""
    model = decoder()
    engine = engine_of(model, rows=4, prefill_tokens=512)
    Failing(monkeypatch, model.model.layers[2], call)  # 1: the prompts' forward, later ones: a decoding step
    first, second = asks(3, seed=1), asks(3, seed=2)
    heard = [Heard() for _ in range(6)]
    for asked, one in zip(first, heard[:3], strict=True):
        engine.submit(asked, one)
    while not all(one.finish for one in heard[:3]):
        engine.step()
    failed = [one for one in heard[:3] if one.finish == "error"]
    assert failed
    assert all(one.error.startswith("the model failed in this step (RuntimeError):") for one in failed)
    assert "\n" not in failed[0].error
    for asked, one in zip(second, heard[3:], strict=True):
        engine.submit(asked, one)
    while not all(one.finish for one in heard):
        engine.step()
    assert [one.ids for one in heard[3:]] == [alone(model, asked) for asked in second]
    assert idle(engine) and any(record.exc_info for record in caplog.records)


def test_what_fails_outside_of_a_forward_ends_everything_and_the_engine_goes_on(monkeypatch):
    model = decoder()
    engine = engine_of(model)
    heard = Heard()
    engine.submit(LONG, heard)
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler.places, "lead", lambda row: 1 / 0)
        engine.step()
    assert heard.finish == "error" and "ZeroDivisionError" in heard.error and idle(engine)
    (again,) = run(engine, asks(1, seed=4))
    assert again.ids == alone(model, asks(1, seed=4)[0])


def test_an_adapter_of_values_that_are_no_numbers_harms_no_other_request():
    model = decoder()
    adapted = with_adapters(model)
    shelf = Shelf(model, adapted, slots=3)
    for part in shelf.packed["a1"].parts.values():
        part.b.fill_(float("nan"))
    engine = engine_of(model, shelf, rows=3)
    requests = asks(16, seed=6, adapters=(None, "a0", "a1", "a2"))
    heard = run(engine, requests, arrive=lambda _: 1)
    for asked, one in zip(requests, heard, strict=True):
        if asked.adapter == "a1":
            assert one.finish == "error" and "not finite" in one.error and not one.ids
        else:
            assert one.ids == alone(adapted, asked)


def test_whoever_fails_to_take_a_piece_is_cancelled_alone(caplog):
    model = decoder()
    engine = engine_of(model)
    good, taken = Heard(), []

    def broken(piece):
        taken.append(piece)
        raise ValueError("closed")

    engine.submit(Asked(prompt=(3, 4), max_tokens=30), broken)
    engine.submit(Asked(prompt=(3, 4, 5), max_tokens=5), good)
    with caplog.at_level(logging.ERROR, "lofi.serve"):
        while not good.finish:
            engine.step()
    assert good.ids == alone(model, Asked(prompt=(3, 4, 5), max_tokens=5))
    assert [piece.finish for piece in taken] == [None, "cancelled"] and idle(engine)
    assert "closed" in caplog.text


def test_a_full_queue_refuses_with_the_time_to_come_back():
    engine = engine_of(decoder(), rows=2, queue=3)
    for _ in range(5):
        engine.submit(LONG, Heard())
    with pytest.raises(Overloaded, match="3 wait") as caught:
        engine.submit(LONG, Heard())
    assert 1 <= caught.value.retry_after <= 60
    engine.step()
    assert engine.stats().running == 2 and engine.stats().waiting == 3


def test_what_can_never_be_answered_is_refused_at_once():
    model = decoder()
    engine = engine_of(model, Shelf(model, with_adapters(model), slots=1), cache_tokens=64)
    assert engine.context == 64
    with pytest.raises(RequestError, match="exceed the context of 64"):
        engine.submit(LONG, Heard())
    with pytest.raises(UnknownAdapter, match="'a7'"):
        engine.submit(Asked(prompt=(3,), adapter="a7"), Heard())
    with pytest.raises(UnknownAdapter, match="base alone"):
        engine_of(model.__class__(model.config).eval()).submit(Asked(prompt=(3,), adapter="a0"), Heard())
    with pytest.raises(RequestError, match="rows is 0"):
        engine_of(model, rows=0)
    with pytest.raises(RequestError, match="the model has 96 positions"):
        engine_of(model, context=97)
    assert engine.stats().waiting == 0


def test_an_adapter_that_cannot_be_read_again_ends_its_request_alone(monkeypatch):
    model = decoder()
    adapted = with_adapters(model)
    shelf = Shelf(model, adapted, slots=2)
    lease = shelf.lease

    def changed(name):
        if name == "a0":
            raise AdapterFileError("the folder of 'a0' has changed: load it again")
        return lease(name)

    monkeypatch.setattr(shelf, "lease", changed)
    requests = asks(12, seed=3, adapters=("a0", "a1"))
    for asked, one in zip(requests, run(engine_of(model, shelf), requests), strict=True):
        assert (one.finish, one.error) == ("error", "the folder of 'a0' has changed: load it again") or (
            asked.adapter == "a1" and one.ids == alone(adapted, asked)
        )


def test_a_request_without_a_slot_is_passed_by_others_but_not_for_ever(monkeypatch):
    monkeypatch.setattr("lofi.serve.scheduler._PATIENCE", 4)
    model = decoder()
    engine = engine_of(model, Shelf(model, with_adapters(model), slots=1), rows=2)
    order = []
    for i, adapter in enumerate(["a0", "a1", *["a0"] * 12]):  # of unlike lengths, so that one of them always runs
        ends = lambda piece, i=i: order.append(i) if piece.finish else None  # noqa: E731
        engine.submit(Asked(prompt=(3, 4, 5 + i), max_tokens=5 + 4 * (i // 2 % 2), adapter=adapter), ends)
    while len(order) < 14:
        engine.step()
    assert 3 <= order.index(1) <= 7  # some of the later ones, which have a slot, passed; then it was its turn


# -- the thread -------------------------------------------------------------------------------------------------------


def test_the_thread_answers_drains_and_ends(monkeypatch):
    model = decoder()
    engine = engine_of(model)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    engine.start()
    assert engine.alive
    requests, heard = asks(20, seed=9), [Heard() for _ in range(20)]
    threads = [threading.Thread(target=engine.submit, args=pair) for pair in zip(requests, heard, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.drain(60)
    assert all(one.finish in ("stop", "length") for one in heard)
    with pytest.raises(Draining):
        engine.submit(requests[0], Heard())
    engine.stop()
    assert not engine.alive and not any(thread.name == "lofi-engine" for thread in threading.enumerate())
    # the products use as many threads as in whoever made the engine, unless fewer were faster
    assert seen[-1] == engine.threads == engine.stats().threads <= torch.get_num_threads() == seen[0]
    assert [one.ids for one in heard] == [alone(model, asked) for asked in requests]


def test_what_still_runs_when_the_engine_stops_ends_with_an_error():
    engine = engine_of(decoder(), rows=1, queue=9)
    engine.start()
    heard = [Heard() for _ in range(4)]
    for one in heard:
        engine.submit(LONG, one)
    assert not engine.drain(0.001)
    engine.stop()
    assert {one.finish for one in heard} <= {"error", "length"} and heard[-1].finish == "error"
    assert "stopping" in heard[-1].error and idle(engine)


def test_a_cancelled_request_that_waits_wakes_nobody_in_vain():
    engine = engine_of(decoder())
    engine.start()
    heard = Heard()
    engine.submit(LONG, heard).cancel()
    assert engine.drain(30) and heard.finish in ("cancelled", "length")
    engine.stop()
