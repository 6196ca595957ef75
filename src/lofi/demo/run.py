"""`lofi demo`: the whole road on what ships in the package, offline.

rows -> train LoRA -> ask the unseen questions before and after -> merge -> verify -> three questions -> report.html
Every step is the one that a user's own command takes; nothing here has a short cut of its own.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.demo import recipe as found
from lofi.demo.dataset import write_rows
from lofi.demo.execute import execution_accuracy, open_database, run_query
from lofi.demo.schemas import Schema
from lofi.errors import ProofError, RequestError

MARK = "demo.json"
MODEL = Path(__file__).resolve().parent.parent / "assets" / "lofi-tiny"
SHIPPED = "demo:model"  # MODEL, as every --model takes it
GOALS = {"seen": 0.95, "unseen": 0.80}
METRICS = ("execution_accuracy", "exact_match", "rougeL")
SHOWN_ROWS = 3


@dataclass(frozen=True)
class Paths:
    """Where the demo writes."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"


def run(*, output: str | Path, seed: int, out: Any) -> dict[str, Any]:
    """Run the demo into `output` and return its figures; `out` takes notes and what people are shown.

    An earlier demo in `output` is replaced; any other folder is refused.
    Raises  RequestError for a foreign folder; ProofError if a proof fails or the figures miss `GOALS`
    """
    started = time.perf_counter()
    paths = Paths(_fresh(Path(output)))
    files = write_rows(paths.folder / "data", train=found.TRAIN_ROWS, test=found.TEST_ROWS, seed=seed)
    out.note(f"{found.TRAIN_ROWS:,} questions to learn from, {found.TEST_ROWS} each about seen and unseen schemas")
    trained = _train(paths, files["train"], seed)
    out.note("asking the unseen questions, before and after")
    asked = _ask(paths, files)
    out.note("merging, and comparing the merged model with base + adapter")
    merged = _merge(paths, files["test_seen"])
    proofs = [*_judge(asked), *merged.verdict.lines(), _verify(paths)]
    samples = _samples(asked)
    rows = [row for split in asked.values() for row in split["rows"]]
    page = _report(paths, trained, rows, proofs, samples)
    seconds = round(time.perf_counter() - started, 1)
    _show(out, rows, samples, proofs)
    out.show(*_places(paths, page), f"{seconds:.0f} seconds in all")
    answer = {"results": rows, "proofs": proofs, "samples": samples, "seconds": seconds, "output": str(paths.folder)}
    (paths.folder / MARK).write_text(json.dumps(answer, ensure_ascii=False, indent=1), encoding="utf-8")
    return answer


def _fresh(folder: Path) -> Path:
    """The demo's folder, empty; one that is not a demo's is never deleted."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise RequestError(f"{folder} exists and is no demo's folder; give another with --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}\n", encoding="utf-8")
    return folder


def _train(paths: Paths, train_file: Path, seed: int) -> Any:
    from lofi.data.format import TextFormat
    from lofi.models.load import load_tokenizer
    from lofi.train.run import train

    stop = TextFormat.for_tokenizer(load_tokenizer(MODEL)).stop_ids[0]
    recipe = found.demo_recipe(model=MODEL, train=train_file, output=paths.run, seed=seed, stop_id=stop)
    return train(recipe)


def _ask(paths: Paths, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Both test sets put to the base and to the adapter: figures, answers and rows of each."""
    from lofi.data.format import TextFormat
    from lofi.data.records import load_records
    from lofi.evaluate.run import Options, evaluate
    from lofi.files.adapter_folder import load_adapter
    from lofi.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    record = load_adapter(model, paths.adapter, "lora").record
    rule = TextFormat.from_dict(record["text_format"], tokenizer)
    asked = {}
    for split in GOALS:
        records = load_records(files[f"test_{split}"])
        evaluation = evaluate(
            model,
            tokenizer,
            records,
            [*METRICS[1:2], "rouge", METRICS[0]],
            text_format=rule,
            extra={"execution_accuracy": execution_accuracy},
            options=Options(max_new_tokens=found.MAX_NEW_TOKENS),
        )
        rows = [_named(row.to_dict(), split) for row in evaluation if row.metric in METRICS]
        asked[split] = {"rows": rows, "answers": evaluation.answers["lora"], "records": records.rows}
    return asked


def _named(row: dict[str, Any], split: str) -> dict[str, Any]:
    """Figures on seen schemas keep the metric's name; those on unseen ones say so in it."""
    metric = row["metric"] if split == "seen" else f"{row['metric']}_{split}"
    return {**row, "metric": metric, "data": f"test_{split}"}


def _merge(paths: Paths, data: Path) -> Any:
    from lofi.merge.disk import merge_folder

    return merge_folder(MODEL, paths.adapter, paths.merged, data=data, min_kept=0.95)


def _verify(paths: Paths) -> str:
    """The adapter's golden prompts asked again of a freshly loaded model."""
    from lofi.files.adapter_folder import load_adapter
    from lofi.files.golden import replay
    from lofi.models.load import load_model, load_tokenizer

    model = load_model(MODEL)
    golden = load_adapter(model, paths.adapter, "lora").record["golden"]
    differences = replay(model, golden, tokenizer=load_tokenizer(MODEL))
    if differences:
        raise ProofError(f"the saved adapter does not say what it said after training: {differences[0]}")
    return f"verified: {len(golden['prompts'])} golden prompts say the same after saving and loading"


def _judge(asked: dict[str, dict[str, Any]]) -> list[str]:
    """The figures against the demo's goals; a goal above the whole interval is a failed proof."""
    said = []
    for split, goal in GOALS.items():
        rows = {r["who"]: r for r in asked[split]["rows"] if r["metric"].startswith("execution_accuracy")}
        after, before = rows["lora"], rows["base"]
        if after["high"] < goal:
            raise ProofError(
                f"execution accuracy on {split} schemas is {after['value']:.3f} (95 % interval up to "
                f"{after['high']:.3f}), expected {goal}; try another --seed, and report it if that fails too"
            )
        said.append(f"{split} schemas: {after['value']:.1%} of the answers are right (before: {before['value']:.1%})")
    return said


def _samples(asked: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Three questions about unseen schemas, of different kinds and both languages, with the SQL and what it returns."""
    rows, answers = asked["unseen"]["records"], asked["unseen"]["answers"]
    chosen: dict[tuple[str, bool], dict[str, str]] = {}
    for row, answer in zip(rows, answers, strict=True):
        key = (row["language"], " join " in row["completion"])
        right = execution_accuracy(answer.text, row) == 1.0
        if right and key not in chosen:
            chosen[key] = _sample(row, answer.text)
    return list(chosen.values())[:SHOWN_ROWS]


def _sample(row: dict[str, Any], sql: str) -> dict[str, str]:
    tables, _, question = row["prompt"].partition("\n")
    connection = open_database(Schema.from_dict(row["database"]["tables"]), row["database"]["seed"])
    try:
        result = run_query(connection, sql)
    finally:
        connection.close()
    shown = "; ".join(", ".join(map(str, line)) for line in result[:SHOWN_ROWS])
    more = f" … ({len(result)} rows)" if len(result) > SHOWN_ROWS else ""
    return {"question": question, "tables": tables.removeprefix("Tables: "), "sql": sql, "result": shown + more}


def _report(paths: Paths, trained: Any, rows: list[dict], proofs: list[str], samples: list[dict]) -> Path:
    from lofi.report.page import write_report

    return write_report(
        paths.run,
        title="lofi demo: questions in English and Vietnamese to SQL",
        figures=rows,
        notes=[
            "A model of 6.5 million parameters learned this from a seeded grammar. Its answers are executed in "
            "sqlite3; the test asks questions it never saw, about schemas it saw, and about tables and columns that it "
            "never saw."
        ],
        proofs=proofs,
        tables={"Three questions about schemas that training never saw": samples},
        log=trained.lines,
    )


def _show(out: Any, rows: list[dict], samples: list[dict], proofs: list[str]) -> None:
    from rich.table import Table

    table = Table(title="Unseen questions, before and after", title_justify="left")
    for head in ("figure", "before", "after"):
        table.add_column(head)
    values = {(row["who"], row["metric"]): row["value"] for row in rows}
    for metric in dict.fromkeys(row["metric"] for row in rows):
        table.add_row(metric, *(f"{values[who, metric]:.3f}" for who in ("base", "lora")))
    out.show(table)
    for sample in samples:
        out.show("", f"Q: {sample['question']}", f"   {sample['tables']}", f"SQL: {sample['sql']}")
        out.show(f"  => {sample['result']}")
    out.show("", *(f"proved: {proof}" for proof in proofs), "")


def _places(paths: Paths, page: Path) -> list[str]:
    named = f"--model {SHIPPED} --adapter {shlex.quote(f'{_speaker(paths.folder)}={paths.run}')}"
    return [
        f"report:  {page}",
        f"adapter: {paths.adapter}",
        f"merged:  {paths.merged}",
        f'try it:  lofi generate {named} --prompt "…"',
        f"serve:   lofi serve {named}",
    ]


def _speaker(folder: Path) -> str:
    """What the adapter is called beside others: as its folder, in letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", folder.resolve().name) or "demo"
