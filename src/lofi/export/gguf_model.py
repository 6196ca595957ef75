"""A model folder as one GGUF file for llama.cpp and Ollama, proved before it takes its place.

The folder's safetensors are read one tensor at a time, turned and rounded, written, read back and compared; then the
tokenizer is asked texts by llama.cpp's rules from the file alone, and the model speaks with the file's weights.
Knows the folder. Does not know adapters: merge first, or write the adapter alone (gguf_adapter.py).
Rejected: going through an open transformers model, which needs all of it in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lofi.errors import ModelError
from lofi.export import gguf_file, gguf_proof
from lofi.export.gguf_file import BLOCK, FILE_TYPES, Planned
from lofi.export.gguf_names import Family, Place, family_of, is_ignored, place_of, turned
from lofi.export.gguf_numbers import Numbers, numbers_of
from lofi.export.gguf_report import GgufReport
from lofi.export.gguf_tokenizer import Vocabulary, vocabulary_of
from lofi.export.gguf_tokenizer_proof import prove_tokenizer
from lofi.files.layout import Entry, Header, read_entry, read_header

DTYPES = ("f16", "bf16", "q8_0", "f32")
_READ = {"F32", "F16", "BF16"}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Stored:
    """One tensor of a model folder: its file, where it lies there, and its place in the GGUF file."""

    file: Path
    header: Header
    entry: Entry
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the GGUF file."""
        return tuple(reversed(self.entry.shape)) if self.place.turn == "transpose" else self.entry.shape


@dataclass(frozen=True)
class Opened:
    """A model folder, looked at but not read: family, numbers, and where every tensor lies, by GGUF's name."""

    folder: Path
    family: Family
    config: Any
    numbers: Numbers
    stored: dict[str, Stored]


def write_model_gguf(
    model_folder: str | Path, output: str | Path, *, dtype: str = "f16", name: str | None = None
) -> GgufReport:
    """Write a model folder (dense, of a supported family) as one GGUF file.

    Dtypes  matrices in `dtype` (f16, bf16, q8_0 or f32), rounded once; vectors and positions in float32. In a q8_0 file
            a matrix whose rows 32 does not divide is f16, which the report says
    Memory  one tensor and its rounding; for the last proof the model in float32, left out where it does not fit
    Raises  RequestError (no gguf package, dtype, output), ModelError for a family, number, tensor or tokenizer that
            cannot be written exactly; ProofError when the file is not the model. What was at `output` is then unchanged
    """
    gguf_file.package()
    gguf_file.check_dtype(dtype, DTYPES)
    opened = open_folder(model_folder)
    words = _vocabulary(opened)
    plan = _plan(opened, dtype)
    values = _values(opened, words, dtype, words.name(name or opened.folder.resolve().name))
    with gguf_file.into_place(output) as aside, Reader(opened) as reader:
        gguf_file.write(aside, opened.family.architecture, values, plan, reader.turned)
        read = gguf_file.read(aside)
        gguf_proof.prove_values(read, values, str(output))
        rounding = gguf_proof.prove_tensors(read, plan, reader.source, opened.numbers.heads, str(output))
        prove_tokenizer(read, _tokenizer(opened.folder), words, str(output))
        agreement = _agreement(opened, read)
        size = aside.stat().st_size
    kept = tuple(p.name for p in plan if dtype == "q8_0" and p.dtype == "f16")
    notes = (*opened.numbers.notes, *words.notes)
    what = str(output), str(model_folder), "model", opened.family.architecture, dtype, len(plan), size
    return GgufReport(*what, rounding, kept, agreement, words.kind, notes)


def open_folder(model_folder: str | Path) -> Opened:
    """Look at a model folder: nothing is read but headers and the config.

    Raises  ModelError for a family that is not supported, a quantized base, or tensors that are not the family's
    """
    from lofi.merge.shards import weight_files
    from lofi.merge.source import base_folder
    from lofi.models.folder import check_weights, read_config

    folder = base_folder(model_folder)
    raw = read_config(folder)
    family = family_of(raw, str(model_folder))
    if raw.get("quantization_config"):
        raise ModelError(
            f"{model_folder} is quantized, and GGUF is written from dense weights; give the dense model, or write one "
            "with lofi merge --into dense"
        )
    check_weights(folder)
    config = _config(folder)
    numbers = numbers_of(family, config, str(model_folder))
    stored = {}
    for file in weight_files(folder):
        header = read_header(file)
        for entry in header.entries:
            if not _is_left_out(family, config, entry.name):
                one = Stored(file, header, entry, _placed(family, entry, str(model_folder)))
                stored[one.place.name] = one
    _check_complete(family, config, stored, str(model_folder))
    return Opened(folder, family, config, numbers, stored)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _is_left_out(family: Family, config: Any, key: str) -> bool:
    """Buffers, and the head of a tied model, which is the embedding."""
    return is_ignored(family, key) or (key == "lm_head.weight" and bool(config.tie_word_embeddings))


def _placed(family: Family, entry: Entry, where: str) -> Place:
    place = place_of(family, entry.name)
    if place is None:
        raise ModelError(
            f"{where} holds {entry.name}, which llama.cpp's {family.architecture} has no place for; export a plain "
            f"{family.model_class}"
        )
    if entry.dtype not in _READ:
        raise ModelError(
            f"{where}: {entry.name} is {entry.dtype}, GGUF is written from {', '.join(sorted(_READ))}; save it as one"
        )
    return place


def _check_complete(family: Family, config: Any, stored: dict[str, Stored], where: str) -> None:
    """Compare the folder's tensors with those of the empty model, name by name and shape by shape."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    faults = []
    for name, parameter in model.named_parameters():
        place = place_of(family, name)
        if place is None:
            faults.append(f"{name} has no place in llama.cpp's {family.architecture}")
        elif place.name not in stored:
            faults.append(f"{name} is missing")
        elif stored[place.name].entry.shape != tuple(parameter.shape):
            shape = list(stored[place.name].entry.shape)
            faults.append(f"{name} is {shape}, the config says {list(parameter.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ModelError(f"{where} is not the model that its config says: {'; '.join(faults[:3])}{more}; save it again")


class Reader(contextlib.ExitStack):
    """Gives the tensors of an open folder by GGUF's names, one at a time; a context that holds the files open."""

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.opened = opened
        paths = dict.fromkeys(one.file for one in opened.stored.values())
        self.handles: dict[Path, BinaryIO] = {path: self.enter_context(path.open("rb")) for path in paths}

    def source(self, name: str) -> tuple[Tensor, str]:
        """A tensor as the folder holds it, and its turn."""
        made = self.opened.numbers.tensors.get(name)
        if made is not None:
            return made, ""
        one = self.opened.stored[name]
        return read_entry(self.handles[one.file], one.header, one.entry), one.place.turn

    def turned(self, name: str) -> Tensor:
        """A tensor as llama.cpp keeps it."""
        tensor, turn = self.source(name)
        return turned(tensor, turn, self.opened.numbers.heads)


def _plan(opened: Opened, dtype: str) -> list[Planned]:
    made = [Planned(name, tuple(t.shape), "f32") for name, t in opened.numbers.tensors.items()]
    return made + [Planned(n, one.shape, _dtype(n, one.shape, dtype)) for n, one in opened.stored.items()]


def _dtype(name: str, shape: Sequence[int], dtype: str) -> str:
    if len(shape) == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


def _tokenizer(folder: Path) -> Any:
    from lofi.models.load import load_tokenizer

    return load_tokenizer(folder)


def _vocabulary(opened: Opened) -> Vocabulary:
    rows = opened.stored["token_embd.weight"].entry.shape[0]
    return vocabulary_of(_tokenizer(opened.folder), rows, _ends(opened), str(opened.folder))


def _ends(opened: Opened) -> list[int]:
    """The ids that end an answer: the generation config's, else the config's."""
    file = opened.folder / "generation_config.json"
    held = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    held = opened.config.eos_token_id if held is None else held
    return [int(i) for i in (held if isinstance(held, list) else [held]) if i is not None]


def _values(opened: Opened, words: Vocabulary, dtype: str, name: str) -> dict[str, Any]:
    return {
        "general.architecture": opened.family.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{opened.family.architecture}.{key}": value for key, value in opened.numbers.values.items()},
        **words.values,
    }


def _agreement(opened: Opened, read: gguf_file.Read) -> gguf_proof.Agreement | None:
    parameters = sum(torch.Size(one.shape).numel() for one in opened.stored.values())
    if not gguf_proof.fits(parameters):
        return None
    return gguf_proof.agreement(opened.folder, read, opened.family, opened.numbers.heads)
