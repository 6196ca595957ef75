"""The flags of `lofi serve`: what each becomes, and the sentences for those that cannot be."""

from __future__ import annotations

import importlib
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason='the server needs its extra: pip install "lofi[serve]"')

from lofi.cli.main import main
from lofi.cli.serve import announcement, facts
from lofi.serve.request import Stats


@pytest.fixture
def started(monkeypatch):
    """What `serve` was called with, in place of serving."""
    import lofi.serve.logs
    import lofi.serve.run

    seen = {}
    monkeypatch.setattr(
        lofi.serve.run,
        "serve",
        lambda options, settings, **more: seen.update(options=options, settings=settings, **more),
    )
    monkeypatch.setattr(lofi.serve.logs, "to_stderr", lambda level: seen.update(level=level))
    for name in ("LOFI_API_KEY", "LOFI_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_without_flags_it_listens_on_loopback_alone_and_loads_nothing_over_http(started):
    assert main(["serve", "--model", "m"]) == 0
    settings, options = started["settings"], started["options"]
    assert (started["host"], started["port"], started["level"]) == ("127.0.0.1", 8000, "info")
    assert settings.hosts >= {"127.0.0.1", "localhost"} and settings.api_key is None and not settings.can_load
    assert (options.max_rows, options.max_queue, options.adapter_slots, options.context) == (16, 256, 8, None)
    assert settings.request_timeout == 600 and settings.drain_seconds == 30 and options.dtype == "auto"


def test_every_flag_is_read(started, tmp_path):
    flags = (
        "--adapter law=a --adapter b --host 0.0.0.0 --port 81 --api-key key --admin-token boss --max-rows 3 "
        "--max-queue 4 --adapter-slots 5 --context 60 --cache-tokens 70 --drain-seconds 8 --request-timeout 0 "
        "--log-level debug --seed 9 --dtype fp32 --quantization nf4 --device cpu"
    )
    assert main(["serve", "--model", "m", *flags.split(), "--adapter-folder", str(tmp_path)]) == 0
    settings, options = started["settings"], started["options"]
    assert options.adapters == {"law": Path("a"), "b": Path("b")}
    assert (started["host"], started["port"], started["level"]) == ("0.0.0.0", 81, "debug")
    assert (settings.api_key, settings.admin_token, settings.adapter_folder) == ("key", "boss", tmp_path)
    assert settings.hosts is None and settings.drain_seconds == 8 and settings.request_timeout is None
    assert (options.max_rows, options.max_queue, options.adapter_slots) == (3, 4, 5)
    assert (options.context, options.cache_tokens, options.seed) == (60, 70, 9)
    assert (options.dtype, options.quantization, options.device) == ("fp32", "nf4", "cpu")


def test_keys_come_from_the_environment_too(started, monkeypatch, tmp_path):
    monkeypatch.setenv("LOFI_API_KEY", "k1")
    monkeypatch.setenv("LOFI_ADMIN_TOKEN", "k2")
    assert main(["serve", "--model", "m", "--adapter-folder", str(tmp_path)]) == 0
    assert (started["settings"].api_key, started["settings"].admin_token) == ("k1", "k2")
    assert "k1" not in repr(started["settings"]) and "k2" not in repr(started["settings"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--adapter-folder", "."], "needs --admin-token"),
        (["--adapter-folder", "nowhere", "--admin-token", "x"], "which is no folder"),
        (["--api-key", ""], "--api-key is empty"),
        (["--admin-token", " x"], "--admin-token is empty or holds spaces"),
        (["--log-level", "loud"], "--log-level is 'loud'"),
        (["--port", "70000"], "--port"),
        (["--max-rows", "0"], "--max-rows"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--adapter", "a", "--adapter", "x/a"], "two adapters are called a"),
        (["--adapter", "base=a"], "cannot be called base"),
    ],
)
def test_a_flag_that_cannot_be_is_one_sentence_and_exit_code_2(started, flags, told, capsys):
    assert main(["serve", "--model", "m", *flags]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and out == "" and not started


def test_without_the_extra_it_says_what_to_install(started, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError):
        importlib.import_module("uvicorn")
    assert main(["serve", "--model", "m"]) == 2
    assert 'needs uvicorn, which is not installed; pip install "lofi[serve]"' in capsys.readouterr().err


def test_a_port_in_use_and_a_missing_model_end_with_2_and_a_missing_adapter_with_1(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lofi.serve.logs.to_stderr", lambda level: None)  # other tests read the log
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "is in use" in capsys.readouterr().err
    assert main(["serve", "--model", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["serve", "--model", str(tmp_path), "--adapter", str(tmp_path / "absent"), "--port", "0"]) == 1
    assert "has no folder" in capsys.readouterr().err


def service_of(*held):
    stats = Stats(rows=16, threads=2)
    return SimpleNamespace(model_name="small", context=160, adapters=lambda: list(held), stats=lambda: stats)


RED = SimpleNamespace(name="red", rank=3, bytes=1_500_000, modules=("q_proj",), notes=("no golden prompts",), key="abc")


def test_the_start_tells_where_who_and_a_first_request():
    open_to_all = SimpleNamespace(hosts=None, api_key=None)
    told = announcement("http://127.0.0.1:8", service_of(RED), open_to_all)
    assert "small and 1 adapter at http://127.0.0.1:8 (page: http://127.0.0.1:8/)" in told
    assert "rank 3" in told and "1.50 MB" in told and "q_proj" in told and "no golden prompts" in told
    assert "anyone who reaches this address may ask" in told
    assert "up to 16 requests at once, 160 tokens each; threads: 2, as tried" in told
    body = json.loads(told.rpartition("-d '")[2].removesuffix("'"))
    assert body["model"] == "red" and body["messages"][0]["role"] == "user"


def test_a_thousand_adapters_are_not_a_thousand_lines():
    told = announcement("http://x", service_of(*[RED] * 1000), SimpleNamespace(hosts=frozenset(), api_key=None))
    assert "and 980 more" in told and told.count("rank 3") == 20


def test_with_a_key_the_first_request_brings_it_and_nobody_is_warned():
    told = announcement("http://x", service_of(), SimpleNamespace(hosts=None, api_key="secret"))
    assert "$LOFI_API_KEY" in told and "secret" not in told and "anyone" not in told and '"model": "small"' in told


def test_json_says_the_address_and_the_adapters():
    rows = [{"name": "red", "rank": 3, "bytes": 1_500_000, "key": "abc"}]
    told = {"url": "http://x", "model": "small", "context": 160, "threads": 2, "adapters": rows}
    assert facts("http://x", service_of(RED)) == told
