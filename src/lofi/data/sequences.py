"""Text kinds become examples: prompt + completion, messages, plain text, and the two sides of an encoder-decoder.

Truncation removes context only; an answer that does not fit is a fault naming its line; a conversation that does not
fit becomes an example for each answer; a long text becomes windows. What is trained is counted here, from the flags
that the labels are made of. Not known here: classes, batches. Rejected: skipping rows that do not fit (the trained set
is then not the given one).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from lofi.data.examples import Example
from lofi.data.format import Encoded
from lofi.data.job import Job
from lofi.data.labels import causal_labels
from lofi.data.truncation import cut_region, windows
from lofi.errors import DataError

_NO_TOKEN = "becomes no token under this tokenizer; expected text it can encode; change or remove the row"


def prepare_pairs(job: Job) -> tuple[list[Example], None]:
    """prompt + completion, and messages: the answers are trained, each with its stop token."""
    examples: list[Example] = []
    for chunk in job.chunks():
        drafted = [(index, draft) for index, drafts in _drafts(job, chunk) for draft in drafts]
        encoded = job.format.encode_many([draft for _, draft in drafted])
        for (index, _), one in zip(drafted, encoded, strict=True):
            examples += _fitted(job, index, one)
    _note_splits(job, examples)
    return examples, None


def _drafts(job: Job, chunk: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[Any]]]:
    for index, row in chunk:
        try:
            yield index, job.format.drafts(row)
        except DataError as error:
            job.fault(index, str(error))


def _fitted(job: Job, index: int, one: Encoded) -> list[Example]:
    """The encoded row within max_length: as it is, cut, or (a conversation) split into an example for each answer."""
    if job.max_length is None or len(one.input_ids) <= job.max_length:
        return _checked(job, index, one)
    if len(_run_ends(one.trained)) > 1:
        drafts = job.format.drafts(job.records.rows[index], a_turn_each=True)
        return [example for part in job.format.encode_many(drafts) for example in _fitted(job, index, part)]
    return _cut(job, index, one, job.max_length)


def _cut(job: Job, index: int, one: Encoded, max_length: int) -> list[Example]:
    row = job.records.rows[index]
    head = job.format.head_length(row["prompt"] if "completion" in row else row["messages"], one.input_ids)
    region = cut_region(len(one.input_ids), one.context, max_length, head)
    if region is None:
        _too_long(job, index, len(one.input_ids) - one.context + 1, max_length)
        return []
    start, stop = region
    kept = Encoded(one.input_ids[:start] + one.input_ids[stop:], one.trained[:start] + one.trained[stop:])
    return _checked(job, index, kept, cut=one.input_ids[start:stop], cut_at=start)


def _too_long(job: Job, index: int, needed: int, max_length: int) -> None:
    text = f"the completion needs max_length {needed} at least, given was {max_length}"
    job.fault(index, f"{text}; raise train.max_length, or shorten or remove the row")


def _checked(job: Job, index: int, one: Encoded, *, cut: Sequence[int] = (), cut_at: int = 0) -> list[Example]:
    """The example, counted; a fault where no word would be trained or a stop token is missing."""
    stop_ids = job.format.stop_ids
    ends = _run_ends(one.trained)
    stops = sum(one.input_ids[end] in stop_ids for end in ends)
    everywhere = sum(flag and token in stop_ids for token, flag in zip(one.input_ids, one.trained, strict=True))
    job.report.stop_in_text += everywhere > stops
    job.report.completions += len(ends)
    job.report.eos_trained += stops
    if sum(one.trained) <= len(ends):
        job.fault(index, f"the completion {_NO_TOKEN}")
    elif stops < len(ends):
        job.fault(index, "a completion does not end in a trained stop token; check the tokenizer's chat template")
    labels = causal_labels(one.input_ids, one.trained)
    return [Example(one.input_ids, labels, row=index, prompt_length=one.context, cut=cut, cut_at=cut_at)]


def _run_ends(trained: Sequence[bool]) -> list[int]:
    """The last position of every stretch of trained tokens."""
    after = [*trained[1:], False]
    return [place for place, (flag, follows) in enumerate(zip(trained, after, strict=True)) if flag and not follows]


def prepare_text(job: Job) -> tuple[list[Example], None]:
    """Plain text: every token but the first is trained, in windows where it is longer than max_length."""
    examples: list[Example] = []
    for chunk in job.chunks():
        encoded = job.format.encode_many([job.format.text_pieces(row["text"]) for _, row in chunk])
        for (index, _), one in zip(chunk, encoded, strict=True):
            examples += _text_windows(job, index, one)
    _note_splits(job, examples)
    return examples, None


def _text_windows(job: Job, index: int, one: Encoded) -> list[Example]:
    """A text as windows that overlap by one token: each token but the first of all is trained exactly once."""
    ids, trained = one.input_ids, one.trained
    if len(ids) <= len(job.format.head) + 1:
        job.fault(index, f"the text {_NO_TOKEN}")
    job.report.completions += 1
    job.report.eos_trained += trained[-1] and ids[-1] in job.format.stop_ids
    spans = windows(len(ids), job.max_length or len(ids))
    return [
        Example(ids[start:stop], causal_labels(ids[start:stop], trained[start:stop]), row=index, prompt_length=1)
        for start, stop in spans
    ]


def _note_splits(job: Job, examples: list[Example]) -> None:
    """Count rows that became several examples."""
    rows = [example.row for example in examples]
    split = {row for row, following in pairwise(rows) if row == following}
    job.report.split_rows = len(split)
    job.report.split_examples = sum(row in split for row in rows)


def prepare_seq2seq(job: Job) -> tuple[list[Example], None]:
    """prompt + completion for an encoder-decoder: the prompt is read, the completion and its EOS are the labels."""
    examples: list[Example] = []
    for chunk in job.chunks():
        sources = job.format.encode_many([job.format.prompt_pieces(row["prompt"]) for _, row in chunk])
        targets = job.format.encode_many([job.format.target_pieces(row["completion"]) for _, row in chunk])
        for (index, _), source, target in zip(chunk, sources, targets, strict=True):
            examples.append(_two_sided(job, index, source.input_ids, target.input_ids))
    return examples, None


def _two_sided(job: Job, index: int, source: list[int], target: list[int]) -> Example:
    limit = job.max_length or max(len(source), len(target))
    head = len(job.format.head)
    if len(target) > limit:
        _too_long(job, index, len(target), limit)
    if len(target) <= head + 1:
        job.fault(index, f"the completion {_NO_TOKEN}")
    job.report.completions += 1
    job.report.eos_trained += target[-1] in job.format.stop_ids
    start, stop = cut_region(len(source), len(source), limit, head) or (0, 0) if len(source) > limit else (0, 0)
    kept, cut = source[:start] + source[stop:], source[start:stop]
    return Example(kept, target, task="SEQ_2_SEQ_LM", row=index, prompt_length=len(kept), cut=cut, cut_at=start)
