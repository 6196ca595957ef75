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
_CALIBRATION = 128


@dataclass(frozen=True)
class Probes:
    """Token ids to compare logits on, examples (may be none) to compare losses on, and where they are from."""

    prompts: list[list[int]]
    examples: Sequence[Any]
    source: str
    calibration: Sequence[Any] = ()
    """Examples set apart to calibrate on: nothing is judged on them."""
    answers: Sequence[list[int]] = ()
    """What an encoder-decoder's decoder reads beside each prompt: the reference; (): the prompt itself."""


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
    calibrate: bool = False,
) -> Probes:
    """The first rows of a data file, encoded as the adapter's record (lofi.json) says it was trained.

    With `calibrate` every fourth row, 128 at most, is set apart.
    Raises  DataError for the file, ModelError for a base without a tokenizer
    """
    from lofi.data.format import TextFormat
    from lofi.data.prepare import prepare
    from lofi.data.records import load_records
    from lofi.models.load import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    written = record.get("text_format")
    text_format = TextFormat.from_dict(written, tokenizer) if written else None
    most = MOST_EXAMPLES + (_CALIBRATION if calibrate else 0)
    prepared = prepare(
        load_records(data, columns=columns, limit=most),
        tokenizer,
        task=task,
        max_length=_LENGTH,
        text_format=text_format,
        labels=record.get("labels"),
    )
    judged, apart = _set_apart(prepared.examples[:most]) if calibrate else (prepared.examples[:most], [])
    prompts = [example.input_ids[-_PROMPT_TOKENS:] for example in judged[:_PROMPTS]]
    return Probes(prompts, judged, str(data), apart, _answers(judged[:_PROMPTS]))


def _answers(examples: Sequence[Any]) -> list[list[int]]:
    """The decoder's side of an encoder-decoder's examples; [] for others."""
    return [one.labels for one in examples if one.task == "SEQ_2_SEQ_LM"]


def _set_apart(examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(Examples to judge on, every fourth of all, 128 at most, to calibrate on)."""
    apart = set(range(3, len(examples), 4)[:_CALIBRATION])
    return [e for i, e in enumerate(examples) if i not in apart], [examples[i] for i in sorted(apart)]
