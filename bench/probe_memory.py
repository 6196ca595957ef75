"""Memory of a piece of work in a process of its own, watched from outside: Linux only, by /proc.

`probe("bench.load:ours", folder)` runs that function as `function(mark, folder)` in a fresh Python; it calls
`mark("loaded")` where a phase ends and returns a dict. Meanwhile the parent reads the child's anonymous and
file-backed resident pages every few milliseconds, so the work itself is not disturbed; a peak shorter than that may be
missed. The highest resident size is the kernel's own count. File-backed pages are mapped checkpoints and libraries: the
kernel may drop them at any time.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

EVERY = 0.003
MEGABYTE = 1e6
Mark = Callable[[str], None]


class Sample(NamedTuple):
    """Resident bytes at a moment of the monotonic clock."""

    at: float
    anonymous: int
    file: int


@dataclass(frozen=True)
class Probe:
    """What the function returned, when its phases ended, what was resident meanwhile, and the highest resident size."""

    answer: dict[str, Any]
    marks: dict[str, float]
    samples: list[Sample]
    peak_resident: int

    def seconds(self, start: str, end: str) -> float:
        """Time between two marks."""
        return self.marks[end] - self.marks[start]

    def anonymous_at(self, mark: str) -> int:
        """Anonymous bytes at the end of a phase."""
        return min(self.samples, key=lambda sample: abs(sample.at - self.marks[mark])).anonymous

    def peak_anonymous(self, start: str, end: str) -> int:
        """The most anonymous bytes seen between two marks."""
        inside = [s.anonymous for s in self.samples if self.marks[start] <= s.at <= self.marks[end]]
        return max([*inside, self.anonymous_at(start), self.anonymous_at(end)])


def probe(target: str, *words: str | Path) -> Probe:
    """Run `module:function` with these words in a fresh process and watch it.  Raises  RuntimeError where it fails"""
    if not Path("/proc/self/status").exists():
        raise RuntimeError("memory is measured by /proc, which this system does not have")
    with tempfile.TemporaryDirectory(prefix="lofi-probe-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "bench.probe_memory", str(answer), target, *map(str, words)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        samples = []
        while child.poll() is None:
            found = _sample(child.pid)
            samples += [found] if found else []
            time.sleep(EVERY)
        if child.returncode:
            raise RuntimeError(f"{target} ended with {child.returncode} in its own process; its message stands above")
        told = json.loads(answer.read_text())
    return Probe(told["answer"], told["marks"], samples, told["peak_resident"])


def _sample(process: int) -> Sample | None:
    at = time.monotonic()
    try:
        fields = _status(process)
    except OSError:
        return None
    if "RssAnon" not in fields:  # it has just ended
        return None
    return Sample(at, fields["RssAnon"], fields["RssFile"])


def _status(process: int | str) -> dict[str, int]:
    """The sizes of /proc/PROCESS/status in bytes."""
    lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _child(answer: Path, target: str, words: list[str]) -> None:
    from bench.peers import silence

    silence()
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        time.sleep(2 * EVERY)  # so that a sample falls near
        marks[name] = time.monotonic()

    module, _, function = target.partition(":")
    told = getattr(importlib.import_module(module), function)(mark, *words)
    found = {"answer": told, "marks": marks, "peak_resident": _status("self")["VmHWM"]}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
