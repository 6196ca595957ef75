"""One run of a study from its recipe to its record: train, judge, measure, write.

Knows  one protocol for all: the same rows, greedy answers of the same length, the general text under the same framing,
       the forward pass of one fixed batch. The base is a run that trains nothing. A run that was stopped goes on from
       its checkpoint, and one that was trained already is only judged.
Knows not  which runs there are, or in which process it is (`run`, `processes`).
Rejected  judging in the training process's own model (what is judged is what was saved: the adapter's folder, read
          back), and latency under load: with several runs at once it is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.errors import LofiError
from lofi.files.atomic import write_json
from lofi.files.lines import read_json_lines
from lofi.recipe import Recipe
from lofi.study.record import BASE, Measured, RunRecord, measured, write_record
from lofi.study.spec import Study

Say = Callable[[str], None]
TRAINING, TRAINED = "training", "trained.json"
ADAPTER = "default"
WHO = "run"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process is to do: a run of the study, or its base where `method` is "base"."""

    name: str
    arm: str
    method: str
    seed: int | None
    overrides: dict[str, Any]
    recipe: Recipe
    study: Study
    folder: Path
    alone: bool = True
    """Whether nothing else runs beside it; times are taken for figures only then."""
    threads: int | None = None
    base: Mapping[str, float | None] = field(default_factory=dict)
    """The figures of the base's record, where there is one."""


@dataclass(frozen=True)
class Opened:
    """A model as it is judged: with its adapter, or plain (fully trained, or the base)."""

    model: Any
    tokenizer: Any
    adapter: str | None
    text_format: Any
    labels: list[Any] | None


def run_task(task: Task, say: Say) -> RunRecord:
    """Do one run and write its record; the record.

    Raises  what training and evaluation raise; Interrupted after Ctrl-C, the checkpoint being safe
    """
    import torch

    if task.threads is not None:
        torch.set_num_threads(task.threads)
    trained = _train(task, say) if task.method != BASE else _untrained()
    say("judging")
    opened = _open(task)
    measures, notes = _judge(task, opened)
    general = _general_perplexity(task, opened)
    figures = trained["figures"] | {"general_ppl": general, "general_ppl_base": task.base.get("general_ppl")}
    figures |= _latency(task, opened) if task.alone else {}
    if task.method == BASE:
        figures |= _base_figures(opened, figures)
    notes = [*trained["notes"], *notes, *_notes(task, opened)]
    record = RunRecord(
        name=task.name, arm=task.arm, method=task.method, seed=task.seed, overrides=task.overrides, figures=figures,
        measures=measures, curve=trained["curve"], eval_curve=trained["eval_curve"], notes=notes,
    )  # fmt: skip
    write_record(record, task.folder)
    if task.study.keep != "all":
        _drop(task.folder / TRAINING)
    return record


def sentence(error: BaseException) -> str:
    """Why a run failed, on one line."""
    if isinstance(error, LofiError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "memory ran out; use fewer tokens at once (train.micro_batch_size=1) or a smaller model"
    told = str(error).strip().splitlines()
    return f"unexpected {type(error).__name__}: {told[0] if told else ''} (this is lofi's fault)"


def _untrained() -> dict[str, Any]:
    return {"figures": {}, "curve": [], "eval_curve": [], "notes": []}


def _train(task: Task, say: Say) -> dict[str, Any]:
    """Train, or go on, or find it done; the figures of training with the curves."""
    from lofi.train.run import train

    say("training")
    result = train(task.recipe, resume=True, progress=False)
    folder = task.folder / TRAINING
    kept = task.folder / TRAINED
    if not result.already_finished or not kept.is_file():
        notes = []
        if result.resumed:
            notes.append("it was stopped and went on: its seconds and its peak of memory are those of the last part")
        if not task.alone:
            notes.append("other runs shared the machine: its tokens a second and seconds are under load, no latency")
        write_json(kept, {"peak_mb": None if result.already_finished else peak_megabytes(), "notes": notes})
    stored = json.loads(kept.read_text(encoding="utf-8"))
    rows = read_json_lines(folder / "metrics.jsonl")
    metrics = result.metrics
    figures = {
        "trainable": metrics["trainable"],
        "total": metrics["parameters"],
        "adapter_mb": _megabytes(folder),
        "peak_mb": stored["peak_mb"],
        "tokens_per_second": metrics.get("tokens_per_second"),
        "train_seconds": metrics["seconds"],
        "tokens": metrics["tokens"],
        "train_loss": metrics.get("train_loss"),
        "eval_loss": metrics.get("eval_loss"),
    }
    curves = {name: [(row["step"], row[key]) for row in rows if key in row] for name, key in _CURVES}
    return {"figures": figures, "notes": stored["notes"], **curves}


_CURVES = (("curve", "loss"), ("eval_curve", "eval_loss"))


def peak_megabytes() -> float | None:
    """The peak of this process's resident memory so far, 10^6 bytes; on CUDA that of the device's tensors."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _megabytes(folder: Path) -> float:
    """The size of what a run hands over: the adapter's weights, or the whole model's."""
    kind = "adapter" if (folder / "adapter").is_dir() else "model"
    return sum(file.stat().st_size for file in (folder / kind).glob("*.safetensors")) / 1e6


def _open(task: Task) -> Opened:
    """The base, the base with the run's adapter, or the fully trained model, in one dtype for all."""
    from lofi.models.load import load_tokenizer

    folder = task.folder / TRAINING
    tokenizer = load_tokenizer(task.recipe.model)
    if task.method == BASE:
        return _open_base(task, tokenizer)
    if (folder / "adapter").is_dir():
        return _open_adapter(task, folder / "adapter", tokenizer)
    record = json.loads((folder / "model" / "lofi.json").read_text(encoding="utf-8"))
    model = _load(task.recipe, folder / "model")
    return Opened(model, tokenizer, None, _format(record["text_format"], tokenizer), record["labels"])


def _open_base(task: Task, tokenizer: Any) -> Opened:
    """The untouched model; a task that it has no head for gets one from the study's first seed."""
    from transformers import AutoConfig

    from lofi.data.prepare import prepare
    from lofi.train.job import model_task, read_rows
    from lofi.train.seeds import seed_everything, stream

    recipe = task.recipe
    rows = read_rows(recipe)
    head = model_task(rows.task, AutoConfig.from_pretrained(recipe.model))
    labels = None
    if head in ("SEQ_CLS", "TOKEN_CLS"):
        labels = prepare(rows.train, tokenizer, task=rows.task, labels=recipe.data.labels).labels
    seed_everything(stream(recipe.train.seed, "init"))
    return Opened(_load(recipe, recipe.model, task=head, labels=labels), tokenizer, None, None, labels)


def _open_adapter(task: Task, folder: Path, tokenizer: Any) -> Opened:
    from lofi.files.adapter_folder import load_adapter, read_folder

    read = read_folder(folder)
    labels = read.record.get("labels")
    quantized = task.recipe.quantization
    model = _load(task.recipe, task.recipe.model, task=read.config.task_type, labels=labels, quantization=quantized)
    load_adapter(model, folder, ADAPTER)
    return Opened(model, tokenizer, ADAPTER, _format(read.record.get("text_format"), tokenizer), labels)


def _load(recipe: Recipe, path: str | Path, *, labels: Any = None, **options: Any) -> Any:
    from lofi.models.load import load_model

    names = [str(label) for label in labels] if labels else None
    return load_model(path, dtype=recipe.train.dtype, labels=names, **options)


def _format(rule: Any, tokenizer: Any) -> Any:
    from lofi.data.format import TextFormat

    return TextFormat.from_dict(rule, tokenizer) if rule else None


def judged_rows(recipe: Recipe, study: Study) -> Any:
    """The rows that a run is judged on: data.test, else data.validation.

    Raises  DataError where they cannot be read
    """
    from lofi.data.records import load_records

    data, split = (recipe.data.test, "test") if recipe.data.test else (recipe.data.validation, "validation")
    assert data is not None, "check refuses a study without rows to judge on"
    return load_records(data, columns=recipe.data.columns, split=split, limit=study.evaluate.rows)


def general_rows(study: Study) -> Any:
    """The general text as records: a .txt file's paragraphs, or rows as the data room reads them.

    Raises  DataError where it cannot be read
    """
    from lofi.data.records import from_rows, load_records
    from lofi.errors import DataError

    assert study.general is not None
    path, limit = Path(study.general), study.evaluate.rows
    if path.suffix != ".txt" or not path.is_file():
        return load_records(study.general, split="test", limit=limit)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); give a text file or rows of text") from None
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()][:limit]
    return from_rows([{"text": part} for part in paragraphs], source=str(path))


def _judge(task: Task, opened: Opened) -> tuple[dict[str, Measured], list[str]]:
    """The study's metrics on its rows, as counts per example."""
    from lofi.evaluate.run import Options, evaluate

    labels = tuple(opened.labels) if opened.labels else None
    options = Options(max_new_tokens=task.study.evaluate.max_new_tokens, labels=labels, resamples=1)
    found = evaluate(
        opened.model,
        opened.tokenizer,
        judged_rows(task.recipe, task.study),
        task.study.metrics,
        who={WHO: opened.adapter},
        text_format=opened.text_format,
        options=options,
    )
    return measured(found.measures[WHO]), list(found.notes)


def _general_perplexity(task: Task, opened: Opened) -> float | None:
    """Perplexity on the general text, framed by the tokenizer's own rule whatever the run was trained with."""
    from lofi.evaluate.run import Options, evaluate

    if task.study.general is None:
        return None
    rows, options = general_rows(task.study), Options(resamples=1)
    found = evaluate(opened.model, opened.tokenizer, rows, ["perplexity"], who={WHO: opened.adapter}, options=options)
    return found.value(WHO, "perplexity")


def _latency(task: Task, opened: Opened) -> dict[str, float | None]:
    from lofi.study.speed import forward_times

    times = forward_times(opened.model, opened.adapter)
    if opened.adapter is None:  # the base, or a model of its architecture: it takes the base's time
        times["latency_base_ms"] = times["latency_ms"]
    return times


def _base_figures(opened: Opened, figures: Mapping[str, float | None]) -> dict[str, float | None]:
    from lofi.adapters.registry import trainable_counts

    total = trainable_counts(opened.model)[1]
    return {"trainable": 0, "total": total, "general_ppl_base": figures["general_ppl"]}


def _notes(task: Task, opened: Opened) -> list[str]:
    """What a reader must know of this run's comparison with the base."""
    notes = []
    if task.recipe.quantization is not None and task.method != BASE:
        notes.append(f"its base is quantized ({task.recipe.quantization}), but it is compared with the dense base")
    if task.method == BASE and getattr(opened.model, "lofi_new_tensors", None):
        notes.append("the base has no trained head for this task: its figures are those of a random one")
    return notes


def _drop(training: Path) -> None:
    """Remove what the record makes unneeded: checkpoints, and the weights of a fully trained model."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(training / name, ignore_errors=True)
