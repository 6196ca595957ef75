"""Writing a merged model as a folder: the base's files key by key where that can be, else through transformers.

Beside the weights goes every file of the base that holds none: tokenizer, chat template, generation config.
"""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

from lofi.adapters.merge import merge_in_memory
from lofi.files.layout import read_header
from lofi.files.quantized import in_words, quantization_of
from lofi.merge.packed import unpack
from lofi.merge.shards import changes, plan_shards, weight_files, write_shards
from lofi.merge.source import NAME

_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack"),
    *("*.onnx", "*.gguf", "*.ot", "README.md", ".*", "training_args.*", "lofi.json", "lofi_*.json"),
)


def write_dense(model: Any, folder: Path, aside: Path) -> tuple[str, int, list[str]]:
    """Write the base at `folder`, open as `model` with the adapter on it, merged and dense; the model may be consumed.

    Returns the road taken, how many tensors changed, and what there is to say.
    """
    held = quantization_of(model)
    plan = plan_shards(model, NAME, folder) if held is None else None
    if plan is not None:
        changed = write_shards(plan, folder, aside)
        copy_rest(folder, aside, keep=())
        return "shard by shard", changed, []
    changed = len(changes(model, NAME))
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    merged: Any = unpack(merge_in_memory(model, NAME, inplace=True))
    save_model(merged, folder, aside)
    notes = _cast_notes(folder, aside)
    if tied and not getattr(merged.config, "tie_word_embeddings", False):
        notes.insert(0, "the adapter parted weights that were tied: both are written and tie_word_embeddings is false")
    if held is not None:
        return f"onto the dequantized weights of {in_words(held)}", changed, notes
    return "through the loaded model, whose files hold these tensors in another form", changed, notes


def save_model(model: Any, folder: Path, aside: Path) -> None:
    """Write an open model, by transformers, with what the base's folder holds beside weights and config."""
    from lofi.models.load import quiet

    with quiet():
        model.save_pretrained(aside)
    copy_rest(folder, aside, keep=("config.json",))


def _cast_notes(folder: Path, aside: Path) -> list[str]:
    """Tensors whose dtype transformers changed while loading the base."""
    before = {e.name: e.dtype for file in weight_files(folder) for e in read_header(file).entries}
    after = {e.name: e.dtype for file in weight_files(aside) for e in read_header(file).entries}
    cast = [name for name in before if name in after and before[name] != after[name]]
    if not cast:
        return []
    first = cast[0]
    return [f"{len(cast)} tensors were cast by transformers, first: {first} from {before[first]} to {after[first]}"]


def copy_rest(folder: Path, aside: Path, *, keep: tuple[str, ...]) -> None:
    """Config, generation config, tokenizer, template: every file of the base that holds no weights."""
    for path in sorted(folder.iterdir()):
        unwanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_COPIED)
        if path.is_file() and not unwanted and path.name not in keep:
            shutil.copyfile(path, aside / path.name)
