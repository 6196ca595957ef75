"""Open a model with its adapters for the verbs that ask it something.

Knows  that an adapter's folder says which task, labels and text format belong to it. Knows not  what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.errors import RequestError


@dataclass
class Opened:
    """A model with its adapters, none of them active yet, and the text format of each speaker."""

    model: Any
    tokenizer: Any
    adapters: list[str]
    task: str
    formats: dict[str, Any] = field(default_factory=dict)
    """Adapter's name, or "base", -> TextFormat; {} for classifiers."""
    labels: list[Any] | None = None

    def format_of(self, who: str | None) -> Any:
        """The text format in which this speaker was trained; the base's own for None."""
        return self.formats[who or "base"]


def open_model(
    path: str,
    adapters: Mapping[str, Path],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    seed: int = 0,
) -> Opened:
    """Load a model and put the adapters on it; each keeps the text format it was trained with.

    Raises  RequestError where adapters are of different tasks or labels; what load_model and load_adapter raise
    """
    import torch

    from lofi.adapters.switch import set_adapter
    from lofi.files.adapter_folder import load_adapter, read_folder
    from lofi.models.facts import task_of
    from lofi.models.load import load_model, load_tokenizer

    read = {name: read_folder(folder) for name, folder in adapters.items()}
    task = _agreed("task", {name: folder.config.task_type for name, folder in read.items()})
    labels = _agreed("label list", {name: folder.record.get("labels") for name, folder in read.items()})
    torch.manual_seed(seed)
    model = load_model(
        path, quantization=quantization, dtype=dtype, device=device, task=task, labels=_as_names(labels, task)
    )
    for name, folder in adapters.items():
        load_adapter(model, folder, name)
    if adapters:
        set_adapter(model, None)
    opened = Opened(model, load_tokenizer(path), list(adapters), task_of(model), labels=labels)
    if opened.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        opened.formats = _formats(opened, {name: folder.record.get("text_format") for name, folder in read.items()})
    return opened


def writers(opened: Opened) -> list[str | None]:
    """Who answers a prompt: every adapter, else the base.

    Raises  RequestError where the model classifies and writes nothing
    """
    if not opened.formats:
        raise RequestError(f"this is a {opened.task} model, which writes no text; try it with lofi evaluate --data")
    return list(opened.adapters) or [None]


def _formats(opened: Opened, stored: Mapping[str, Any]) -> dict[str, Any]:
    from lofi.data.format import TextFormat

    own = TextFormat.for_tokenizer(opened.tokenizer, seq2seq=opened.task == "SEQ_2_SEQ_LM")
    rules = {name: TextFormat.from_dict(rule, opened.tokenizer) if rule else own for name, rule in stored.items()}
    return {"base": own} | rules


def _agreed(what: str, by_name: Mapping[str, Any]) -> Any:
    """The one value of all adapters."""
    values = list(by_name.values())
    if any(value != values[0] for value in values):
        told = ", ".join(f"{name}: {value}" for name, value in by_name.items())
        raise RequestError(f"the adapters do not share one {what} ({told}); ask them one at a time")
    return values[0] if values else None


def _as_names(labels: Any, task: str | None) -> list[str] | None:
    return [str(label) for label in labels] if labels and task in ("SEQ_CLS", "TOKEN_CLS") else None
