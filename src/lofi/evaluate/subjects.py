"""Records made ready to be asked about once, then asked of the base and of every adapter alike.

Knows how each kind of records becomes questions for a model: prompts to answer, examples to lose on, rows to label.
Whoever speaks (base or adapter) is switched outside; everything that does not depend on it is worked out once, here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lofi.errors import RequestError
from lofi.evaluate import metrics as figures
from lofi.evaluate.batching import is_pair_model
from lofi.evaluate.classify import choose_label_sets, choose_labels, choose_tags
from lofi.evaluate.generation import context_length, generate, side_length
from lofi.evaluate.metrics import Measure
from lofi.evaluate.perplexity import token_losses

_TASKS = {
    "sft": ("CAUSAL_LM", "SEQ_2_SEQ_LM"), "messages": ("CAUSAL_LM",), "text": ("CAUSAL_LM",),
    "classification": ("SEQ_CLS",), "token_classification": ("TOKEN_CLS",),
}  # fmt: skip

_NO_LIMIT = 1 << 30  # tokenizers without a limit say 10^30


class Subject(Protocol):
    """Records made ready: `ask` puts them to whoever speaks now."""

    notes: list[str]

    def ask(self, who: str) -> tuple[list[Any], dict[str, Measure]]:
        """The answers in the order of the records, and the measures of all metrics asked for."""
        ...


def subject_of(
    model: Any, tokenizer: Any, records: Any, *, names: Sequence[str], text_format: Any, extra: Any, options: Any
) -> Subject:
    """The subject that this kind of records is.

    Raises  RequestError where the model's task does not fit the records; DataError from preparing them
    """
    from lofi.models.facts import task_of

    task = task_of(model)
    if task not in _TASKS[records.kind]:
        raise RequestError(
            f"a {type(model).__name__} ({task}) cannot be evaluated on data of kind {records.kind}: "
            f"load the model with task={_TASKS[records.kind][0]}, or give other data."
        )
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        return Labelled(model, tokenizer, records, names=names, options=options)
    return Written(model, tokenizer, records, names=names, text_format=text_format, extra=extra, options=options)


class Written:
    """Prompts to answer and examples to lose on, for language models."""

    def __init__(
        self, model: Any, tokenizer: Any, records: Any, *, names: Sequence[str], text_format: Any, extra: Any, options:
        Any
    ) -> None:
        from lofi.data.format import TextFormat

        self.model, self.tokenizer, self.records, self.options = model, tokenizer, records, options
        self.names, self.extra = names, extra or {}
        self.text_format = text_format or TextFormat.for_tokenizer(tokenizer, seq2seq=is_pair_model(model))
        self.notes: list[str] = []
        self.examples = self._prepare() if any(name in figures.LOSS for name in names) else []
        self.writes = any(name not in figures.LOSS for name in names)
        if self.writes:
            questions, answers = zip(*map(_question, records.rows), strict=True)
            self.references = list(answers)
            self.prompts = self._encode(questions)
            self._note_scoring()

    def ask(self, who: str) -> tuple[list[Any], dict[str, Measure]]:
        """Answer the prompts and lose on the examples."""
        answers, found = [], {}
        if self.examples:
            losses = token_losses(
                self.model,
                self.examples,
                batch_tokens=self.options.batch_tokens,
                on_done=_progress(self.options, f"{who}: loss", len(self.examples)),
            )
            found = figures.loss_measures(self.names, losses)
        if self.writes:
            answers = self._answer(who)
            language, stem = self.options.language, self.options.stem
            found |= figures.text_measures(self.names, answers, self.references, language=language, stem=stem)
            found |= figures.extra_measures(self.extra, answers, self.records.rows)
        return answers, found

    def _answer(self, who: str) -> list[Any]:
        return generate(
            self.model,
            self.tokenizer,
            self.text_format,
            self.prompts,
            max_new_tokens=self.options.max_new_tokens,
            batch_tokens=self.options.batch_tokens,
            sampling=self.options.sampling,
            on_done=_progress(self.options, f"{who}: answers", len(self.prompts)),
        )

    def _prepare(self) -> list[Any]:
        from lofi.data.prepare import prepare
        from lofi.models.facts import task_of

        limit = _limit(self.model, self.tokenizer, self.options)
        prepared = prepare(
            self.records, self.tokenizer, task=task_of(self.model), max_length=limit, text_format=self.text_format
        )
        self._note_cuts(prepared.report.truncated_rows, "rows", "loss")
        return prepared.examples

    def _encode(self, questions: Sequence[Any]) -> list[list[int]]:
        """Prompts as ids; those that leave no room for an answer are cut as training cuts them, and counted."""
        limit = _limit(self.model, self.tokenizer, self.options)
        encoded = self.text_format.encode_prompts(questions)
        if limit is None:
            return encoded
        room = limit if is_pair_model(self.model) else limit - self.options.max_new_tokens
        if room < 1:
            raise RequestError(
                f"max_new_tokens is {self.options.max_new_tokens}, which leaves no room for a prompt in {limit} tokens"
                ": lower it."
            )
        long = [i for i, ids in enumerate(encoded) if len(ids) > room]
        cut = self.text_format.encode_prompts([questions[i] for i in long], max_length=room) if long else []
        for index, ids in zip(long, cut, strict=True):
            encoded[index] = ids
        self._note_cuts(len(long), "prompts", "answers")
        return encoded

    def _note_cuts(self, count: int, what: str, use: str) -> None:
        if count:
            self.notes.append(f"{count} of {len(self.records.rows)} {what} were too long and cut on the left ({use}).")

    def _note_scoring(self) -> None:
        if any(name.startswith("rouge") for name in self.names):
            words = {"unicode": "Unicode words", "english": "a-z and 0-9 only, as rouge_score"}
            stemmed = ", Porter stems" if self.options.stem else ""
            self.notes.append(f"ROUGE is F1 on {words.get(self.options.language, self.options.language)}{stemmed}.")
        if any(name in ("bleu", "chrf") for name in self.names):
            import sacrebleu

            self.notes.append(f"BLEU (13a, exp smoothing) and chrF2 as sacrebleu {sacrebleu.__version__}, on NFC text.")


class Labelled:
    """Rows to label, or whose words to tag, for classification models."""

    def __init__(self, model: Any, tokenizer: Any, records: Any, *, names: Sequence[str], options: Any) -> None:
        from lofi.data.prepare import prepare

        self.model, self.tokenizer, self.records, self.names, self.options = model, tokenizer, records, names, options
        self.prepared = prepare(
            records,
            tokenizer,
            max_length=_limit(model, tokenizer, options),
            labels=options.labels or _labels_of(model),
        )
        self.labels = self._checked(self.prepared.labels or [])
        cut = self.prepared.report.truncated_rows
        self.notes = [f"{cut} of {len(records.rows)} rows were too long and cut on the right."] if cut else []

    def ask(self, who: str) -> tuple[list[Any], dict[str, Measure]]:
        """Label every row, or tag its words."""
        examples = self.prepared.examples
        given: dict[str, Any] = {
            "batch_tokens": self.options.batch_tokens,
            "on_done": _progress(self.options, f"{who}: labels", len(examples)),
        }
        if self.records.kind == "token_classification":
            chosen = choose_tags(self.model, examples, **given)
            said = [self._tagged(*pair) for pair in zip(examples, chosen, strict=True)]
            golds = [[self._name(tag) for tag in row["tags"]] for row in self.records.rows]
            return said, figures.tag_measures(self.names, said, golds)
        if self.prepared.multi_label:
            sets = choose_label_sets(self.model, examples, **given)
            labels: list[Any] = [[self.labels[i] for i in one] for one in sets]
            wanted: list[Any] = [[self._name(label) for label in row["labels"]] for row in self.records.rows]
        else:
            labels = [self.labels[i] for i in choose_labels(self.model, examples, **given)]
            wanted = [self._name(row["label"]) for row in self.records.rows]
        return labels, figures.class_measures(self.names, labels, wanted, self.labels)

    def _checked(self, labels: Sequence[Any]) -> list[Any]:
        outputs = int(self.model.config.num_labels)
        if len(labels) != outputs:
            raise RequestError(
                f"the model chooses among {outputs} labels but the data has {len(labels)}: give the labels it was "
                "trained with, in order."
            )
        if "span_f1" in self.names and not all(isinstance(label, str) for label in labels):
            raise RequestError("span_f1 needs tags with names like B-person, but these are numbers: give their names.")
        return list(labels)

    def _name(self, value: Any) -> Any:
        """The label's own name: data may also give its number."""
        value = int(value) if isinstance(value, bool) else value
        return value if value in self.labels else self.labels[value]

    def _tagged(self, example: Any, chosen: list[int]) -> list[Any]:
        """A tag for every word of the row: words that were cut off, or became no token, are tagged as outside."""
        words = self.records.rows[example.row]["tokens"]
        places = list(range(len(words)))
        if len(chosen) < len(words):
            seen = self.tokenizer(words, is_split_into_words=True, verbose=False).word_ids()
            places = list(dict.fromkeys(word for word in seen if word is not None))[: len(chosen)]
        tags: list[Any] = ["O"] * len(words)
        for place, tag in zip(places, chosen, strict=True):
            tags[place] = self.labels[tag]
        return tags


def _question(row: dict[str, Any]) -> tuple[Any, list[str]]:
    """What is asked, and the answers that are right: of messages, the last assistant's turn."""
    if "completion" in row:
        return row["prompt"], list(row.get("references") or [row["completion"]])
    turns = row["messages"]
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], [turns[last]["content"]]


def _labels_of(model: Any) -> list[str] | None:
    """The label names in the model's config; None where it has only transformers' placeholders."""
    names = [name for _, name in sorted(model.config.id2label.items())]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _limit(model: Any, tokenizer: Any, options: Any) -> int | None:
    """Longest row in tokens: what was asked for, within what the model and its tokenizer have; None: no limit."""
    stated = getattr(tokenizer, "model_max_length", _NO_LIMIT)
    told = stated if stated < _NO_LIMIT else None
    limits = [options.max_length, context_length(model), side_length(model), told]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _progress(options: Any, what: str, total: int) -> Callable[[int], None] | None:
    report = options.on_progress
    return None if report is None else lambda done: report(what, done, total)
