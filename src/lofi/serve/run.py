"""`lofi serve` without its flags: model, adapters, engine and app joined, and the server's life from start to end.

The port is taken before the model is read, so a port in use costs no minutes. Told to stop (SIGINT, SIGTERM), the
server answers 503 to what is new, lets running answers end for `drain_seconds`, ends the rest with an error and leaves
with 0; told twice, it leaves at once. Knows uvicorn; no route. Rejected: uvicorn's own way to stop (it closes the port
first, so a client that asks meanwhile is refused a connection and not told when to come back) and its exit by signal.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import uvicorn

from lofi.errors import AdapterFileError, ModelError, RequestError
from lofi.serve.app import create_app
from lofi.serve.limits import LOOPBACK, Settings
from lofi.serve.logs import log, place_of
from lofi.serve.service import Service, drawing_of, eos_of

KEEP_ALIVE_SECONDS = 20  # above what HTTP clients keep a connection for, so that it is they who close it
HEADER_SECONDS = 30.0  # a connection that has not sent a whole request by then is closed
FLUSH_SECONDS = 0.3  # for the last events of ended streams to leave
ENDED = "the server is stopping and did not finish this answer: ask another one"
DIED = "the engine stopped: restart the server"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is served."""

    model: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    seed: int = 0
    max_rows: int = 16
    max_queue: int = 256
    adapter_slots: int = 8
    context: int | None = None
    cache_tokens: int | None = None


def open_service(options: ServeOptions) -> Service:
    """Load, prove and start everything but the port; whoever calls it stops `service.engine`.

    Raises  ModelError for a model that is not a decoder; AdapterFileError, ProofError or TargetError for an adapter
            that cannot be served; RequestError for a context that the model has not
    """
    import torch

    from lofi.adapters.batched import AdapterBank
    from lofi.data.format import TextFormat
    from lofi.evaluate.generation import context_length
    from lofi.models.load import load_model, load_tokenizer
    from lofi.quant.kernels.dispatch import low_rank_for
    from lofi.serve.engine import Engine
    from lofi.serve.store import AdapterStore

    check_folders(options.adapters)
    torch.manual_seed(options.seed)
    model = load_model(
        options.model, quantization=options.quantization, dtype=options.dtype, device=options.device
    )  # fmt: skip
    check_writes(model, options.model)
    check_context(options.context, context_length(model))
    tokenizer = load_tokenizer(options.model)
    bank = AdapterBank(model, slots=options.adapter_slots, product=low_rank_for(torch.device(model.device)))
    store = AdapterStore(model, tokenizer, bank=bank)
    name = name_of(options.model)
    for adapter, folder in options.adapters.items():
        if adapter == name:
            raise RequestError(f"an adapter has the model's own name {name!r}: give it as another-name={folder}")
        store.load(adapter, folder)
    engine = Engine(
        model, tokenizer, store, rows=options.max_rows, queue=options.max_queue, context=options.context,
        cache_tokens=options.cache_tokens,
    )  # fmt: skip
    engine.start()
    rules = model.generation_config
    return Service(
        engine=engine,
        tokenizer=tokenizer,
        text_format=TextFormat.for_tokenizer(tokenizer),
        model_name=name,
        context=engine.context,
        store=store,
        defaults=drawing_of(rules),
        eos_ids=eos_of(rules, tokenizer),
        seed=options.seed,
    )


def name_of(model: str) -> str:
    """What the base is called: the folder's own name, or the hub id as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def check_folders(adapters: Mapping[str, Path]) -> None:
    """AdapterFileError for a folder that does not exist, with the nearest one beside it; before the model is read."""
    for name, folder in adapters.items():
        if folder.is_dir():
            continue
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        close = get_close_matches(folder.name, beside, n=1)
        hint = f"did you mean {folder.parent / close[0]}?" if close else "give the folder that training wrote"
        raise AdapterFileError(f"the adapter {name} has no folder {folder}; {hint}")


def check_writes(model: Any, where: str) -> None:
    """ModelError for classifiers and encoder-decoders."""
    from lofi.models.facts import task_of

    task = task_of(model)
    if task == "SEQ_2_SEQ_LM":
        raise ModelError(f"{where} is an encoder-decoder, and lofi serve batches decoders only; use lofi generate")
    if task != "CAUSAL_LM":
        raise ModelError(f"{where} is a {task} model, which writes no text; try it with lofi evaluate --data")


def check_context(asked: int | None, stated: int | None) -> None:
    """RequestError for more positions than the model has."""
    if asked is not None and stated is not None and asked > stated:
        raise RequestError(f"--context is {asked}, but the model has {stated} positions; give at most that")


def serve(
    options: ServeOptions, settings: Settings, *, host: str, port: int, ready: Callable[[str, Service], Any]
) -> None:
    """Serve until told to stop; `ready(url, service)` is called when the first request can be answered.

    Raises  RequestError for a port that is taken; what `open_service` raises
    """
    door = open_door(host, port)
    try:
        service = open_service(options)
    except BaseException:
        door.close()
        raise
    url = url_of(host, door.getsockname()[1])
    config = uvicorn.Config(
        create_app(service, settings), log_config=None, access_log=False, server_header=False, lifespan="off",
        ws="none", proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=5,
    )  # fmt: skip
    try:
        Server(config, service, settings.drain_seconds, lambda: ready(url, service)).run(sockets=[door])
    finally:
        service.engine.stop()


def open_door(host: str, port: int) -> socket.socket:
    """The port, taken but not yet listened at.

    Raises  RequestError where it is taken, not allowed, or the host is none of this machine's
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # the protocol is named because asyncio switches Nagle's delay (40 ms an answer) off for named TCP alone
        door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise RequestError(f"port {port} of {host} is in use; give another --port (0 takes a free one)") from None
        raise RequestError(f"cannot listen at port {port} of {host} ({error}); give another --host or --port") from None
    door.setblocking(False)
    return door


def url_of(host: str, port: int) -> str:
    """The address to type into a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name and not name.startswith('[') else name}:{port}"


def hosts_of(host: str) -> frozenset[str] | None:
    """The Host headers to answer: loopback names and the one given; any where other machines may come in."""
    return LOOPBACK | {host} if host in LOOPBACK or host.startswith("127.") else None


class Server(uvicorn.Server):
    """uvicorn that drains before it closes, and watches engine and idle connections."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self.service, self._seconds, self._ready = service, seconds, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._quiet: dict[Any, float] = {}  # connections without a request under way, and since when
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then tell."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self._ready()
        if self._signals:
            self._begin()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains, the second leaves at once."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        self.service.stopping = True
        log(logging.INFO, "draining", seconds=self._seconds)
        try:
            finished = await asyncio.to_thread(self.service.engine.drain, self._seconds)
        except Exception as error:  # whatever the engine says to it, the server leaves
            log(logging.ERROR, "not drained", **place_of(error))
            finished = False
        ended = 0 if finished else self.service.end_all(ENDED)
        await asyncio.sleep(FLUSH_SECONDS)
        log(logging.INFO, "stopped", unfinished=ended)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end what a dead engine would leave waiting, close what never asks."""
        if not self.service.alive:
            self.service.end_all(DIED)
        if counter % 10 == 0:
            self._close_quiet(time.monotonic())
        return await super().on_tick(counter)

    def _close_quiet(self, now: float) -> None:
        quiet = [one for one in self.server_state.connections if _idle(one)]
        self._quiet = {one: self._quiet.get(one, now) for one in quiet}
        for connection, since in self._quiet.items():
            if now - since > HEADER_SECONDS:
                connection.transport.close()


def _idle(connection: Any) -> bool:
    cycle = getattr(connection, "cycle", None)
    return cycle is None or bool(cycle.response_complete)
