"""What `lofi inspect` finds and shows: for each kind of thing, (plain values for --json, renderables for people).

Data and models here; adapters in inspecting_adapter.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Found = tuple[dict[str, Any], list[Any]]
RANK = 16  # the rank that "what could be adapted" is counted at
LABELS_SHOWN = 20


def data(records: Any, model: str, *, rows: int, task: str | None, max_length: int | None) -> Found:
    """Data as the model sees it: its report, and some rows with their tokens coloured."""
    from lofi.data.prepare import prepare
    from lofi.data.view import show
    from lofi.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    prepared = prepare(records, tokenizer, task=task or _task_for(records.kind, model), max_length=max_length)
    found = {"report": prepared.report.to_dict(), "labels": prepared.labels}
    return found, [show(prepared, tokenizer, rows=rows)]


def model(path: str, quantization: str | None = None) -> Found:
    """A model's weights that could be adapted, built from its config without reading them, and what is quantized.

    `quantization` shows a dense model as it would be quantized.
    """
    from lofi.adapters.config import LoraConfig
    from lofi.adapters.target import expert_parameters
    from lofi.files.quantized import held_quantization, packed_of, packed_on_meta
    from lofi.models.counting import count_adapter, meta_model, parameter_count
    from lofi.models.facts import head_names, linear_counts, output_head_name, tied_groups

    config, task = _config(path)
    stored = held_quantization(config, path) is not None
    packed = packed_of(packed_on_meta(config, task, path, quantization))
    plain = meta_model(config, task)
    count = count_adapter(config, LoraConfig(r=RANK), task)
    experts = expert_parameters(plain)
    kinds = linear_counts(plain)
    found: dict[str, Any] = {
        "class": type(plain).__name__,
        "task": task,
        "parameters": parameter_count(plain),
        "trainable_at_r16": count.trainable,
        "linears": [{"name": name, "shape": shape, "count": number} for (name, shape), number in kinds.items()],
        "tied": tied_groups(plain),
        "head": output_head_name(plain) or head_names(plain),
        "experts": [{"name": f"{where}.{name}", "shape": list(shape)} for where, name, shape in experts],
        "quantization": None if packed is None else packed.to_dict() | {"stored": stored},
    }
    facts = {
        "class": f"{found['class']} ({task})",
        "parameters": f"{found['parameters']:,}",
        f"LoRA at r={RANK}, all-linear": f"{count.trainable:,} parameters ({count.percent:.2f} %)",
        "tied": "; ".join(" = ".join(group) for group in found["tied"]) or "nothing",
        "head": words(found["head"]),
        "fused experts": f"{len(experts)} tensors, adapted through target_parameters" if experts else "none",
    } | _packed(packed, stored)
    lines = [(name, shape, str(number)) for (name, shape), number in kinds.items()]
    return found, [facts_table(path, facts), table("two-dimensional weights", ("name", "shape", "count"), lines)]


def _packed(packed: Any, stored: bool) -> dict[str, str]:
    if packed is None:
        return {"quantized": "nothing"}
    head, rest, whole = packed.lines()
    return {"quantized" if stored else "would be quantized": head, "": rest, "in all": whole}


def _config(path: str) -> tuple[Any, str]:
    from transformers import AutoConfig

    from lofi.models.facts import class_task
    from lofi.models.folder import read_config

    read_config(Path(path))  # its errors are sentences
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    stated = (config.architectures or [""])[0]
    return config, class_task(stated, bool(config.is_encoder_decoder)) or "SEQ_CLS"


def _task_for(kind: str, model: str) -> str | None:
    """SEQ_2_SEQ_LM for pairs under an encoder-decoder; else what the records are."""
    from lofi.models.folder import local_folder, read_config

    folder = local_folder(model)
    pair = folder is not None and read_config(folder).get("is_encoder_decoder")
    return "SEQ_2_SEQ_LM" if pair and kind == "sft" else None


def words(value: Any) -> str:
    """A value in a table; of a long list the first entries and a count."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f" and {len(value) - LABELS_SHOWN} more" if len(value) > LABELS_SHOWN else ""
        return ", ".join(map(str, value[:LABELS_SHOWN])) + more
    return str(value)


def facts_table(title: str, facts: dict[str, str]) -> Any:
    """Keys and values below each other, without heads or lines."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
    for key, value in facts.items():
        table.add_row(key, value)
    return table


def table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    """A table whose first two columns are words and whose others are figures."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for line in lines:
        table.add_row(*line)
    return table
