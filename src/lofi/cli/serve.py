"""`lofi serve`: an OpenAI-compatible server over one base and many adapters, with a page."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import print_json
from lofi.errors import RecipeError, RequestError
from lofi.serve.logs import LEVELS

SHOWN = 20  # adapters in the table at the start
Host = Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen at; 0 takes a free one.", min=0, max=65535)]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Bearer token that clients must send.", envvar="LOFI_API_KEY", show_envvar=True),
]
AdminToken = Annotated[
    str | None,
    typer.Option(
        "--admin-token", help="Bearer token for loading and unloading.", envvar="LOFI_ADMIN_TOKEN", show_envvar=True
    ),
]
AdapterFolder = Annotated[
    str | None,
    typer.Option("--adapter-folder", help="The only folder that adapters are loaded from over HTTP.", metavar="FOLDER"),
]
MaxRows = Annotated[int, typer.Option("--max-rows", help="Requests answered at once.", min=1)]
MaxQueue = Annotated[int, typer.Option("--max-queue", help="Requests that wait; more are told to come back.", min=0)]
Slots = Annotated[int, typer.Option("--adapter-slots", help="Adapters on the device at once.", min=1)]
Context = Annotated[
    int | None, typer.Option("--context", help="Most tokens of prompt and answer; default: the model's.", min=2)
]
CacheTokens = Annotated[
    int | None,
    typer.Option("--cache-tokens", help="Tokens of all requests together; default: all rows full.", min=2),
]
DrainSeconds = Annotated[float, typer.Option("--drain-seconds", help="Time to finish answers when stopped.", min=0)]
Timeout = Annotated[float, typer.Option("--request-timeout", help="Seconds an answer may take; 0: any time.", min=0)]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]


def serve(
    model: flags.Model,
    adapter: flags.Adapters = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    admin_token: AdminToken = None,
    adapter_folder: AdapterFolder = None,
    max_rows: MaxRows = 16,
    max_queue: MaxQueue = 256,
    adapter_slots: Slots = 8,
    context: Context = None,
    cache_tokens: CacheTokens = None,
    drain_seconds: DrainSeconds = 30.0,
    request_timeout: Timeout = 600.0,
    log_level: LogLevel = "info",
    seed: flags.Seed = 0,
    dtype: flags.Dtype = "auto",
    quantization: flags.Quantization = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Serve a base and many adapters to OpenAI's clients, in one batch, with a page in the browser.

    The `model` of a request chooses: the base's name or an adapter's. Every adapter is proved before it is admitted.
    Ctrl-C or SIGTERM lets running answers finish. Under --json one object with the address is printed when it is ready.

    \b
    Examples:
      lofi serve --model demo:model --adapter demo-run=demo-run/run
      lofi serve --model ./Qwen3-0.6B --adapter law=runs/law --adapter poet=runs/poet --port 8080
      LOFI_ADMIN_TOKEN=... lofi serve --model ./Qwen3-0.6B --adapter-folder runs
    """
    check_installed()
    folder = checked(api_key, admin_token, adapter_folder, log_level)
    named = flags.named_adapters(adapter)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        from lofi.serve.limits import Settings
        from lofi.serve.logs import to_stderr
        from lofi.serve.run import ServeOptions, hosts_of
        from lofi.serve.run import serve as run

        to_stderr(log_level)
        settings = Settings(
            api_key=api_key, admin_token=admin_token, adapter_folder=folder, hosts=hosts_of(host),
            request_timeout=request_timeout or None, drain_seconds=drain_seconds,
        )  # fmt: skip
        options = ServeOptions(
            model=model, adapters=named, dtype=dtype, quantization=quantization, device=device, seed=seed,
            max_rows=max_rows, max_queue=max_queue, adapter_slots=adapter_slots, context=context,
            cache_tokens=cache_tokens,
        )  # fmt: skip

        def ready(url: str, service: Any) -> None:
            print(announcement(url, service, settings), file=sys.stderr, flush=True)
            if as_json:
                with contextlib.redirect_stdout(stdout):
                    print_json(facts(url, service))

        run(options, settings, host=host, port=port, ready=ready)


def check_installed() -> None:
    """RequestError naming the extra where a library of the server is missing."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise RequestError(f'lofi serve needs {name}, which is not installed; pip install "lofi[serve]"') from None


def checked(api_key: str | None, admin_token: str | None, adapter_folder: str | None, log_level: str) -> Path | None:
    """The adapter folder, after a look at the flags that stand beside it.

    Raises  RecipeError
    """
    for flag, token in (("--api-key", api_key), ("--admin-token", admin_token)):
        if token is not None and (not token.strip() or token != token.strip() or not token.isprintable()):
            raise RecipeError(f"{flag} is empty or holds spaces at its ends; give a long random word")
    if log_level not in LEVELS:
        raise RecipeError(f"--log-level is {log_level!r}; use one of {', '.join(LEVELS)}")
    if adapter_folder is None:
        return None
    if admin_token is None:
        raise RecipeError("--adapter-folder opens a folder for loading, which needs --admin-token; give one")
    if not Path(adapter_folder).is_dir():
        raise RecipeError(f"--adapter-folder is {adapter_folder}, which is no folder; give one that exists")
    return Path(adapter_folder)


def announcement(url: str, service: Any, settings: Any) -> str:
    """What is served, where, and a first request to copy."""
    held = service.adapters()
    lines = [f"{service.model_name} and {len(held)} adapter{'s' * (len(held) != 1)} at {url} (page: {url}/)"]
    width = max((len(one.name) for one in held), default=0)
    for one in held[:SHOWN]:
        lines.append(f"  {one.name:<{width}}  rank {one.rank:<4} {one.bytes / 1e6:8.2f} MB  {', '.join(one.modules)}")
        lines += [f"  {'':<{width}}  note: {note}" for note in one.notes]
    lines += [f"  and {len(held) - SHOWN} more"] if len(held) > SHOWN else []
    stats = service.stats()
    room = f"up to {stats.rows} requests at once, {service.context:,} tokens each"
    lines.append(f"  {room}; threads: {stats.threads}, as tried")
    if settings.hosts is None and settings.api_key is None:
        lines.append("  anyone who reaches this address may ask; give --api-key to change that")
    body = {"model": held[0].name if held else service.model_name, "messages": [{"role": "user", "content": "Hello"}]}
    key = ' -H "Authorization: Bearer $LOFI_API_KEY"' if settings.api_key else ""
    lines.append(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{json.dumps(body)}'")
    return "\n".join(lines)


def facts(url: str, service: Any) -> dict[str, Any]:
    """The object of --json."""
    rows = [{"name": one.name, "rank": one.rank, "bytes": one.bytes, "key": one.key} for one in service.adapters()]
    server = {"url": url, "model": service.model_name, "context": service.context, "threads": service.stats().threads}
    return {**server, "adapters": rows}
