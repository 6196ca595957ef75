"""Base + adapter as one model folder that speaks as the adapter was trained: its stop tokens and template included.

The merge is merge/disk.py's. A merged folder has the base's tokenizer files, and servers read from those when to stop
and how a conversation is written; where the adapter was trained with another template or stop token, its own take their
place, and that is told. Knows not  engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lofi.errors import RequestError
from lofi.files.adapter_folder import AdapterFolder
from lofi.files.atomic import write_json, write_text
from lofi.merge.disk import merge_folder
from lofi.merge.report import FILE, MergeReport

TEMPLATE, GENERATION, TOKENIZER = "chat_template.jinja", "generation_config.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Merged:
    """A merged folder: the report of the merge, and what was changed beside the weights."""

    report: MergeReport
    notes: list[str] = field(default_factory=list)


def merge_into(read: AdapterFolder, base: str | Path, folder: Path, output: str | Path) -> Merged:
    """Write base + adapter into `folder`, which does not exist yet and will be called `output` in reports.

    Raises  what merge_folder raises
    """
    report = replace(merge_folder(base, read.path, folder), output=str(output))
    write_json(folder / FILE, report.to_dict())
    return Merged(report, speak_as_trained(folder, read.record))


def speak_as_trained(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Put the stop tokens and the chat template that an adapter was trained with into a model folder; what was changed.

    Nothing is changed where the record says nothing, or the same as the folder.
    """
    rule = record.get("text_format")
    if not rule:
        return []
    return [*_stop(folder, rule), *_write_template(folder, rule)]


def generation_config(folder: Path, rule: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[int]]:
    """A folder's generation config with every trained stop token among its EOS tokens, and those that were missing."""
    held = _json(folder / GENERATION)
    ends = held.get("eos_token_id", _json(folder / "config.json").get("eos_token_id"))
    known = [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    missing = [int(end) for end in (rule or {}).get("stop_ids") or () if end not in known]
    return held | {"eos_token_id": [*missing, *known]}, missing


def _stop(folder: Path, rule: Mapping[str, Any]) -> list[str]:
    config, missing = generation_config(folder, rule)
    if not missing:
        return []
    write_json(folder / GENERATION, config)
    return [f"{GENERATION} now ends answers at {config['eos_token_id']}: training did at {missing}, the base did not"]


def _write_template(folder: Path, rule: Mapping[str, Any]) -> list[str]:
    wanted, held = rule.get("template"), held_template(folder)
    if wanted is None or wanted == held:
        return []
    write_text(folder / TEMPLATE, wanted)
    config = _json(folder / TOKENIZER)
    if config.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER, config)
    return [f"{TEMPLATE} is the one that the adapter was trained with; the base has {'another' if held else 'none'}"]


def held_template(folder: Path) -> str | None:
    """The chat template of a model folder; None where it has none."""
    from lofi.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


def refuse_unmergeable(read: AdapterFolder) -> str | None:
    """Why an adapter cannot be handed over merged, and what to do; None where it can."""
    reason = read.config.why_unmergeable()
    return (
        None if reason is None else f"a {read.config.method} adapter cannot be merged, for {reason}: serve it with lofi"
    )


def refuse_speechless(read: AdapterFolder) -> str | None:
    """Why llama.cpp and Ollama, which write text, would not take an adapter for another task; None where they would."""
    task = read.config.task_type
    return None if task in (None, "CAUSAL_LM") else f"its task is {task}, and llama.cpp writes text: use --to merged"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} cannot be read as JSON ({error}); copy the model again") from None
    return value if isinstance(value, dict) else {}
