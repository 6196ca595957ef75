"""The serving claims' harness: it runs on tiny settings, and what it checks can fail."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from bench import serve_equal, serve_load
from bench.checkpoints import Shape
from bench.engine_clients import Answer, ask_all, tokens_of
from bench.groups import GROUPS, PERFORMANCE, SERVING, chosen, group_of
from bench.http_clients import Connection

from lofi.serve.request import Asked, Piece
from tiny_serving import decoder

TINY = Shape(32, 2, 48, 4, 2, 8192, tied=True)


class Scripted:
    """An engine that answers each request with 10, 11, 12, ... in a thread of its own, and counts who waits at once."""

    def __init__(self, finish: str = "length") -> None:
        self.finish, self.open, self.most = finish, 0, 0

    def submit(self, asked, on_piece):
        self.open += 1
        self.most = max(self.most, self.open)
        ticket = SimpleNamespace(stopped=threading.Event())
        ticket.cancel = ticket.stopped.set

        def answer() -> None:
            for number in range(asked.max_tokens):
                last = number == asked.max_tokens - 1
                if number == 2 and asked.adapter == "slow":
                    ticket.stopped.wait(10)
                stopped = ticket.stopped.is_set()
                if last or stopped:
                    self.open -= 1
                finish = "cancelled" if stopped else self.finish if last else None
                on_piece(Piece(tokens=() if stopped else (10 + number,), finish=finish))
                if finish:
                    return

        threading.Thread(target=answer).start()
        return ticket


def test_clients_ask_one_after_another_and_every_answer_is_kept_in_order():
    engine = Scripted()
    requests = [Asked(prompt=(5,), max_tokens=1 + number % 4) for number in range(30)]
    answers = ask_all(engine, requests, clients=3)
    assert [len(answer.tokens) for answer in answers] == [asked.max_tokens for asked in requests]
    assert engine.most <= 3
    assert tokens_of(answers) == sum(asked.max_tokens for asked in requests)
    assert all(answer.first_token > 0 and len(answer.gaps) == len(answer.tokens) - 1 for answer in answers)


def test_a_request_is_cancelled_after_so_many_tokens():
    answers = ask_all(Scripted(), [Asked(prompt=(5,), adapter="slow", max_tokens=9)], clients=1, cancel_after={0: 2})
    assert (answers[0].tokens, answers[0].finish) == ([10, 11], "cancelled")


def test_answers_that_ended_in_an_error_are_not_counted_as_throughput():
    with pytest.raises(RuntimeError, match="2 answers ended with error"):
        tokens_of(ask_all(Scripted("error"), [Asked(prompt=(5,), max_tokens=2)] * 2, clients=2))


@pytest.fixture(scope="module")
def compared():
    """A plain model, three requests, and the right answers to them."""
    model = decoder()
    requests = [Asked(prompt=(5, 9, 14 + i), max_tokens=6, stop_ids=(2,) * (i > 0)) for i in range(3)]
    right = [serve_equal.alone(model, asked) for asked in requests]
    return model, requests, right


def found(compared, change):
    """What `compare` finds where `change(ids)` is the first request's answer, (ids, finish), and the rest are right."""
    model, requests, right = compared
    ends = [serve_equal.end_of(asked, ids) for asked, ids in zip(requests, right, strict=True)]
    answers = [Answer(tokens=list(ids), finish=end) for ids, end in zip(right, ends, strict=True)]
    answers[0].tokens, answers[0].finish = change(right[0], ends[0])
    return serve_equal.compare(model, requests, answers)


def test_equal_answers_and_a_cancelled_beginning_are_equal(compared):
    assert found(compared, lambda ids, end: (ids, end)) == (3, [], [])
    assert found(compared, lambda ids, end: (ids[:2], "cancelled")) == (3, [], [])


def test_another_token_a_missing_one_and_a_wrong_end_are_found(compared):
    def other(ids):
        return [*ids[:2], (ids[2] + 1) % 61, *ids[3:]]

    for finish in ("length", "cancelled"):
        _, (difference,), _ = found(compared, lambda ids, end, finish=finish: (other(ids), finish))
        assert (difference.request, difference.place) == (0, 2) and difference.gap > 0
    assert len(found(compared, lambda ids, end: (ids[:-1], end))[1]) == 1
    assert len(found(compared, lambda ids, end: ([*ids, 7], end))[1]) == 1
    wrong_end = found(compared, lambda ids, end: (ids, "deadline"))
    assert not wrong_end[1] and wrong_end[2] == [f"request 0 ended with deadline, not {end_of(compared)}"]


def end_of(compared):
    return serve_equal.end_of(compared[1][0], compared[2][0])


def test_only_a_gap_within_bf16s_rounding_is_a_near_tie():
    assert serve_equal.Difference(0, 0, gap=0.0625, score=10.8).near_tie
    assert not serve_equal.Difference(0, 0, gap=0.2, score=10.8).near_tie
    assert not serve_equal.Difference(0, 0, gap=float("inf"), score=0.0).near_tie


def test_requests_are_drawn_the_same_every_time_with_every_adapter_and_some_cancelled():
    requests, cancelled = serve_equal.draw(["a", "b"], 60)
    assert serve_equal.draw(["a", "b"], 60) == (requests, cancelled)
    assert {asked.adapter for asked in requests} == {None, "a", "b"} and len(cancelled) == 10
    assert all(1 <= at <= requests[number].max_tokens for number, at in cancelled.items())


def test_what_a_name_stood_for_is_everything_that_overlaps():
    line = serve_load.Timeline(frozenset(["one"]))
    line.entries += [(10.0, frozenset(["one", "404"])), (11.0, frozenset(["404"])), (12.0, frozenset(["two"]))]
    assert line.between(1, 9) == {"one"}
    assert line.between(9, 10.5) == {"one", "404"}
    assert line.between(11.5, 30) == {"404", "two"}
    assert line.between(13, 14) == {"two"}


PROMPT = (5, 6)
EXPECTED = {(who, PROMPT): (index, 7) for index, who in enumerate(("base", *serve_load.FOLDERS), start=20)}


@asynccontextmanager
async def pretending(answer, unloading=200):
    """An HTTP server whose completions are `answer(name)`: ids, or (status, headers); chunked where it streams."""
    current = {serve_load.SWAPS: "swaps-one"}

    async def talk(reader, writer):
        with suppress(EOFError):  # the client left
            while head := await reader.readuntil(b"\r\n\r\n"):
                reply(writer, head.split(b" ")[1].decode(), json.loads(await rest(reader, head) or b"{}"))
        writer.close()

    async def rest(reader, head):
        return await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))

    def reply(writer, path, body):
        if path == "/v1/models":
            send(writer, 200, {}, {"data": [{"id": "the-base"}]})
        elif path == "/v1/completions":
            name = "base" if body["model"] == "the-base" else body["model"]
            found = answer(current.get(name, name)) if current.get(name, name) else (404, {})
            if isinstance(found[1], dict):
                send(writer, *found, {})
            else:
                send(writer, 200, {}, {"choices": [{"token_ids": found}]}, stream=body.get("stream", False))
        else:
            current[body["lora_name"]] = body.get("lora_path")
            send(writer, 200 if "lora_path" in body else unloading, {}, {})

    def send(writer, status, headers, body, *, stream=False):
        raw = json.dumps(body).encode()
        if stream:
            raw = b"data: " + raw + b"\n\ndata: [DONE]\n\n"
            parts = [raw[:9], raw[9:]]
            raw = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        told = {"transfer-encoding": "chunked"} if stream else {"content-length": len(raw)}
        lines = "".join(f"{key}: {value}\r\n" for key, value in {**headers, **told}.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + raw)

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def loaded(answer, requests: int = 60, unloading: int = 200, every: float = 60.0):
    """What the load test counts where the server answers so, and adapters are changed after `every` seconds."""

    async def run():
        async with pretending(answer, unloading) as port:
            server = SimpleNamespace(port=port, resident=lambda: 1000)
            folders = {name: name for name in serve_load.FOLDERS}
            return await serve_load.Load(server, folders, EXPECTED, requests, clients=5, change_every=every).run()

    return asyncio.run(run())


def test_right_answers_streamed_or_not_are_counted_as_right():
    counted = loaded(lambda who: EXPECTED[who, PROMPT])
    assert counted.outcomes == {"right": 60} and counted.answered == 60
    assert len(counted.seconds) == 60 and len(counted.first) == 15 and counted.memory


def test_the_base_in_an_adapters_place_is_a_wrong_answer_and_is_told():
    counted = loaded(lambda who: EXPECTED["base" if who == "steady-2" else who, PROMPT])
    assert counted.outcomes["wrong"] > 0 and counted.outcomes["right"] > 0
    assert all("for steady-2 was answered as by base" in fault for fault in counted.faults)


def test_a_failure_and_a_404_of_a_loaded_adapter_are_lost_requests():
    for status in (500, 404):
        counted = loaded(lambda who, status=status: (status, {}) if who == "steady-1" else EXPECTED[who, PROMPT])
        assert counted.outcomes["lost"] > 0 and counted.answered == 60 - counted.outcomes["lost"]


def test_after_a_429_the_client_comes_back():
    refusals = iter([(429, {"retry-after": 0})] * 7)
    counted = loaded(lambda who: next(refusals, EXPECTED[who, PROMPT]))
    assert counted.outcomes == {"right": 60} and next(refusals, None) is None


def test_adapters_that_come_and_go_are_404_or_right_and_never_another_after_their_time():
    counted = loaded(lambda who: EXPECTED[who, PROMPT], requests=900, every=0.0)
    assert set(counted.outcomes) == {"right", "404 as it should"} and counted.answered == 900
    assert counted.changes > 20
    stale = loaded(lambda who: EXPECTED[who.replace("two", "one"), PROMPT], requests=900, every=0.0)
    assert stale.outcomes["wrong"] > 0  # swaps-one went on to answer when swaps-two had its name


def test_a_server_that_does_not_unload_fails_the_claim():
    with pytest.raises(RuntimeError, match="adapters were not changed") as caught:
        loaded(lambda who: EXPECTED[who, PROMPT], requests=400, unloading=409, every=0.0)
    assert "unload answered 409" in str(caught.value.__cause__)


def test_memory_that_grows_misses_its_goal():
    flat = [(share / 100, 500 + share % 3) for share in range(100)]
    grown = [(share / 100, 500 + share) for share in range(100)]
    assert serve_load.memory_lines(flat)[0]["reached"] and not serve_load.memory_lines(grown)[0]["reached"]


def test_quantiles_are_those_of_the_sorted_values():
    at = serve_load.quantiles([float(value) for value in range(100, 0, -1)])
    assert (at[50], at[95], at[99]) == (51.0, 96.0, 100.0)


def test_a_connection_is_used_again_and_opened_anew_when_the_server_closed_it():
    async def run():
        async with pretending(lambda who: EXPECTED[who, PROMPT]) as port, Connection(port) as connection:
            first = await connection.ask("/v1/models")
            writer = connection.writer
            again = await connection.ask("/v1/completions", {"model": "comes"})
            assert connection.writer is writer
            await connection.close()
            return first, again, await connection.ask("/v1/models")

    first, again, anew = asyncio.run(run())
    assert first.json() == anew.json() == {"data": [{"id": "the-base"}]}
    assert again.json()["choices"][0]["token_ids"] == list(EXPECTED["comes", PROMPT])


def test_a_groups_name_stands_for_its_claims_and_none_for_all():
    assert chosen(["serving", "load", "serve_load"]) == [*SERVING.claims, "load"]
    assert chosen([]) == [claim for group in GROUPS.values() for claim in group.claims]
    assert group_of("nf4_rows") is PERFORMANCE and group_of("serve_equal") is SERVING
    assert len(set(chosen([]))) == len(PERFORMANCE.claims) + len(SERVING.claims)


def test_a_claim_that_fails_does_not_lose_the_others(monkeypatch, capsys):
    from bench import __main__ as command

    def fails():
        raise RuntimeError("out of luck")

    monkeypatch.setitem(sys.modules, "bench.serve_equal", SimpleNamespace(run=fails))
    monkeypatch.setitem(
        sys.modules, "bench.serve_load", SimpleNamespace(run=lambda requests=9: ran.append(requests) or [])
    )
    monkeypatch.setattr(sys, "argv", ["bench", "serve_equal", "serve_load", "--requests", "3"])
    ran = []
    with pytest.raises(SystemExit, match="failed: serve_equal"):
        command.main()
    assert ran == [3] and "out of luck" in capsys.readouterr().err


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Kept figures of two claims, one of them the curve."""
    from bench import serving_page
    from bench.claim import line

    entry = {"machine": "a machine", "date": "2026-01-02", "seconds": 3.0}
    point = {"clients": 4, "tokens_per_second": 1234.5, "first_ms": [5.0, 9.0], "token_ms": [1.25, 2.5]}
    curve = [line("curve", 1.0) | {"curve": point | {"model": model}} for model in ("small", "large")]
    rows = {"serve_sizing": curve, "serve_equal": [line("answers | equal", 499, goal=">= 500")]}
    for name, its in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entry | {"rows": its}))
    monkeypatch.setattr(serving_page, "kept_file", lambda name: tmp_path / f"{name}.json")
    return serving_page


def test_the_page_is_the_template_with_figures_curve_and_what_is_missing(kept, tmp_path):
    kept.write_serving_page(SERVING.claims, tmp_path / "docs" / "serving.md")
    page = (tmp_path / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "<!--" not in page and "Goals reached: 0 of the 1 measured." in page
    assert "| 4 | 1,234 | 5.0 | 9.0 | 1.25 | 2.50 |" in page and "small:" in page and "large:" in page
    assert "| answers \\| equal | 499 |  | >= 500 | **no** |  |" in page
    assert "ONLY=gpu_decode`): needs a CUDA or ROCm GPU" in page and "ONLY=serve_load`)\n" in page
    assert (tmp_path / "docs" / kept.CURVE).read_text().count("small") == 3


def test_a_template_without_a_place_or_with_a_strange_one_is_an_error(kept):
    assert kept.filled("a\n<!-- one -->\nb", {"one": "1\n"}) == "a\n1\nb"
    for template in ("a\nb", "<!-- one -->\n<!-- two -->"):
        with pytest.raises(ValueError, match="the template has the places"):
            kept.filled(template, {"one": "1"})


def test_eight_adapters_in_one_batch_are_measured_beside_peft_which_computes_the_same():
    pytest.importorskip("peft")
    from bench import batched_adapters

    rows = batched_adapters.run(rounds=2, shape=TINY, loaded=16)
    assert len(rows) == 14 and all(row["value"] > 0 for row in rows)
    assert sum(row["peer"] is not None for row in rows) == 8
    logits = torch.tensor([[1.0, -2.0]])
    batched_adapters.agree(logits, logits + 1e-6)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        batched_adapters.agree(logits, logits + 0.01)


def test_switching_is_measured_with_few_and_many_held_and_so_is_placing(monkeypatch):
    pytest.importorskip("peft")
    from bench import adapter_switch

    monkeypatch.setattr(adapter_switch, "SHAPE", TINY)
    monkeypatch.setattr(adapter_switch, "SMALL", TINY)
    monkeypatch.setattr(adapter_switch, "CALLS", 5)
    rows = {row["what"]: row for row in adapter_switch.run(rounds=2, held=9)}
    assert {"switching to another adapter, 2 held", "switching to another adapter, 9 held"} < set(rows)
    memory, disk = (row["value"] for what, row in rows.items() if what.startswith("placing"))
    assert memory > 0 and disk > 0


def test_two_engines_answer_the_same_requests_with_and_without_adapters(tmp_path):
    from bench import serve_throughput
    from bench.paired import interleaved
    from bench.served import eight, open_model, write_model

    folder = write_model(TINY, tmp_path / "model", torch.float32)
    adapters = eight(open_model(folder)[0], tmp_path / "adapters")
    with serve_throughput.engines(folder, adapters, 4) as sides:
        row = serve_throughput._line("tiny", interleaved(sides, rounds=2, warm_up=1), 4)
    assert row["value"] > 0 and "8 adapters" in row["detail"]


def test_the_step_that_a_gpu_is_timed_on_runs_and_adapters_change_it(monkeypatch):
    from bench import gpu_decode

    monkeypatch.setattr(gpu_decode, "PAST", 5)
    steps = gpu_decode.decoding(TINY, "cpu")
    first, other, again = steps["base"](), steps["8 adapters"](), steps["base"]()
    assert torch.equal(first, again) and first.shape == (32, 1, TINY.vocab)
    assert torch.isfinite(other).all() and not torch.allclose(first, other, atol=0.01)
    for call in gpu_decode.products(TINY, "cpu").values():
        call()
