"""`lofi evaluate`: figures with confidence intervals, the base beside its adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError

SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    model: flags.Model,
    data: Annotated[str, typer.Option("--data", help="Data file, folder or hub id.", metavar="PATH")],
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Names with commas: rouge,bleu,perplexity ...; else what fits the data."),
    ] = None,
    adapter: flags.Adapters = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Part of a folder or hub id (test, else validation).")
    ] = None,
    columns: flags.Columns = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N rows.", min=1)] = None,
    max_new_tokens: flags.MaxNewTokens = 128,
    seed: flags.Seed = 0,
    dtype: flags.Dtype = "auto",
    quantization: flags.Quantization = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Measure the base and each adapter on the same rows, with 95 % intervals and a paired test against the base.

    Answers are decoded greedily, in the text format that each adapter was trained with.

    \b
    Examples:
      lofi evaluate --model ./Qwen3-0.6B --adapter runs/first --data test.jsonl --metrics rouge,perplexity
      lofi evaluate --model ./MiniLM --adapter runs/polarity --data test.jsonl --metrics accuracy,macro_f1 --json
    """
    named = flags.named_adapters(adapter)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()] if metrics is not None else None
    if wanted == []:
        raise RecipeError("--metrics is empty; name some, such as --metrics rouge,perplexity, or leave it out")
    with speaking(as_json) as out:
        from lofi.cli.opening import open_model
        from lofi.data.records import load_records
        from lofi.evaluate.metrics import chosen_metrics

        mapped = flags.column_map(columns)
        records = load_records(data, columns=mapped, split=split or split_in(data), limit=limit)
        chosen_metrics(wanted, records.kind, None)  # a misspelt name is told before a model is loaded
        opened = open_model(model, named, dtype=dtype, device=device, quantization=quantization, seed=seed)
        found = measure(opened, records, wanted, max_new_tokens=max_new_tokens, seed=seed, note=out.note)
        out.answer(found.to_dict() | {"data": {"source": records.source, "rows": len(records), "kind": records.kind}})
        out.show(*tables(found.to_dict()))


def measure(
    opened: Any, records: Any, metrics: Sequence[str] | None, *, max_new_tokens: int, seed: int, note: Any
) -> Any:
    """Evaluate the base and every adapter on the records, each in its own text format; the base in the first adapter's.

    Adapters that share a text format are measured together.
    """
    from lofi.evaluate.run import Options, evaluate, side_by_side

    labels = tuple(opened.labels) if opened.labels else None
    progress = Progress(note)
    options = Options(max_new_tokens=max_new_tokens, seed=seed, labels=labels, on_progress=progress)
    groups: list[tuple[Any, dict[str, str | None]]] = []
    for name in [None, *opened.adapters]:
        rule = opened.formats.get(name or next(iter(opened.adapters), "base"))
        same = next((people for known, people in groups if known == rule), None)
        if same is None:
            groups.append((rule, same := {}))
        same[name or "base"] = name
    found = [
        evaluate(opened.model, opened.tokenizer, records, metrics, who=people, text_format=rule, options=options)
        for rule, people in groups
    ]
    whole = found[0] if len(found) == 1 else side_by_side(found, base="base", options=options)
    if getattr(opened.model, "lofi_new_tensors", None):
        whole.notes.append("the base has no trained head for this task: its figures are those of a random one.")
    return whole


class Progress:
    """Lines of progress on stderr: each stage when it ends, and now and then on the way."""

    def __init__(self, note: Any) -> None:
        self.note, self.last = note, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.last > SECONDS_BETWEEN_LINES:
            self.note(f"{what} {done}/{total}")
            self.last = now


def split_in(data: str) -> str:
    """The part of a folder to measure on: test where there is one, else validation."""
    folder = Path(data)
    return "validation" if folder.is_dir() and not any(folder.glob("test.*")) else "test"


def tables(found: dict[str, Any]) -> list[Any]:
    """The figures (a line a metric, a column a speaker, intervals in brackets), the paired tests, and the notes."""
    from rich.table import Table

    from lofi.report.page import figure, figure_table

    pivot = figure_table(found["results"])
    shown = Table(title="figures, with 95 % intervals", title_justify="left")
    for place, head in enumerate(("metric", *pivot["who"], "n")):
        shown.add_column(head, justify="right" if place else "left")
    for metric, count, cells in pivot["lines"]:
        shown.add_row(metric, *cells, count)
    tested = Table(
        "adapter", "metric", "difference", "p", title="against the base, on the same rows", title_justify="left"
    )
    for row in found["comparison"]:
        chance = "" if row["p"] is None else f"{row['p']:.3f}"
        tested.add_row(row["who"], row["metric"], figure(row | {"value": row["difference"]}), chance)
    return [shown, *([tested] if found["comparison"] else []), *found["notes"]]
