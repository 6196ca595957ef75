"""What `lofi inspect` finds and shows: for each kind of thing, (plain values for --json, renderables for people)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Found = tuple[dict[str, Any], list[Any]]
RANK = 16  # the rank that "what could be adapted" is counted at
LABELS_SHOWN = 20


def adapter(path: Path, *, whole: bool) -> Found:
    """An adapter folder: what it changes, how strongly and in how many directions, and where it comes from."""
    from lofi.files.adapter_folder import read_folder
    from lofi.report.spectrum import updates_of

    folder = read_folder(path)
    updates = updates_of(folder)
    counted = sum(tensor.numel() for tensor in folder.tensors.values())
    facts = _origin(folder) | {"parameters": f"{counted:,} in {len(folder.tensors)} tensors"}
    others = sorted(key for key in folder.tensors if ".lora_" not in key)
    found = {
        "config": folder.config.to_dict(),
        "parameters": counted,
        "base": folder.record.get("base"),
        "text_format": folder.record.get("text_format"),
        "labels": folder.record.get("labels"),
        "figures": folder.record.get("figures"),
        "golden_prompts": _golden(folder.record),
        "modules": [update.to_dict() for update in updates],
        "other_tensors": others,
        "notes": list(folder.notes),
    }
    lines = [_spectrum_line(update) for update in updates] if whole else _by_kind(updates)
    heads = ("module", "shape", "rank", "multiplier", "norm", "largest value", "directions for 90 %")
    shown = [_facts(str(path), facts), _table("updates", heads, lines)]
    return found, shown + ([f"trained besides: {', '.join(others[:LABELS_SHOWN])}"] if others else [])


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
        "head": _words(found["head"]),
        "fused experts": f"{len(experts)} tensors, adapted through target_parameters" if experts else "none",
    } | _packed(packed, stored)
    lines = [(name, shape, str(number)) for (name, shape), number in kinds.items()]
    return found, [_facts(path, facts), _table("two-dimensional weights", ("name", "shape", "count"), lines)]


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


def _origin(folder: Any) -> dict[str, str]:
    from lofi.files.quantized import in_words

    config, record = folder.config, folder.record
    base = record.get("base") or {}
    rule = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
    patterns = " (some modules differ)" if config.rank_pattern or config.alpha_pattern else ""
    multiplier = f"{rule} = {config.scale(config.r, config.lora_alpha):g}{patterns}"
    facts = {
        "made by": f"lofi {record['lofi']}" if record.get("lofi") else "another tool: its base cannot be proved",
        "base": str(base.get("path") or folder.peft.get("base_model_name_or_path") or "not stated"),
        "trained on": in_words(base.get("quantization")) if base else "not stated",
        "task": config.task_type or "not stated",
        "rank": f"{config.r}, alpha {config.lora_alpha:g}, multiplier {multiplier}",
        "targets": _targets(config.target_modules or config.target_parameters),
        "text format": str((record.get("text_format") or {}).get("kind", "not stated")),
        "golden prompts": str(_golden(record)),
    }
    if record.get("labels"):
        facts["labels"] = _words(record["labels"])
    if record.get("figures"):
        facts["figures"] = ", ".join(f"{key} {value}" for key, value in record["figures"].items())
    return facts


def _golden(record: dict[str, Any]) -> int:
    return len((record.get("golden") or {}).get("prompts", ()))


def _targets(names: Any) -> str:
    """The patterns; full paths by their last names, with counts."""
    if isinstance(names, str) or not any("." in name for name in names):
        return _words(names)
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(counts.items()))


def _words(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f" and {len(value) - LABELS_SHOWN} more" if len(value) > LABELS_SHOWN else ""
        return ", ".join(map(str, value[:LABELS_SHOWN])) + more
    return str(value)


def _spectrum_line(update: Any) -> tuple[str, ...]:
    shape = f"{update.shape[0]} x {update.shape[1]}"
    largest = f"{update.values[0]:.4g}" if update.values else "0"
    return (
        update.path,
        shape,
        str(update.rank),
        f"{update.scale:g}",
        f"{update.norm:.4g}",
        largest,
        f"{update.directions} of {update.rank}",
    )


def _by_kind(updates: Sequence[Any]) -> list[tuple[str, ...]]:
    """One line for all modules of a last name, shape, rank and multiplier, with the range of their figures."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for update in updates:
        key = (update.path.rpartition(".")[2], update.shape, update.rank, update.scale)
        groups.setdefault(key, []).append(update)
    return [
        (
            f"{len(group)} x {name}" if len(group) > 1 else name,
            f"{shape[0]} x {shape[1]}",
            str(rank),
            f"{scale:g}",
            _range([update.norm for update in group]),
            _range([max(update.values, default=0.0) for update in group]),
            f"{_range([update.directions for update in group])} of {rank}",
        )
        for (name, shape, rank, scale), group in groups.items()
    ]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _facts(title: str, facts: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
    for key, value in facts.items():
        table.add_row(key, value)
    return table


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < 2 else "right", no_wrap=place == 0)
    for line in lines:
        table.add_row(*line)
    return table
