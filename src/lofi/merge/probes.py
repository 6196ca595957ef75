"""What two models are asked when they are compared: prompts for their logits, examples for their loss.

From a data file where one is given (its rows should be held out), else seeded random token ids, on which only logits
can be compared. Knows data files and prepared examples; does not judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.files.golden import random_prompts

MOST_EXAMPLES = 512
_PROMPTS = 16
_PROMPT_TOKENS = 128
_LENGTH = 512


@dataclass(frozen=True)
class Probes:
    """Token ids to compare logits on, examples (may be none) to compare losses on, and where they are from."""

    prompts: list[list[int]]
    examples: Sequence[Any]
    source: str


def random_probes(model: Any) -> Probes:
    """Seeded random ids of the model's vocabulary."""
    return Probes(random_prompts(int(model.config.get_text_config().vocab_size), count=_PROMPTS), (), "random ids")


def data_probes(
    data: str | Path,
    model_path: str | Path,
    *,
    task: str | None,
    record: dict[str, Any],
    columns: Mapping[str, str] | None = None,
) -> Probes:
    """The first rows of a data file, encoded as the adapter's record (lofi.json) says it was trained.

    Raises  DataError for the file, ModelError for a base without a tokenizer
    """
    from lofi.data.format import TextFormat
    from lofi.data.prepare import prepare
    from lofi.data.records import load_records
    from lofi.models.load import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    written = record.get("text_format")
    text_format = TextFormat.from_dict(written, tokenizer) if written else None
    prepared = prepare(
        load_records(data, columns=columns, limit=MOST_EXAMPLES),
        tokenizer,
        task=task,
        max_length=_LENGTH,
        text_format=text_format,
        labels=record.get("labels"),
    )
    examples = prepared.examples[:MOST_EXAMPLES]
    prompts = [example.input_ids[-_PROMPT_TOKENS:] for example in examples[:_PROMPTS]]
    return Probes(prompts, examples, str(data))
