"""Each run of a study in a process of its own: its memory is its own figure, and what kills it kills one run.

Knows  how to start, watch and stop children. They are forked from a server that has the heavy imports already
       ("forkserver"; "spawn" where the system has none, which imports anew), print into their run's log.txt, stop at a
       checkpoint on Ctrl-C, and end at once when this process dies, so that no orphan writes where the next study does.
Knows not  what a run is. Rejected  threads (one peak of memory for all), a pool (its workers keep the memory of the run
       before), and fork (it copies the threads' locks of whatever was imported here).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from lofi.errors import Interrupted, LofiError
from lofi.study.worker import Task, run_task, sentence

PRELOADED = (
    *("torch", "transformers", "safetensors.torch", "lofi.train.run", "lofi.train.finish", "lofi.train.loop"),
    *("lofi.evaluate.run", "lofi.files.adapter_folder", "lofi.models.load", "lofi.study.worker"),
)
LOG = "log.txt"
Said = Callable[[Task, str], None]


class Runner(Protocol):
    """Does tasks; yields each with None, or the sentence of its failure, when it ends."""

    def __call__(self, tasks: Sequence[Task], said: Said) -> Iterator[tuple[Task, str | None]]: ...


def in_process(tasks: Sequence[Task], said: Said) -> Iterator[tuple[Task, str | None]]:
    """One after the other in this process: for tests, and where memory need not be told apart.

    Raises  Interrupted after Ctrl-C
    """
    for task in tasks:
        try:
            run_task(task, lambda text, task=task: said(task, text))  # type: ignore[misc]
            yield task, None
        except Interrupted:
            raise
        except Exception as error:
            yield task, sentence(error)


@dataclass
class _Child:
    task: Task
    process: BaseProcess
    pipe: Connection


def in_children(jobs: int = 1) -> Runner:
    """A runner with a process for each task, `jobs` of them at once."""

    def run(tasks: Sequence[Task], said: Said) -> Iterator[tuple[Task, str | None]]:
        context = _context()
        waiting, running = list(tasks), dict[Connection, _Child]()
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = _start(context, waiting.pop(0))
                    running[child.pipe] = child
                for pipe in wait(list(running)):
                    child = running[pipe]  # type: ignore[index]
                    kind, text = _heard(child)
                    if kind == "said":
                        said(child.task, text)
                        continue
                    del running[child.pipe]
                    if kind == "interrupted":
                        raise KeyboardInterrupt
                    yield child.task, None if kind == "done" else text
        finally:
            _stop(list(running.values()))

    return run


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start(context: Any, task: Task) -> _Child:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, theirs), name=f"lofi compare: {task.name}")
    process.start()
    theirs.close()
    return _Child(task, process, ours)


def _heard(child: _Child) -> tuple[str, str]:
    """(said, text) while it works; (done | failed | interrupted, sentence) when it has ended."""
    try:
        kind, text = child.pipe.recv()
    except EOFError:
        child.process.join()
        kind, text = "failed", _died(child)
    if kind != "said":
        child.process.join()
        child.pipe.close()
    return kind, text


def _died(child: _Child) -> str:
    """The sentence for a process that ended without a word."""
    code = child.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = " (memory ran out, perhaps)" if code == -signal.SIGKILL else ""
    return f"its process {how}{why}; run the study again to go on with it, its words are in {child.task.folder / LOG}"


def _stop(children: Sequence[_Child]) -> None:
    """Let children that still work reach a checkpoint and end; a second Ctrl-C ends them at once."""
    for child in children:
        if child.process.pid is not None and child.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGINT)
    try:
        for child in children:
            child.process.join()
    except KeyboardInterrupt:
        for child in children:
            child.process.kill()
            child.process.join()
        raise


def _child(task: Task, pipe: Connection) -> None:
    """What a child does: everything it prints goes to its log; its end goes through the pipe."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in the terminal reaches the parent alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with_parent()
    task.folder.mkdir(parents=True, exist_ok=True)
    with open(task.folder / LOG, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        run_task(task, lambda text: pipe.send(("said", text)))
        pipe.send(("done", ""))
    except (KeyboardInterrupt, Interrupted) as stopped:
        pipe.send(("interrupted", str(stopped)))
    except Exception as error:
        if not isinstance(error, LofiError):
            import traceback

            traceback.print_exc()
        where = "" if isinstance(error, LofiError) else f"; see {task.folder / LOG}"
        pipe.send(("failed", sentence(error) + where))


def _end_with_parent() -> None:
    """End this process when its parent dies, however it dies."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
