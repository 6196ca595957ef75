"""The whole road of `lofi compare`: a study in, every run done or its sentence, and what they say together.

plan -> check -> base -> runs -> records -> results.jsonl, results.csv, report.html. A finished run is not repeated, a
stopped one goes on, a failed one is tried again by the next call and does not stop the others.
Knows not  how a run is done (`worker`), in which process (`processes`), or what the figures mean (`statistics`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.errors import Interrupted, LofiError, RecipeError
from lofi.files.atomic import write_text
from lofi.recipe import Recipe
from lofi.study.check import Checked, check
from lofi.study.folder import alone_in, refuse_foreign_study, write_study
from lofi.study.grid import Planned, expand
from lofi.study.latency import run_latency
from lofi.study.processes import Runner, in_children
from lofi.study.record import BASE, RECORD, RUNS, RunRecord, read_record, write_record
from lofi.study.spec import Study
from lofi.study.worker import TRAINING, Task

Say = Callable[[str], None]
RESULTS = "results.jsonl"
SAME_BUDGET = 0.02
"""Runs whose trained tokens differ by more than this share are told apart in words."""
BUDGET_KEYS = ("train.epochs", "train.max_steps", "train.batch_tokens", "data.train", "model", "train.max_length")


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study made: its records (the base first), its page, and what a reader must know."""

    output: Path
    records: list[RunRecord] = field(default_factory=list)
    latency: list[dict[str, Any]] = field(default_factory=list)
    """The rows of a study of kind latency."""
    report: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[RunRecord]:
        """The runs that failed."""
        return [record for record in self.records if not record.done]


def compare(
    study: Study, output: str | Path, *, jobs: int = 1, on_event: Say | None = None, runner: Runner | None = None
) -> StudyResult:
    """Do every run of a study that is not done yet, and write what they say into `output`.

    jobs      runs at once, with the threads divided; figures of time are then under load, and latency is left out
    on_event  called with a line for each thing that happens
    runner    does the tasks (None: each in a process of its own, so that peak memory is the run's)
    Raises    RequestError before anything is written: another study's folder, or no run that can be done;
              Interrupted after Ctrl-C: what is finished stays, the command that goes on is told
    """
    say, folder = on_event or (lambda text: None), Path(output)
    if study.kind == "latency":
        return _latency(study, folder, say)
    planned = expand(study)
    _refuse_file(folder)
    checked = check(study, planned, folder)
    refuse_foreign_study(folder, study, planned, checked.files)
    _refuse_nothing(planned, checked)
    with alone_in(folder):
        write_study(folder, study, planned, checked.files)
        return _run(study, folder, planned, checked, say=say, jobs=jobs, runner=runner)


def _refuse_file(folder: Path) -> None:
    if folder.is_file():
        raise RecipeError(f"--output {folder} is a file, expected a folder; choose another")


def _latency(study: Study, folder: Path, say: Say) -> StudyResult:
    from lofi.study.latency_page import write_latency
    from lofi.study.page import machine

    rows, spec = run_latency(study, folder, say), study.latency
    about = {"title": f"Latency of {spec.shape}", "model": spec.shape, "dtype": spec.dtype, "rounds": str(spec.rounds)}
    timed = f"decoding {spec.new_tokens} tokens" if spec.new_tokens else "one forward pass"
    report = write_latency(rows, about | {"timed": timed} | dict(machine()), folder)
    return StudyResult(output=folder, latency=rows, report=report)


def _refuse_nothing(planned: Sequence[Planned], checked: Checked) -> None:
    """Refuse a study of which no run can be done, with every reason once."""
    if len(checked.refused) < len(planned):
        return
    reasons = list(dict.fromkeys(checked.refused.values()))
    if len(reasons) == 1:
        raise RecipeError(f"no run of this study can be done: {reasons[0]}")
    raise RecipeError("no run of this study can be done:\n" + "\n".join(f"  {reason}" for reason in reasons))


def _run(
    study: Study, folder: Path, planned: Sequence[Planned], checked: Checked, *, say: Say, jobs: int,
    runner: Runner | None,
) -> StudyResult:  # fmt: skip
    for name, reason in checked.refused.items():
        say(f"{name} cannot be done: {reason}")
    possible = [run for run in planned if run.name not in checked.refused]
    done = _finished(folder, [BASE, *(run.name for run in possible)])
    waiting = [run for run in possible if run.name not in done]
    say(_plan(len(planned), len(possible) - len(waiting), len(waiting), study))
    work = _Work(study, folder, say, runner or in_children(1), runner or in_children(jobs), jobs, total=len(waiting))
    if BASE not in done and possible:
        work.do(work.base(_recipe_of(possible[0])), work.first)
    base = _read(folder, BASE)
    figures = base.figures if base is not None and base.done else {}
    work.do([work.task(run, figures) for run in waiting], work.rest)
    records = _records(folder, planned, checked)
    notes = _notes(study, records)
    return _written(study, folder, records, notes)


def _recipe_of(run: Planned) -> Recipe:
    assert run.recipe is not None, "check refuses a run whose recipe is none"
    return run.recipe


def _finished(folder: Path, names: Sequence[str]) -> set[str]:
    found = {name: _read(folder, name) for name in names}
    return {name for name, record in found.items() if record is not None and record.done}


def _read(folder: Path, name: str) -> RunRecord | None:
    """A run's record, None where there is none that can be read (check has told of those)."""
    path = folder / RUNS / name
    if not (path / RECORD).is_file():
        return None
    try:
        return read_record(path)
    except LofiError:
        return None


def _plan(planned: int, finished: int, waiting: int, study: Study) -> str:
    kept = "everything is kept" if study.keep == "all" else (
        "adapters are kept, full models and checkpoints are removed once judged (keep: all keeps them)"
    )  # fmt: skip
    before = f", {finished} finished before" if finished else ""
    return f"{planned} run{'s' * (planned != 1)}{before}, {waiting} to do; {kept}"


@dataclass
class _Work:
    """The tasks of a study and what is said while they are done."""

    study: Study
    folder: Path
    say: Say
    first: Runner
    rest: Runner
    jobs: int
    total: int
    ended: int = 0

    def base(self, recipe: Recipe) -> list[Task]:
        """The untouched model, dense, as one task."""
        return [self._task(BASE, recipe, arm=BASE, method=BASE, seed=None, overrides={})]

    def task(self, run: Planned, base: Mapping[str, float | None]) -> Task:
        """One run as a task."""
        own = {"arm": run.arm, "method": run.method, "seed": run.seed, "overrides": run.overrides}
        return self._task(run.name, _recipe_of(run), base=dict(base), **own)

    def _task(self, name: str, recipe: Recipe, **own: Any) -> Task:
        folder = self.folder / RUNS / name
        recipe = recipe.model_copy(update={"output": str(folder / TRAINING)})
        alone = self.jobs == 1 or name == BASE
        threads = None if alone else _threads(self.jobs)
        return Task(name=name, recipe=recipe, study=self.study, folder=folder, alone=alone, threads=threads, **own)

    def do(self, tasks: Sequence[Task], runner: Runner) -> None:
        """Do tasks, and record those that failed."""
        ends = runner(tasks, self._said)
        with contextlib.closing(ends):  # type: ignore[type-var]
            try:
                for task, fault in ends:
                    self._end(task, fault)
            except (KeyboardInterrupt, Interrupted):
                raise Interrupted(
                    f"stopped; the finished runs in {self.folder} stay, and a run that was training goes on from its "
                    f"checkpoint: run the same lofi compare --output {self.folder} again"
                ) from None

    def _said(self, task: Task, text: str) -> None:
        self.say(f"{self._place(task)}{task.name}: {text}")

    def _end(self, task: Task, fault: str | None) -> None:
        if fault is not None:
            failed = _failed(task.name, task.arm, task.method, task.seed, task.overrides, fault)
            write_record(failed, task.folder)
        self.ended += task.name != BASE
        self.say(f"{task.name}: " + (_summary(read_record(task.folder)) if fault is None else f"failed: {fault}"))

    def _place(self, task: Task) -> str:
        return "" if task.name == BASE else f"[{min(self.ended + 1, self.total)}/{self.total}] "


def _threads(jobs: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _failed(name: str, arm: str, method: str, seed: int | None, overrides: dict[str, Any], fault: str) -> RunRecord:
    who: dict[str, Any] = {"name": name, "arm": arm, "method": method, "seed": seed, "overrides": overrides}
    return RunRecord(**who, status="failed", error=" ".join(fault.split()))


def _summary(record: RunRecord) -> str:
    """A finished run in a line: its metrics and how long it trained."""
    told = [f"{name} {one.value:.4g}" for name, one in record.measures.items()]
    seconds = record.figures.get("train_seconds")
    return ", ".join([*told, *([f"trained in {seconds:.0f} s"] if seconds is not None else [])])


def _records(folder: Path, planned: Sequence[Planned], checked: Checked) -> list[RunRecord]:
    """Every run's record in the study's order, the base first; a refused run's is its sentence."""
    found = [_read(folder, BASE)]
    for run in planned:
        reason = checked.refused.get(run.name)
        if reason is None:
            found.append(_read(folder, run.name))
        else:
            found.append(_failed(run.name, run.arm, run.method, run.seed, run.overrides, reason))
    return [record for record in found if record is not None]


def _notes(study: Study, records: Sequence[RunRecord]) -> list[str]:
    """What holds for the study as a whole: budgets that differ, more than one base."""
    varied = set(study.grid) | {key for arm in study.arms for key in arm.overrides}
    notes = _budgets(records, " as the study asks" if varied & set(BUDGET_KEYS) else "")
    if varied & {"model", "data.test", "data.validation"}:
        notes.append("the base is that of the study's first run: runs of another model or other rows are not its pairs")
    if any(record.method in ("qlora", "int8-lora") for record in records):
        notes.append("runs over a quantized base are compared with the dense base")
    return notes


def _budgets(records: Sequence[RunRecord], asked: str) -> list[str]:
    """One sentence where the arms of one seed, whose rows come in one order, trained on different numbers of tokens."""
    by_seed: dict[int | None, dict[str, float]] = {}
    for record in records:
        if record.done and record.name != BASE:
            by_seed.setdefault(record.seed, {})[record.name] = record.figures.get("tokens") or 0.0
    for tokens in by_seed.values():
        least, most = min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)
        if tokens[most] > (1 + SAME_BUDGET) * tokens[least]:
            told = f"{tokens[least]:,.0f} ({least}) to {tokens[most]:,.0f} ({most})"
            return [f"the runs did not train on equally many tokens{asked}: {told}"]
    return []


def _written(study: Study, folder: Path, records: list[RunRecord], notes: list[str]) -> StudyResult:
    from lofi.study.page import write_outputs

    lines = [json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records]
    write_text(folder / RESULTS, "".join(lines))
    report = write_outputs(study, records, folder, notes=notes)
    return StudyResult(output=folder, records=records, report=report, notes=notes)
