"""What `lofi inspect ADAPTER` finds: updates beside their weights, two adapters beside each other, other methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.cli.inspecting import Found, facts_table, table, words
from lofi.cli.inspecting_lines import (
    BASE_HEADS,
    HEADS,
    TENSOR_HEADS,
    base_lines,
    cells_of,
    tensor_lines,
    tensors_of,
    update_lines,
)
from lofi.cli.inspecting_pair import against
from lofi.errors import LofiError, ProofError

_BOTTLENECK = (
    "a nonlinearity stands between the two matrices of a bottleneck, so no weight is updated and there are no singular "
    "values to show"
)
_NO_SPECTRUM = {
    "houlsby": _BOTTLENECK,
    "adapter-lin": _BOTTLENECK,
    "prefix": "a prefix is keys and values of virtual tokens, not an update of a weight, so it has no spectrum",
    "prompt": "a prompt is embeddings of virtual tokens, not an update of a weight, so it has no spectrum",
    "bitfit": "bias vectors are trained, which have no spectrum",
    "last-layers": "whole blocks are trained in full, so there are no factors whose spectrum could be shown",
}
_DORA = (
    "DoRA: the spectra are those of B A alone; what is added to a weight also depends on the trained magnitudes, which "
    "rescale its columns"
)


@dataclass(frozen=True)
class Asked:
    """What of an adapter is to be shown, and where figures go."""

    whole: bool = False
    model: str | None = None
    against: Path | None = None
    output: str | None = None


def adapter(path: Path, asked: Asked) -> Found:
    """An adapter folder: what it changes, how strongly, in how many directions, and where it comes from."""
    from lofi.files.adapter_folder import read_folder
    from lofi.report import inspection
    from lofi.report.spectrum import updates_of

    if asked.output is not None:
        inspection.check_output(asked.output)
    folder = read_folder(path)
    if asked.against is not None:
        return against(folder, asked.against, whole=asked.whole, output=asked.output)
    base, said = base_for(folder, asked.model)
    updates = updates_of(folder, _weights(base, folder), intruding=asked.whole)
    notes = [*folder.notes, *said, *_words_on(folder, updates)]
    tensors = tensors_of(folder, base)
    found = _plain(folder, updates) | {"notes": notes, "base_found": base is not None, "tensors": tensors}
    facts = _origin(folder) | {"parameters": f"{found['parameters']:,} in {len(folder.tensors)} tensors"}
    shown = [facts_table(str(path), facts)]
    if updates:
        shown.append(table("updates", HEADS, update_lines(updates, whole=asked.whole)))
    if beside := base_lines(updates, whole=asked.whole):
        shown.append(table("beside the base's weights", BASE_HEADS, beside))
    if tensors:
        title = "trained besides" if updates else "trained"
        shown.append(table(title, TENSOR_HEADS, tensor_lines(tensors, whole=asked.whole)))
    if asked.output is not None:
        told = {"updates": inspection.table_of(updates), "trained besides": cells_of(tensors)}
        where = inspection.write_inspection(
            asked.output, f"Adapter {path}", inspection.drawings_of(updates), facts=facts, notes=notes, tables=told
        )
        found["output"] = str(where)
        notes = [*notes, f"written to {where}"]
    return found, [*shown, *notes]


def base_for(folder: Any, model: str | None) -> tuple[Any, list[str]]:
    """The adapter's base, opened, and sentences; None where lofi.json names none that is here and the right one.

    Raises  what load_model raises, and ProofError for another base, where `model` was given
    """
    from lofi.models.folder import local_folder

    path = model or (folder.record.get("base") or {}).get("path")
    if path is None:
        return None, ["lofi.json names no base, so nothing is said beside its weights; give it with --model"]
    try:
        if model is None and local_folder(path) is None:  # a hub id: nothing is fetched that was not asked for
            return None, [f"the base {path} is not a folder here, so nothing is said beside its weights; give --model"]
        return _opened(folder, str(path)), []
    except LofiError as error:
        if model is not None:
            raise
        return None, [f"nothing is said beside the base's weights: {error}"]


def _opened(folder: Any, path: str) -> Any:
    from lofi.cli.verify import replayed_on
    from lofi.files import fingerprint
    from lofi.models.load import load_model

    task, record = folder.config.task_type, folder.record
    labels = [str(label) for label in record.get("labels") or ()] or None
    base = load_model(
        path,
        quantization=replayed_on(None, record, path),
        device="cpu",
        task=task,
        labels=labels if task in ("SEQ_CLS", "TOKEN_CLS") else None,
    )
    stated = record.get("base")
    reasons = fingerprint.compare(stated, fingerprint.base_fingerprint(base)) if stated else []
    if reasons:
        raise ProofError(f"{folder.path} was trained on another base than {path}: {'; '.join(reasons[:3])}")
    return base


def _weights(base: Any, folder: Any) -> Any:
    from lofi.files.weights import BaseWeights

    return None if base is None else BaseWeights(base, folder)


def _plain(folder: Any, updates: Sequence[Any]) -> dict[str, Any]:
    record = folder.record
    return {
        "method": folder.config.method,
        "config": folder.config.to_dict(),
        "parameters": sum(tensor.numel() for tensor in folder.tensors.values()),
        "base": record.get("base"),
        "text_format": record.get("text_format"),
        "labels": record.get("labels"),
        "figures": record.get("figures"),
        "golden_prompts": _golden(record),
        "modules": [update.to_dict() for update in updates],
        "other_tensors": sorted(key for key in folder.tensors if ".lora_" not in key),
    }


def _words_on(folder: Any, updates: Sequence[Any]) -> list[str]:
    """What a reader must know of the method."""
    from lofi.files.updates import MAGNITUDE

    several = getattr(folder.config, "configs", (folder.config,))
    said = [_NO_SPECTRUM[one.method] for one in several if one.method in _NO_SPECTRUM]
    if any(MAGNITUDE in key for key in folder.tensors):
        said.append(_DORA)
    counted = [update.intruders for update in updates if update.intruders is not None]
    if counted:
        said.append(
            f"{sum(counted)} intruder dimensions in {len(counted)} weights: among the ten strongest directions of each "
            "adapted weight, those unlike (cosine below 0.5) every direction of the base's (arXiv 2410.21228)"
        )
    dead = [update for update in updates if update.dead]
    if dead:
        count = sum(update.dead for update in dead)
        said.append(f"{count} dead directions in {len(dead)} modules: lofi resize --energy 1 drops them for nothing")
    return said


def _origin(folder: Any) -> dict[str, str]:
    from lofi.files.quantized import in_words
    from lofi.files.updates import lora_of

    record, lora = folder.record, lora_of(folder.config)
    base = record.get("base") or {}
    facts = {
        "method": f"{folder.config.method} ({folder.config.peft_type})",
        "made by": f"lofi {record['lofi']}" if record.get("lofi") else "another tool: its base cannot be proved",
        "base": str(base.get("path") or folder.peft.get("base_model_name_or_path") or "not stated"),
        "trained on": in_words(base.get("quantization")) if base else "not stated",
        "task": folder.config.task_type or "not stated",
    }
    facts |= _lora_facts(lora) if lora is not None else {}
    facts |= {
        "text format": str((record.get("text_format") or {}).get("kind", "not stated")),
        "golden prompts": str(_golden(record)),
    }
    if record.get("labels"):
        facts["labels"] = words(record["labels"])
    if record.get("figures"):
        facts["figures"] = ", ".join(f"{key} {value}" for key, value in record["figures"].items())
    return facts


def _lora_facts(config: Any) -> dict[str, str]:
    rule = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
    patterns = " (some modules differ)" if config.rank_pattern or config.alpha_pattern else ""
    multiplier = f"{rule} = {config.scale(config.r, config.lora_alpha):g}{patterns}"
    return {
        "rank": f"{config.r}, alpha {config.lora_alpha:g}, multiplier {multiplier}",
        "targets": _targets(config.target_modules or config.target_parameters),
    }


def _golden(record: dict[str, Any]) -> int:
    return len((record.get("golden") or {}).get("prompts", ()))


def _targets(names: Any) -> str:
    """The patterns; full paths by their last names, with counts."""
    if isinstance(names, str) or not any("." in name for name in names):
        return words(names)
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in sorted(counts.items()))
