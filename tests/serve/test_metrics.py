"""What is counted, and how Prometheus and the page read it."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client", reason='the server needs its extra: pip install "lofi[serve]"')

from prometheus_client.parser import text_string_to_metric_families

from lofi.serve.delivery import Answers
from lofi.serve.metrics import Exposition, Meters, Spread
from lofi.serve.request import Asked, Piece, Stats


def answered(meters, adapter, pieces, prompt=(1, 2, 3)):
    answers = Answers([Asked(prompt=prompt, adapter=adapter)], meters, streamed=False)
    for piece in pieces:
        answers.choices[0].take(piece)


def samples(exposition):
    """{(name, labels): value} of the whole text, read by Prometheus' own parser."""
    families = text_string_to_metric_families(exposition.text().decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_answers_are_counted_by_adapter_and_end():
    meters = Meters()
    answered(meters, None, [Piece(tokens=(4,), cached=2), Piece(tokens=(5, 6), finish="stop")])
    answered(meters, "red", [Piece(tokens=(4,)), Piece(finish="cancelled")])
    answered(meters, "gone", [Piece(finish="error", error="x")])
    found = samples(
        Exposition(meters, lambda: Stats(running=2, rows=4, steps=9, draining=True), {"red": "device"}.copy)
    )
    assert found["lofi_requests_total", (("adapter", "base"), ("finish", "stop"))] == 1
    assert found["lofi_requests_total", (("adapter", "red"), ("finish", "cancelled"))] == 1
    assert found["lofi_requests_total", (("adapter", "unloaded"), ("finish", "error"))] == 1
    assert found["lofi_generated_tokens_total", (("adapter", "base"),)] == 3
    assert found["lofi_prompt_tokens_total", (("adapter", "red"),)] == 3
    assert found["lofi_cached_prompt_tokens_total", (("adapter", "base"),)] == 2
    assert found["lofi_adapters", (("state", "device"),)] == 1 and found["lofi_adapters", (("state", "disk"),)] == 0
    assert found["lofi_running_requests", ()] == 2 and found["lofi_engine_steps_total", ()] == 9
    assert found["lofi_draining", ()] == 1
    assert found["lofi_first_token_seconds_count", ()] == 2 and found["lofi_token_seconds_count", ()] == 2


def test_two_servers_in_one_process_count_apart():
    one, other = Meters(), Meters()
    answered(one, None, [Piece(tokens=(4,), finish="stop")])
    assert samples(Exposition(one, Stats, dict))["lofi_generated_tokens_total", (("adapter", "base"),)] == 1
    assert ("lofi_generated_tokens_total", (("adapter", "base"),)) not in samples(Exposition(other, Stats, dict))


def test_names_with_quotes_stay_one_label():
    meters = Meters()
    answered(meters, 'a"b\nc\\', [Piece(tokens=(4,), finish="stop")])
    found = samples(Exposition(meters, Stats, {'a"b\nc\\': "host"}.copy))
    assert found["lofi_requests_total", (("adapter", 'a"b\nc\\'), ("finish", "stop"))] == 1


def test_a_spread_counts_cumulatively_and_knows_its_percentiles():
    spread = Spread((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 3.0):
        spread.add(seconds)
    spread.add(0.2, 2)
    assert spread.buckets() == [("0.1", 2.0), ("1.0", 5.0), ("+Inf", 6.0)] and spread.total == pytest.approx(4.05)
    assert spread.percentiles() == {"p50": 200.0, "p95": 3000.0, "p99": 3000.0}
    assert Spread((1.0,)).percentiles() == {"p50": None, "p95": None, "p99": None}


def test_the_latest_requests_are_kept_and_no_more():
    meters = Meters()
    for number in range(60):
        answered(meters, None, [Piece(tokens=(4,), finish="length")], prompt=(1,) * (number + 1))
    assert len(meters.requests) == 50 and meters.requests[-1]["prompt_tokens"] == 60
    assert meters.requests[-1]["finish"] == "length" and meters.requests[-1]["first_token_ms"] >= 0


def test_a_piece_after_the_end_is_not_counted():
    meters = Meters()
    answered(meters, None, [Piece(tokens=(4,), finish="stop"), Piece(tokens=(5,), finish="cancelled")])
    assert sum(meters.finished.values()) == 1 and meters.tokens_made["base"] == 1
