"""Records become examples: encoded, cut or split to fit, labelled, counted, refused where a row would teach nothing.

One function for each kind of data, chosen by a table (`sequences`, `classes`). Not known here: models, batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.data.classes import prepare_classes, prepare_tags
from lofi.data.examples import TASKS, Example
from lofi.data.faults import Faults, nearest
from lofi.data.format import TextFormat
from lofi.data.job import Job
from lofi.data.labels import Label
from lofi.data.records import Records
from lofi.data.report import DataReport
from lofi.data.sequences import prepare_pairs, prepare_seq2seq, prepare_text
from lofi.errors import DataError

TASK_OF = {"sft": "CAUSAL_LM", "messages": "CAUSAL_LM", "text": "CAUSAL_LM", "classification": "SEQ_CLS"}
TASK_OF["token_classification"] = "TOKEN_CLS"


@dataclass
class Prepared:
    """Examples in the order of their rows, with the report, the labels (classes or tags) and the rule used."""

    examples: list[Example]
    report: DataReport
    records: Records = field(repr=False)
    labels: list[Label] | None = None
    text_format: TextFormat | None = None
    multi_label: bool = False

    def where(self, index: int) -> str:
        """The place in the data file that example `index` comes from."""
        return self.records.where(self.examples[index].row)


def prepare(
    records: Records,
    tokenizer: Any,
    *,
    task: str | None = None,
    max_length: int | None = None,
    text_format: TextFormat | None = None,
    labels: Sequence[Label] | None = None,
) -> Prepared:
    """Turn records into labelled examples of at most `max_length` tokens.

    task        CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, or a recipe's word (sft, text, classification, …);
                None: what the records are
    max_length  None: no limit; under SEQ_2_SEQ_LM for each side
    labels      the label list in order, when known (that of training, for a validation set)
    Raises      DataError: records that do not fit the task; a row with no trained token; an answer too long
    """
    task, kind = _task_and_kind(records, task)
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2 tokens (one to read, one to learn); raise it")
    if TASK_OF[kind] == "CAUSAL_LM" and text_format is None:
        text_format = TextFormat.for_tokenizer(tokenizer, seq2seq=task == "SEQ_2_SEQ_LM")
    report = DataReport(records.source, kind, _rule(kind, text_format), rows=len(records))
    job = Job(records, tokenizer, task, kind, max_length, text_format, labels, Faults(records.source), report)
    examples, label_set = _KINDS[kind if task != "SEQ_2_SEQ_LM" else "seq2seq"](job)
    job.faults.raise_if_any()
    _count(report, examples)
    multi = kind == "classification" and "labels" in records.rows[0]
    used = text_format if TASK_OF[kind] == "CAUSAL_LM" else None
    return Prepared(examples, report, records, label_set.values if label_set else None, used, multi)


def _task_and_kind(records: Records, task: str | None) -> tuple[str, str]:
    """The model's task and how the rows are read; text + label may also be read as text.

    Raises  DataError: the rows do not serve this task
    """
    known = (*TASKS, *TASK_OF)
    if records.kind == "preference" or task == "preference":
        raise DataError(
            f"{records.source} holds preferences, which this version does not train; to train the chosen answers set "
            "data.columns to {completion: chosen}"
        )
    if task is not None and task not in known:
        raise DataError(f"task {task!r} is none of {', '.join(known)}{nearest(task, known)}")
    kind = "text" if task in ("text", "CAUSAL_LM") and "text" in records.rows[0] else records.kind
    wanted = TASK_OF.get(task or kind, task or "")
    fits = TASK_OF[kind] == wanted or (kind == "sft" and wanted == "SEQ_2_SEQ_LM")
    if not fits or (task in TASK_OF and task != kind and {task, kind} != {"sft", "messages"}):
        raise DataError(
            f"{records.source} holds {kind} rows, which do not serve the task {task}; expected that task's columns; "
            "set data.columns, or the task"
        )
    return wanted, kind


def _rule(kind: str, text_format: TextFormat | None) -> str:
    if kind == "text" and text_format is not None:
        head = f"ids {list(text_format.head)} + " if text_format.head else ""
        return f"text: {head}text + EOS (id {text_format.eos_id}); every token but the first is trained"
    if text_format is not None:
        return text_format.describe()
    if kind == "classification":
        return "text in the tokenizer's own frame, one label a row"
    return "words in the tokenizer's own frame, each tag on its word's first token"


def _count(report: DataReport, examples: list[Example]) -> None:
    report.examples = len(examples)
    report.truncated_rows = len({example.row for example in examples if example.cut})
    report.tokens_cut = sum(len(example.cut) for example in examples)
    report.trained_tokens = sum(example.n_trained for example in examples if example.task != "SEQ_CLS")
    total = sum(example.size for example in examples)
    report.context_tokens = total - report.trained_tokens
    report.note_lengths([example.size for example in examples])


_KINDS: dict[str, Callable[[Job], tuple[list[Example], Any]]] = {
    "sft": prepare_pairs,
    "messages": prepare_pairs,
    "text": prepare_text,
    "seq2seq": prepare_seq2seq,
    "classification": prepare_classes,
    "token_classification": prepare_tags,
}
