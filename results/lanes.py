"""Experiments beside each other: which may start when, and one process for each.

An experiment's figures of quality do not depend on what else runs, so they run in lanes of one thread each, the longest
first. What is timed, and what measures memory, runs at the end: alone, with every core.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LINES_OF_A_FAILURE = 15


@dataclass(frozen=True)
class Experiment:
    """A module of this package: about how many single-thread minutes it takes, and what it has to wait for."""

    name: str
    minutes: float
    alone: bool = False
    after: str | None = None
    """An experiment whose runs it uses too; two at once would write the same folders."""


def next_up(waiting: Sequence[Experiment], running: Iterable[str], lanes: int) -> Experiment | None:
    """The experiment to start now: the longest that is free to run, or one that runs alone once all others are done."""
    busy = set(running)
    held = {experiment.name for experiment in waiting} | busy
    free = [e for e in waiting if not e.alone and e.after not in held]
    if free:
        return max(free, key=lambda e: e.minutes) if len(busy) < lanes else None
    last = [e for e in waiting if e.alone and e.after not in held - {e.name}]
    beside = all(e.alone for e in waiting) and not busy
    return last[0] if last and beside else None


def run_in_lanes(
    experiments: Sequence[Experiment], lanes: int, logs: Path, command: Sequence[str], ended: Callable[[], object]
) -> list[str]:
    """Run `command NAME` for every experiment; returns the names of those that failed.

    What a process writes goes to logs/NAME.log; `ended` is called after each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(experiments), []
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while (chosen := next_up(waiting, running, lanes)) is not None:
                waiting.remove(chosen)
                running[chosen.name] = _start(chosen, lanes, logs, command)
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                ended()
                failed += [name] if code else []
                print(_said(name, code, logs), flush=True)
    finally:
        for process in running.values():  # Ctrl-C reached them too: they stop at a checkpoint
            process.wait()
    return failed


def _start(experiment: Experiment, lanes: int, logs: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    print(f"{experiment.name} starts, about {experiment.minutes:g} minutes", flush=True)
    with (logs / f"{experiment.name}.log").open("wb") as log:
        environment = environment_of(os.environ, experiment, lanes)
        return subprocess.Popen([*command, experiment.name], stdout=log, stderr=subprocess.STDOUT, env=environment)


def environment_of(given: Mapping[str, str], experiment: Experiment, lanes: int) -> dict[str, str]:
    """The threads that an experiment may use: all of them alone or in a single lane, its share beside others."""
    if experiment.alone or lanes == 1:
        return dict(given)
    share = str(max(1, (os.cpu_count() or 1) // lanes))
    return dict(given) | {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}


def _said(name: str, code: int, logs: Path) -> str:
    lines = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    if not code:
        return lines[-1] if lines else f"{name}: done"
    return "\n".join([f"{name} failed with {code}:", *(f"  {line}" for line in lines[-LINES_OF_A_FAILURE:])])
