"""The whole road of `lofi train`: a recipe in, a run folder out, or one sentence that says why not.

begin -> rows -> tokens -> model + adapter -> choices -> batches -> LofiTrainer -> best step -> saved and proved.
Nothing is written before everything that can be refused has been. Not here: what the command line prints, merging.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.recipe import Recipe
from lofi.train.folder import RunFolder, Start, begin, open_folder, refuse_other_inputs
from lofi.train.job import Job, build, read_rows
from lofi.train.settings import Chosen

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run made: its folder, the adapter (or the model), the figures, and the lines that tell of it."""

    output: Path
    adapter: Path | None
    model: Path | None
    metrics: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    resumed: bool = False
    already_finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the figures as rows {who, metric, value}."""
        who = "adapter" if self.adapter else "model"
        rows = [{"who": who, "metric": key, "value": value} for key, value in self.metrics.items()]
        paths = {"output": str(self.output), "adapter": _path(self.adapter), "model": _path(self.model)}
        flags = {"resumed": self.resumed, "already_finished": self.already_finished}
        return {"results": rows, **paths, **flags, "lines": self.lines}


def _path(path: Path | None) -> str | None:
    return str(path) if path is not None else None


def train(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Fine-tune as the recipe says, into `recipe.output`.

    `resume` goes on from the last complete checkpoint, bit for bit as if it had not stopped; without one it starts
    over and says so; a finished run is left as it is. `progress` False keeps stderr silent.
    Raises  RequestError before anything is written; ProofError, NonFiniteError from the run itself;
            Interrupted after Ctrl-C, the checkpoint being safe; LofiError when the disk is full
    """
    said: list[str] = []
    with _quiet_libraries():
        folder = RunFolder(recipe.output)
        start = begin(folder, recipe, resume=resume)
        say = _speaker(said, progress)
        if start.note:
            say(start.note)
        if start.finished:
            return _finished(folder, said)
        return _run(recipe, folder, start, say, said, progress=progress)


def _run(recipe: Recipe, folder: RunFolder, start: Start, say: Say, said: list[str], *, progress: bool) -> TrainResult:
    from lofi.train.finish import finish
    from lofi.train.loop import refuse_early, run_trainer

    refuse_early(recipe)
    rows = read_rows(recipe)
    stored = Chosen.from_dict(start.record["choices"]) if start.record and start.checkpoint else None
    job = build(recipe, rows, stored)
    base = _base(recipe, job)
    if stored is not None:
        refuse_other_inputs(folder, start.record or {}, rows.digests(), _base_reasons(start, base, job))
    else:
        open_folder(folder, recipe, job.chosen, data=rows.digests(), base=base)
    for line in opening_lines(job):
        say(line)
    began = time.perf_counter()
    trainer = run_trainer(recipe, job, folder, start.checkpoint, progress=progress)
    result = finish(recipe, job, folder, trainer, seconds=time.perf_counter() - began)
    for line in result.pop("lines"):
        say(line)
    return TrainResult(lines=said, resumed=start.checkpoint is not None, **result)


def _base(recipe: Recipe, job: Job) -> dict[str, Any]:
    from lofi.files.fingerprint import base_fingerprint

    return base_fingerprint(job.model, exclude=getattr(job.model, "lofi_new_tensors", ()))


def _base_reasons(start: Start, base: dict[str, Any], job: Job) -> list[str]:
    """How the base at hand is not the one that the run began on: another one, or quantized otherwise."""
    from lofi.files.fingerprint import compare
    from lofi.files.quantized import in_words, quantization_of

    then, now = job.chosen.quantization, quantization_of(job.model)
    otherwise = [f"{in_words(now)} against {in_words(then)}"] if then != now else []
    return compare((start.record or {})["base"], base) + otherwise


def opening_lines(job: Job) -> list[str]:
    """What is said before the first step: the rows, what the adapter matched, every choice with its reason."""
    from lofi.adapters.registry import trainable_line
    from lofi.files.quantized import packed_of

    lines = [*job.prepared.report.lines()]
    packed = packed_of(job.model)
    lines += [packed.lines()[0]] if packed is not None else []
    if job.report is not None:
        lines += str(job.report).splitlines()
    new = getattr(job.model, "lofi_new_tensors", [])
    lines += [f"new, not in the checkpoint: {', '.join(new)}"] if new else []
    chosen = job.chosen
    steps = f"{chosen.max_steps} steps of {chosen.accumulation} micro-batches, {chosen.steps_per_epoch} an epoch"
    return [*lines, trainable_line(job.model), *chosen.lines(), steps]


def _finished(folder: RunFolder, said: list[str]) -> TrainResult:
    import json

    stored = json.loads(folder.result.read_text(encoding="utf-8"))
    found = {
        name: path if path.is_dir() else None for name, path in (("adapter", folder.adapter), ("model", folder.model))
    }
    return TrainResult(output=folder.path, metrics=stored["metrics"], lines=said, already_finished=True, **found)


def _speaker(said: list[str], progress: bool) -> Say:
    """Keep each line for the result, and print it on stderr where wanted."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        said.append(line)
        if progress:
            console.print(line, markup=False)

    return say


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No telemetry, no warnings of libraries about what lofi does on purpose; afterwards as it was."""
    import os

    from transformers.utils import logging

    before, verbosity = os.environ.get("HF_HUB_DISABLE_TELEMETRY"), logging.get_verbosity()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if before is None:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
        else:
            os.environ["HF_HUB_DISABLE_TELEMETRY"] = before
