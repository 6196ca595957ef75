"""A `lofi serve` in a process of its own on a free port, and how much memory it holds."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN = "bench-admin-token"
START, STOP = 120.0, 30.0  # seconds


@dataclass
class Server:
    """A running server: where it listens, and its process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def resident(self) -> int:
        """Bytes of its memory, anonymous pages only: mapped files come and go as the kernel likes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", text)
        if found is None:
            raise RuntimeError("memory is measured by /proc's RssAnon, which this system does not have")
        return int(found[1]) * 1024

    def said(self) -> str:
        """The last lines it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])


@contextlib.contextmanager
def serving(model: Path, adapters: Mapping[str, Path], *more: str) -> Iterator[Server]:
    """`lofi serve` with these adapters while the block runs; then SIGTERM, and it must end by itself.

    Raises  RuntimeError where it does not come up or does not go down, with what it wrote
    """
    port = free_port()
    words = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    command = [sys.executable, "-m", "lofi", "serve", "--model", str(model), "--port", str(port), *words, *more]
    with tempfile.TemporaryDirectory(prefix="lofi-serve-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        server = Server(port, process, log)
        try:
            _await(server)
            yield server
            _end(server)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(server: Server) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if server.process.poll() is not None:
            raise RuntimeError(f"lofi serve ended with {server.process.returncode}:\n{server.said()}")
        if _ready(server.port):
            return
        time.sleep(0.1)
    raise RuntimeError(f"lofi serve was not ready after {START:.0f} s:\n{server.said()}")


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return answer.status == 200
    except OSError:  # nobody listens yet, or it answers that it is not ready
        return False


def _end(server: Server) -> None:
    if server.process.poll() is not None:
        raise RuntimeError(f"lofi serve ended by itself with {server.process.returncode}:\n{server.said()}")
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(STOP)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"lofi serve went on for {STOP:.0f} s after SIGTERM:\n{server.said()}") from None
    if code not in (0, -signal.SIGTERM):
        raise RuntimeError(f"lofi serve ended with {code} after SIGTERM:\n{server.said()}")
