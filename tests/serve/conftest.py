"""A tiny model with two live adapters, an engine without a model for faults, and a real server on a free port."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path

import pytest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session")
def served_model(tmp_path_factory, lofi_tiny) -> Path:
    """A random two-layer Llama with lofi-tiny's tokenizer (float32, in != out, odd inner size, context 160)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("served") / "small"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(lofi_tiny / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def served_adapters(tmp_path_factory, served_model) -> dict[str, Path]:
    """Two adapters of that model: red (r 3, alpha 7, q and v) and blue (r 5, alpha 4, all linears), far off."""
    import torch

    import lofi

    root = tmp_path_factory.mktemp("adapters")
    plans = {"red": (3, 7, ["q_proj", "v_proj"]), "blue": (5, 4, "all-linear")}
    found = {}
    for seed, (name, (rank, alpha, targets)) in enumerate(plans.items(), start=1):
        model = lofi.load_model(str(served_model), dtype="fp32", device="cpu")
        torch.manual_seed(seed)
        lofi.add_adapter(model, lofi.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        found[name] = Path(lofi.save_adapter(model, root / name))
    return found


@pytest.fixture(scope="session")
def served_tokenizer(served_model):
    """The tokenizer of `served_model`."""
    from lofi.models.load import load_tokenizer

    return load_tokenizer(served_model)


class ScriptedEngine:
    """An engine without a model: each request gets the pieces that `script(asked)` yields, in one thread.

    It keeps the rules of the real one (submit raises at once, on_piece from another thread, one last piece).
    """

    vocabulary = 8192

    def __init__(self, script, rows: int = 4, queue: int = 4) -> None:
        self.script, self.rows, self.queue = script, rows, queue
        self.asked, self.cancelled = [], []
        self.draining = False
        self.alive = True
        self._live = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, asked, on_piece):
        from lofi.serve.request import Draining, Overloaded

        with self._lock:
            if self.draining:
                raise Draining("the engine is draining")
            if len(self._live) >= self.rows + self.queue:
                raise Overloaded("the queue is full", retry_after=1.5)
            self.asked.append(asked)
            ticket = ScriptedTicket(len(self.asked), iter(self.script(asked)), on_piece)
            self._live.append(ticket)
        return ticket

    def stats(self):
        from lofi.serve.request import Stats

        live = len(self._live)
        running = min(live, self.rows)
        return Stats(
            running=running, waiting=live - running, rows=self.rows, queue=self.queue, draining=self.draining
        )  # fmt: skip

    def drain(self, timeout: float) -> bool:
        self.draining = True
        end = time.monotonic() + timeout
        while self._live and time.monotonic() < end:
            time.sleep(0.005)
        return not self._live

    def stop(self) -> None:
        self.alive = False
        self._thread.join(5)

    def _run(self) -> None:
        while self.alive:
            with self._lock:
                now = self._live[: self.rows]
            for ticket in now:
                if self._over(ticket):
                    with self._lock:
                        self._live.remove(ticket)
            if not now:
                time.sleep(0.002)

    def _over(self, ticket) -> bool:
        from lofi.serve.request import Piece

        if ticket.gone.is_set():
            self.cancelled.append(ticket.id)
            ticket.on_piece(Piece(finish="cancelled"))
            return True
        piece = next(ticket.pieces)
        if piece is not None:  # None: a step without a piece
            ticket.on_piece(piece)
        return piece is not None and piece.finish is not None


class ScriptedTicket:
    def __init__(self, number: int, pieces, on_piece) -> None:
        self.id, self.pieces, self.on_piece = number, pieces, on_piece
        self.gone = threading.Event()

    def cancel(self) -> None:
        self.gone.set()


@pytest.fixture
def scripted(served_tokenizer):
    """Makes a Service over a ScriptedEngine: scripted(script, **fields of Service)."""
    from lofi.data.format import TextFormat
    from lofi.serve.service import Service

    engines = []

    def make(script, *, rows: int = 4, queue: int = 4, **changes):
        engine = ScriptedEngine(script, rows, queue)
        engine.start()
        engines.append(engine)
        settings = {
            "engine": engine, "tokenizer": served_tokenizer, "text_format": TextFormat.for_tokenizer(served_tokenizer),
            "model_name": "small", "context": 160, "eos_ids": (1,),
        }  # fmt: skip
        return Service(**(settings | changes))

    yield make
    for engine in engines:
        engine.stop()


@contextlib.contextmanager
def listening(app):
    """A real uvicorn in a thread on a free port of 127.0.0.1; gives its URL and stops by itself."""
    import uvicorn

    from lofi.serve.run import open_door

    door = open_door("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def serving():
    """`serving(app)` starts `listening` for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda app: stack.enter_context(listening(app))


@pytest.fixture(scope="module")
def real_server(served_model, served_adapters):
    """(url, Service): the tiny model with red and blue, behind HTTP; admin token "letmein"."""
    from lofi.serve.app import create_app
    from lofi.serve.limits import Settings
    from lofi.serve.run import ServeOptions, open_service

    options = ServeOptions(model=str(served_model), adapters=served_adapters, dtype="fp32", device="cpu", max_rows=4)
    service = open_service(options)
    folder = next(iter(served_adapters.values())).parent
    try:
        with listening(create_app(service, Settings(admin_token="letmein", adapter_folder=folder))) as url:
            yield url, service
    finally:
        service.engine.stop()
