"""What can be refused before anything trains, one sentence for each run that cannot be done.

Knows  the rows (their kind, the metrics that fit it), the model's config (whether the method finds what it needs, asked
       of `add_adapter` itself on a model without weights), and what earlier calls left in the runs' folders.
Knows not  what only weights can tell: what fails while it trains fails alone, in `run`.
Rejected  stopping a study for one run that cannot be done: the others go on, and the run is recorded as failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.errors import DataError, LofiError, ModelError, RecipeError
from lofi.recipe import Recipe
from lofi.study.grid import Planned
from lofi.study.record import RECORD, RUNS, read_record
from lofi.study.spec import Study
from lofi.study.worker import TRAINING, general_rows, judged_rows, sentence


@dataclass
class Checked:
    """`refused`: run's name -> why it cannot be done; `files`: data file -> SHA-256 of what the study reads."""

    refused: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def check(study: Study, planned: Sequence[Planned], output: Path) -> Checked:
    """Look at every run without training any; nothing is written.

    Raises  DataError, RequestError where the general text cannot be read, or is nothing that the rows' model reads
    """
    found = Checked()
    asked: dict[str, Any] = {}
    general = general_rows(study) if study.general is not None else None
    if general is not None:
        found.files[str(study.general)] = general.sha256
    for run in planned:
        try:
            _check_run(study, run, output / RUNS / run.name, found, asked, general)
        except LofiError as error:
            found.refused[run.name] = sentence(error)
    return found


def _check_run(study: Study, run: Planned, folder: Path, found: Checked, asked: dict[str, Any], general: Any) -> None:
    from lofi.train.loop import refuse_early

    recipe = run.recipe
    if recipe is None:
        raise RecipeError(run.fault or "")
    refuse_early(recipe)
    rows = recipe.data.model_dump_json() + str(recipe.task)
    task = _once(asked, ("rows", rows), lambda: _rows(study, recipe, found))
    adapter = repr(recipe.adapter_config())
    _once(asked, ("model", recipe.model, recipe.method, adapter, task), lambda: _model(recipe, task, general))
    _folder(folder, recipe)


def _once(asked: dict[Any, Any], key: Any, question: Callable[[], Any]) -> Any:
    """The answer to a question that many runs share; a refusal is an answer too."""
    if key not in asked:
        try:
            asked[key] = question()
        except LofiError as error:
            asked[key] = error
    if isinstance(asked[key], LofiError):
        raise asked[key]
    return asked[key]


def _rows(study: Study, recipe: Recipe, found: Checked) -> str:
    """The task of a recipe's rows, after what is judged on has been read and its metrics were found to fit."""
    from lofi.evaluate.metrics import chosen_metrics
    from lofi.train.job import read_rows

    if recipe.data.test is None and recipe.data.validation is None:
        raise RecipeError("data.test and data.validation are missing; give rows to judge on that are not trained on")
    rows, judged = read_rows(recipe), judged_rows(recipe, study)
    if judged.kind != rows.train.kind:
        raise DataError(
            f"{judged.source} holds {judged.kind} rows but {rows.train.source} {rows.train.kind} rows; "
            "give both the same columns"
        )
    chosen_metrics(study.metrics, judged.kind)
    found.files |= rows.digests() | {judged.source: judged.sha256}
    return rows.task


def _model(recipe: Recipe, task: str, general: Any) -> None:
    """Refuse what the model's config tells: no such head, nothing to adapt, a quantized base that cannot train."""
    from lofi.adapters.attach import add_adapter
    from lofi.models.counting import meta_model
    from lofi.train import quantized
    from lofi.train.job import model_config, model_task

    config = model_config(recipe.model)
    quantized.wanted(recipe, config)
    head = model_task(task, config)
    kinds = {"CAUSAL_LM": ("text", "sft", "messages"), "SEQ_2_SEQ_LM": ("sft",)}.get(head, ())
    if general is not None and general.kind not in kinds:
        raise RecipeError(
            f"general is {general.source} ({general.kind} rows), whose perplexity this {head} model cannot tell; "
            + (f"give rows of kind {' or '.join(kinds)}" if kinds else "leave general out")
        )
    try:
        model = meta_model(config, head)
    except ValueError:
        kind = getattr(config, "model_type", "model")
        raise ModelError(
            f"{recipe.model} is a {kind}, which has no {head} head; give other data or another model"
        ) from None
    asked = recipe.adapter_config()
    if asked is None:
        return
    try:
        add_adapter(model, asked)
    except (NotImplementedError, RuntimeError):
        return  # needs the weights themselves (an init by SVD of them): told when it trains


def _folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a run folder that is neither a finished run nor one that can go on."""
    from lofi.train.folder import RunFolder, begin

    if (folder / RECORD).is_file() and read_record(folder).done:
        return
    training = RunFolder(folder / TRAINING)
    try:
        start = begin(training, recipe, resume=True)
        if start.finished:
            _weights_there(training)
    except (LofiError, OSError, ValueError, KeyError) as error:
        told = str(error).split(";")[0].split(", so this")[0].strip()
        raise RecipeError(
            f"{folder} holds an unreadable half-written run ({told}); remove that folder and run the study again"
        ) from None


def _weights_there(training: Any) -> None:
    json.loads(training.result.read_text(encoding="utf-8"))["metrics"]
    if not training.adapter.is_dir() and not training.model.is_dir():
        raise RecipeError(f"{training.path} was trained, but its weights are gone")
