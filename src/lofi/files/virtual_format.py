"""PEFT's folders of prefix and prompt tuning, in words: adapter_config.json, and the one tensor `prompt_embeddings`.

    PREFIX_TUNING   (P, 2 L H K): layer by layer its keys, then its values, the reparametrising MLP already applied
    PROMPT_TUNING   (P, D)
    base_model.<path>.<tensor>   modules trained in full (task heads), without the "model." of other PEFT folders

Knows which of PEFT's keys only say where training started or repeat the model's shape. PEFT 0.21 reads an
encoder-decoder's prefix wrongly (layer i gets pair 2 i modulo L, so half of the file twice), so those folders have a
type of lofi's own, which PEFT refuses. Does not read or write files.
Source: the files that PEFT 0.21.2 writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lofi.adapters.config import TASK_TYPES, AdapterConfig
from lofi.adapters.methods import PrefixConfig, PromptConfig
from lofi.adapters.registry import Adapter
from lofi.errors import AdapterFileError, RecipeError
from lofi.files.peft_format import PEFT_VERSION, Slot

PREFIX = "base_model."
TENSOR = "prompt_embeddings"
OWN_PREFIX = "LOFI_PREFIX_TUNING"
_CONFIGS: dict[str, Any] = {"PREFIX_TUNING": PrefixConfig, "PROMPT_TUNING": PromptConfig, OWN_PREFIX: PrefixConfig}
# what says nothing about what the adapter computes: the folder, the machine, the start, shapes that the tensor has too
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "runtime_config", "encoder_hidden_size", "prefix_projection", "init_weights", "num_attention_heads", "num_layers",
    "token_dim", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip
_READ = {"task_type", "modules_to_save", "num_virtual_tokens", "num_transformer_submodules"}


def to_record(adapter: Adapter, *, base_path: str | None = None) -> dict[str, Any]:
    """adapter_config.json of an attached adapter: PEFT 0.21's keys, the MLP and the start left out."""
    owner = _owner(adapter)[1]
    kind = adapter.config.peft_type
    pair = adapter.config.task_type == "SEQ_2_SEQ_LM"
    record: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "modules_to_save": sorted(p for p, part in adapter.parts.items() if part.kind == "copy") or None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": owner.length,
        "peft_type": OWN_PREFIX if pair and kind == "PREFIX_TUNING" else kind,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": adapter.config.task_type,
        **owner.shapes(),
    }
    if kind == "PREFIX_TUNING":
        record |= {"encoder_hidden_size": record["token_dim"], "init_weights": None, "prefix_projection": False}
    else:
        record |= dict.fromkeys(("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"))
        record |= {"prompt_tuning_init": "RANDOM"}
    return dict(sorted(record.items()))


def _owner(adapter: Adapter) -> tuple[str, Any]:
    return next((path, part) for path, part in adapter.parts.items() if TENSOR in part.exported())


def from_record(record: Mapping[str, Any], where: str) -> tuple[AdapterConfig, list[str]]:
    """The config that an adapter_config.json holds, and notes on keys that are not in use.

    Raises  AdapterFileError for a key in use that lofi does not know, and for the second prompt of an encoder-decoder
    """
    unknown = {k: v for k, v in record.items() if k not in _NEUTRAL | _READ}
    used = [f"{key} is {value!r}" for key, value in unknown.items() if value not in (None, False, {}, [], "")]
    if used:
        raise AdapterFileError(
            f"{where} asks for what lofi does not know: {'; '.join(used)}; train the adapter with lofi instead"
        )
    _refuse_second_prompt(record, where)
    notes = [f"unknown key {key!r} is not in use ({unknown[key]!r}) and was left out" for key in unknown]
    task = record.get("task_type")
    if task not in (None, *TASK_TYPES):
        notes.append(f"task_type {task!r} is not one of lofi's; the model's class decides")
        task = None
    given = {"task_type": task, "modules_to_save": record.get("modules_to_save")}
    try:
        config = _CONFIGS[record["peft_type"]](num_virtual_tokens=record.get("num_virtual_tokens"), **given)
    except (RecipeError, TypeError) as error:
        raise AdapterFileError(f"{where} is not a usable {record['peft_type']} config: {error}") from None
    return config.finished(), notes


def _refuse_second_prompt(record: Mapping[str, Any], where: str) -> None:
    pair = record.get("task_type") == "SEQ_2_SEQ_LM"
    count = record.get("num_transformer_submodules") or (2 if pair else 1)
    if record["peft_type"] == "PREFIX_TUNING" and (count != 1 or pair):
        raise AdapterFileError(
            f"{where} is a prefix for an encoder-decoder, of which PEFT reads every other layer twice, so it cannot be "
            "run as it was trained; train it again with lofi"
        )
    if count != 1:
        raise AdapterFileError(
            f"{where} has num_transformer_submodules {count!r}, but lofi gives virtual tokens to one of encoder and "
            "decoder, as PEFT's forward does; train it in PEFT with num_transformer_submodules=1"
        )


def explicit_copies(config: AdapterConfig, keys: Iterable[str]) -> AdapterConfig:
    """The config with modules_to_save as the full paths that the file's keys hold."""
    wanted = tuple(config.modules_to_save or ())
    found = set()
    for key in keys:
        pieces = key.removeprefix(PREFIX).split(".")
        heads = [".".join(pieces[:n]) for n in range(1, len(pieces))]
        found |= set([head for head in heads if wanted and head.endswith(wanted)][:1])
    return replace(config, modules_to_save=sorted(found) or None)


def slots(adapter: Adapter, model: nn.Module) -> dict[str, Slot]:
    """For every exported tensor of an attached adapter, its place in the file."""
    table = {f"{_owner(adapter)[0]}.{TENSOR}": Slot(TENSOR, "plain")}
    for path, part in adapter.parts.items():
        if part.kind == "copy":
            names = ((name, name.removeprefix("copy.")) for name in part.exported())
            table |= {f"{path}.{name}": Slot(f"{PREFIX}{path}.{plain}", "plain") for name, plain in names}
    return table
