"""The report of a training run, from its folder and its recipe.

Knows  which files a run leaves. Reads a few rows of the data again to show them as the model saw them: keeping every
prepared row until the end of a run only to show three would cost memory for nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lofi.report.page import write_report

ROWS_READ, ROWS_SHOWN = 200, 3


def report_run(recipe: Any, result: Any) -> Path:
    """Write report.html into a finished run's folder: `recipe` a Recipe, `result` a TrainResult; the page's path.

    A run that was finished before keeps the page it has.
    """
    folder = Path(result.output)
    if result.already_finished and (folder / "report.html").is_file():
        return folder / "report.html"
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    verdict = stored["verdict"]["words"]
    return write_report(
        folder,
        title=f"{recipe.model}: {recipe.method} on {recipe.data.train}",
        figures=loss_rows(result.metrics, "adapter" if result.adapter else "model"),
        notes=[verdict, *run_words(result.metrics)],
        proofs=[line for line in stored["lines"] if line != verdict and not line.startswith(("adapter: ", "model: "))],
        samples=samples_of(recipe, folder),
        log=result.lines,
    )


def loss_rows(metrics: dict[str, Any], who: str) -> list[dict[str, Any]]:
    """Validation loss (nats a trained token) and perplexity before and after, as figure rows; [] without validation."""
    found = []
    for name, key in (("before", "eval_loss_before"), (who, "eval_loss")):
        if isinstance(metrics.get(key), float):
            found.append({"who": name, "metric": "validation loss", "value": metrics[key]})
            found.append({"who": name, "metric": "validation perplexity", "value": math.exp(min(metrics[key], 700.0))})
    return found


def run_words(metrics: dict[str, Any]) -> list[str]:
    """Steps, epochs, tokens and time in one sentence; [] where the run did not say."""
    if "steps" not in metrics:
        return []
    speed = f", {metrics['tokens_per_second']:,.0f} a second" if "tokens_per_second" in metrics else ""
    return [
        f"{metrics['steps']:,} steps, {metrics.get('epochs', 0):g} epochs, {metrics.get('tokens', 0):,} trained tokens"
        f"{speed}, {metrics.get('seconds', 0):,.0f} seconds"
    ]


def samples_of(recipe: Any, folder: Path) -> list[list[tuple[str, str]]]:
    """A few rows of the training data as (text, fate) spans, framed as they were trained."""
    from lofi.data.format import TextFormat
    from lofi.data.prepare import prepare
    from lofi.data.records import load_records
    from lofi.data.view import chosen, runs
    from lofi.models.load import load_tokenizer

    record = _record(folder)
    tokenizer = load_tokenizer(recipe.model)
    rule = record.get("text_format")
    records = load_records(recipe.data.train, columns=recipe.data.columns, limit=ROWS_READ)
    prepared = prepare(
        records,
        tokenizer,
        task=recipe.task or ("SEQ_2_SEQ_LM" if rule and rule["kind"] == "seq2seq" else None),
        max_length=recipe.train.max_length,
        text_format=TextFormat.from_dict(rule, tokenizer) if rule else None,
        labels=record.get("labels"),
    )
    places = chosen(prepared.examples, min(ROWS_SHOWN, len(prepared.examples)))
    width = max(prepared.examples[place].size for place in places)
    return [
        [(run.text, run.fate) for run in runs(prepared.examples[place], tokenizer, padded_to=width)] for place in places
    ]


def _record(folder: Path) -> dict[str, Any]:
    """lofi.json of what the run made: an adapter, or a whole model."""
    found = next(
        folder / name / "lofi.json" for name in ("adapter", "model") if (folder / name / "lofi.json").is_file()
    )
    return json.loads(found.read_text(encoding="utf-8"))
