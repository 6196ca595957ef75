"""What is merged: a base folder and an adapter folder, opened anew for each form that is tried.

Knows how the base is held (dense, nf4, int8) and on what the adapter was trained. Opening maps the files, so a base
that is opened again costs what the merge changes, not its size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.errors import LofiWarning, ModelError, RequestError
from lofi.files.adapter_folder import AdapterFolder, load_adapter
from lofi.merge.probes import Probes
from lofi.merge.verdict import Measured, measure

NAME = "merged"
_MADE = ("nf4", "int8")  # what a dense base can be quantized to again; fp4 is only read


@dataclass(frozen=True)
class Source:
    """A base and an adapter that is to be merged into it."""

    folder: Path
    read: AdapterFolder
    held: str | None
    """How the folder's weights are quantized, None for a dense base."""

    @property
    def trained_on(self) -> str | None:
        """How the base was quantized that the adapter was trained on, as far as its record says."""
        return (self.read.record.get("base") or {}).get("quantization")

    @property
    def has_both(self) -> bool:
        """Whether the update can go onto the original weights and onto the dequantized ones."""
        return self.held is None and self.trained_on in _MADE

    def quantization(self, onto: str) -> str | None:
        """What the folder's weights are to be quantized to while they load.

        Raises  RequestError where the weights asked for cannot be had
        """
        if onto == "original" and self.held is not None:
            raise RequestError(
                f"onto is original, but {self.folder} holds {self.held} weights, of which the originals are gone; "
                "give the dense base, or leave onto out"
            )
        if onto == "dequantized" and self.held is None:
            if self.trained_on not in _MADE:
                raise RequestError(
                    f"onto is dequantized, but {self.folder} is dense and the adapter was not trained on an nf4 or "
                    "int8 base; leave onto out"
                )
            return self.trained_on
        return None

    def open(self, onto: str = "auto") -> Any:
        """The base with the adapter on it, in the base's own dtype, on the CPU."""
        from lofi.models.load import load_model

        model = load_model(self.folder, self.quantization(onto), device="cpu", **_task_options(self.read))
        with warnings.catch_warnings():
            if self.has_both:  # the report says which weights the figures are of
                warnings.filterwarnings("ignore", ".* was trained on an? .*base", LofiWarning)
            load_adapter(model, self.read.path, NAME)
        return model

    def measure(self, probes: Probes) -> tuple[Measured, Measured]:
        """What base, and base + adapter, say; as the adapter was trained where that can be had."""
        from lofi.adapters.switch import adapters_off

        model = self.open("dequantized" if self.has_both else "auto")
        with adapters_off(model):
            alone = measure(model, probes)
        return alone, measure(model, probes)

    def measure_merged(self, folder: Path, probes: Probes) -> Measured:
        """What the model in `folder` says, opened from its files."""
        from lofi.models.load import load_model

        merged = load_model(folder, device="cpu", task=self.read.config.task_type)
        if merged.lofi_new_tensors:
            raise ModelError(f"the merged model lacks {', '.join(merged.lofi_new_tensors)}; please report this")
        return measure(merged, probes)


def base_folder(base_path: str | Path) -> Path:
    """The folder of a base, fetched from the hub where it is an id; ModelError if there is none."""
    from lofi.models.folder import local_folder

    folder = local_folder(base_path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors*", "*.json", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(base_path), allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"{base_path} is no folder and could not be fetched from the hub ({error})") from error


def _task_options(read: AdapterFolder) -> dict[str, Any]:
    task, labels = read.config.task_type, read.record.get("labels")
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {"task": task}
    if labels:
        return {"task": task, "labels": [str(label) for label in labels]}
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    rows = next((len(t) for key, t in read.tensors.items() if key.endswith(heads)), None)
    return {"task": task, "num_labels": rows}
