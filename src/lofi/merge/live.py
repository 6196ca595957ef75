"""A base with an adapter on it, asked what an adapter made from that one says in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lofi.adapters.registry import adapter_of, adapter_tensors, load_adapter_tensors
from lofi.adapters.switch import adapters_off, set_adapter
from lofi.files.adapter_folder import AdapterFolder, load_adapter
from lofi.files.golden import make_golden
from lofi.files.peft_format import from_file, slots
from lofi.merge.probes import Probes, data_probes, random_probes
from lofi.merge.source import NAME, Source, base_folder
from lofi.merge.verdict import Measured, Verdict, judge, measure


@dataclass(frozen=True)
class Live:
    """The base with a LoRA adapter on it, and what both say to the probes."""

    model: Any
    read: AdapterFolder
    probes: Probes
    alone: Measured
    adapted: Measured

    @classmethod
    def open(
        cls, base: str | Path, read: AdapterFolder, data: str | Path | None, columns: Mapping[str, str] | None
    ) -> Live:
        """Open the base as the adapter was trained on it, where that can be had, and ask it the probes.

        Raises  ModelError; DataError; ProofError for another base than the adapter's
        """
        from lofi.models.folder import read_config
        from lofi.models.quantization import held_kind

        folder = base_folder(base)
        source = Source(folder, read, held_kind(read_config(folder).get("quantization_config"), str(folder)))
        model = source.open("dequantized" if source.has_both else "auto")
        if data is None:
            probes = random_probes(model)
        else:
            probes = data_probes(data, folder, task=read.config.task_type, record=read.record, columns=columns)
        with adapters_off(model):
            alone = measure(model, probes)
        return cls(model, read, probes, alone, measure(model, probes))

    def with_tensors(self, stored: Mapping[str, Tensor]) -> Verdict:
        """The verdict with other values in the adapter's place, given as its file holds them; it is then as it was."""
        now = adapter_tensors(self.model, NAME)
        before = {key: tensor.detach().clone() for key, tensor in now.items()}
        table = slots(adapter_of(self.model, NAME), self.model)
        values = {key: from_file(slot, stored[slot.key], now[key]) for key, slot in table.items()}
        load_adapter_tensors(self.model, NAME, values)
        try:
            return judge(self.alone, self.adapted, measure(self.model, self.probes), self.probes)
        finally:
            load_adapter_tensors(self.model, NAME, before)

    def judged(self, folder: Path, name: str) -> tuple[Verdict, Any]:
        """The verdict on another adapter folder, loaded beside the adapter, and the golden prompts asked of it."""
        load_adapter(self.model, folder, name)
        set_adapter(self.model, name)
        verdict = judge(self.alone, self.adapted, measure(self.model, self.probes), self.probes)
        return verdict, golden_again(self.model, self.read.record.get("golden"))


def golden_again(model: Any, golden: Mapping[str, Any] | None) -> Any:
    """The prompts of a golden record asked anew of the model as it stands; None where there were none."""
    if not golden:
        return None
    prompts = golden["prompts"]
    texts = [prompt["text"] for prompt in prompts] if all("text" in prompt for prompt in prompts) else None
    steps = {"max_new_tokens": golden["max_new_tokens"]} if golden["max_new_tokens"] else {}
    return make_golden(model, [prompt["ids"] for prompt in prompts], texts=texts, stop_ids=golden["stop_ids"], **steps)
