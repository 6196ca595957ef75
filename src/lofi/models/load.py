"""Opening a transformers model or tokenizer, strictly: what came from the file, what is new, and nothing in between.

`folder.py` looks at the folder first, so local folders fail with a sentence and never touch the network. Hub ids go
through from_pretrained. Does not know adapters, or how a quantized model is filled (quantizer.py). Rejected:
transformers' leniency about missing and unexpected tensors; only a classification head may be new, and
`model.lofi_new_tensors` says that it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lofi.errors import ModelError
from lofi.models.dtypes import parse_dtype, resolve_device
from lofi.models.facts import TASKS, backbone, check_task, class_task, task_of
from lofi.models.folder import check_weights, local_folder, read_config

_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_NOT_LEARNED = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_model(
    path: str | Path,
    quantization: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    task: str | None = None,
    num_labels: int | None = None,
    device_map: Any = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """Load a model folder or hub id as a transformers model in evaluation mode.

    `task`: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, or None for what the config says. `dtype` "auto" is the
    checkpoint's own; bf16, fp16, fp32 or a torch dtype convert. `device` "auto" is cuda, else mps, else cpu.
    `quantization` "nf4", "int8" or a config (lofi.NF4Config, lofi.Int8Config) packs the linear layers while they are
    read; products are then in `dtype`, or in what the config says. A folder that is packed already (bitsandbytes' nf4,
    fp4, int8) loads as it is, by memory map; `model.lofi_quantization` says which it is, None for a dense model.
    `labels` names the classes of a classification head (or `num_labels` counts them). Tensors of a head that the
    checkpoint does not have are initialised from torch's random state and listed in `model.lofi_new_tensors`.
    Raises   ModelError: no such folder or id, an adapter's folder, missing, cut or pickled weights, an unknown
             architecture, a task that the architecture has not, any other missing, unexpected or misshapen tensor,
             weights packed by another library, in another way than asked for, or damaged
    """
    where = _Source.of(path, revision)
    config = where.config()
    task = _task(config, task, path)
    _set_labels(config, task, num_labels, labels)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else parse_dtype(dtype)}
    kind = _set_quantization(config, quantization, options, where.name)
    target = None
    if device_map is None:
        target = resolve_device(device)
    elif str(device) != "auto":
        raise ModelError(f"both device '{device}' and device_map were given; leave one of them out")
    if target is not None and kind is not None and target.type != "cpu":
        device_map, target = {"": target}, None  # each tensor is quantized where it will stay
    if device_map is not None:
        options["device_map"] = device_map
    if where.folder is not None:
        check_weights(where.folder)
    model, info = where.open_model(_HEADS[task], config, options)
    model.lofi_new_tensors = _judge(model, info, task, str(path))
    model.lofi_quantization = kind
    return (model if target is None else model.to(target)).eval()


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """Load the tokenizer of a model folder or hub id; ModelError if it has none."""
    where = _Source.of(path, revision)
    folder = where.folder
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        names = ", ".join(_TOKENIZER_FILES)
        raise ModelError(f"{folder} has no tokenizer (none of {names}); copy it from the base model")
    return where.call("AutoTokenizer", "tokenizer")


def mark_multi_label(model: Any) -> None:
    """Let a sequence classifier answer for each label alone (targets float (N, labels)); this changes its config."""
    if task_of(model) != "SEQ_CLS":
        raise ModelError(f"a {type(model).__name__} cannot take several labels a text; load it with task=SEQ_CLS")
    model.config.problem_type = "multi_label_classification"


class _Source:
    """Where a model comes from: a local folder, or a hub id at a revision."""

    def __init__(self, name: str, folder: Path | None, revision: str | None) -> None:
        self.name, self.folder, self.revision = name, folder, revision

    @classmethod
    def of(cls, path: str | Path, revision: str | None) -> _Source:
        """Look at what `path` is; ModelError if it is nothing, or a folder with a revision."""
        folder = local_folder(path)
        if folder is not None and revision is not None:
            raise ModelError(f"{folder} is a folder, which has no revision '{revision}'; leave it out or give a hub id")
        return cls(str(folder or path), folder, revision)

    def config(self) -> Any:
        """The transformers config, after the refusals that only the raw file can tell."""
        if self.folder is not None:
            read_config(self.folder)
        else:
            self._refuse_adapter()
        return self.call("AutoConfig", "config")

    def open_model(self, auto: str, config: Any, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        return self.call(auto, "model", config=config, **options)

    def call(self, auto: str, what: str, **options: Any) -> Any:
        """transformers' `auto`.from_pretrained, quiet, without remote code, its errors as one ModelError."""
        import transformers

        if self.revision is not None:
            options["revision"] = self.revision
        try:
            with quiet():
                return getattr(transformers, auto).from_pretrained(
                    self.name, local_files_only=self.folder is not None, trust_remote_code=False, **options
                )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(self._sentence(what, error)) from error

    def _refuse_adapter(self) -> None:
        from transformers.utils import find_adapter_config_file

        try:
            found = find_adapter_config_file(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ModelError(self._sentence("config", error)) from error
        if found is not None:
            raise ModelError(
                f"{self.name} is an adapter, not a model; give its base as the model and it with --adapter"
            )

    def _sentence(self, what: str, error: Exception) -> str:
        told = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if "model type" in str(error) or "Unrecognized model" in str(error):
            return f"{self.name} is of an architecture that this transformers does not know; update it ({told})"
        if "trust_remote_code" in str(error):
            return f"{self.name} needs code of its own, which lofi does not run; use a model that transformers knows"
        if self.folder is not None:
            return f"the {what} in {self.name} cannot be opened ({told}); fetch it again"
        return (
            f"{self.name} is no folder, and as a hub id its {what} cannot be fetched; check name and network ({told})"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report and bar: what they say is judged and said by this room."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level, bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _set_quantization(config: Any, asked: Any, options: dict[str, Any], where: str) -> str | None:
    """Tell from_pretrained, through its options or the config, what is to be packed or is; the kind, None for dense."""
    raw = getattr(config, "quantization_config", None)
    if asked is None and not raw:
        return None
    from lofi.models.quantization import asked_config, computing_in, held_kind, reading_config

    wanted, held = asked_config(asked), held_kind(raw, where)
    if held is None:
        options["quantization_config"] = wanted = computing_in(wanted, options["dtype"])
        return wanted.kind
    reading = computing_in(reading_config(raw, held, wanted, where), options["dtype"])
    config.quantization_config = reading.own_dict()
    return held


def _task(config: Any, asked: str | None, path: str | Path) -> str:
    """The task to load for, checked against what the architecture can do."""
    stated = (getattr(config, "architectures", None) or [""])[0]
    if asked is None:
        task = class_task(stated, bool(config.is_encoder_decoder))
        if task is None:
            raise ModelError(
                f"{path} says it is a {stated or 'model without a task'}, which has no task head; "
                f"say what for with task= one of {', '.join(TASKS)}"
            )
    else:
        task = check_task(asked)
    reason = _unfit(config, task)
    if reason is not None:
        raise ModelError(f"{path} is a {stated or config.model_type}, {reason}; choose another model or task")
    return task


def _unfit(config: Any, task: str) -> str | None:
    """Why the architecture cannot do the task, None if it can."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if type(config) not in getattr(transformers, _HEADS[task])._model_mapping:
        return f"which has no {task} head in transformers"
    if task != "CAUSAL_LM":
        return None
    if config.is_encoder_decoder:
        return "an encoder-decoder, whose task is SEQ_2_SEQ_LM, not CAUSAL_LM"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "an encoder that reads in both directions, so it cannot be a CAUSAL_LM"
    return None


def _set_labels(config: Any, task: str, num_labels: int | None, labels: Sequence[str] | None) -> None:
    if num_labels is None and labels is None:
        return
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        raise ModelError(f"labels were given, but the task {task} has none; use task=SEQ_CLS or TOKEN_CLS")
    if labels is None:
        if num_labels < 1:
            raise ModelError(f"num_labels is {num_labels}, but a classifier has at least one; count your labels")
        config.num_labels = num_labels
        return
    names = [str(label) for label in labels]
    if len(set(names)) != len(names) or not names:
        raise ModelError(f"the labels {names} are empty or repeat; name each class once")
    if num_labels is not None and num_labels != len(names):
        raise ModelError(f"num_labels is {num_labels}, but {len(names)} labels were named; leave num_labels out")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _judge(model: nn.Module, info: dict[str, Any], task: str, path: str) -> list[str]:
    """The new tensors of the task head; ModelError listing every other tensor that is missing, extra or misshapen."""
    classifies = task in ("SEQ_CLS", "TOKEN_CLS")
    prefix = getattr(model, "base_model_prefix", "") + "."
    mismatched = {name: (tuple(a), tuple(b)) for name, a, b in info["mismatched_keys"]}

    def in_head(name: str) -> bool:
        return classifies and (not name.startswith(prefix) or ".pooler." in f".{name}")

    faults = [f"missing {n}" for n in sorted(info["missing_keys"]) if not in_head(n) and n not in mismatched]
    faults += [f"{n} is {a}, expected {b}" for n, (a, b) in sorted(mismatched.items()) if not in_head(n)]
    extra = sorted(name for name in info["unexpected_keys"] if not _droppable(model, name, prefix, classifies))
    faults += [f"unexpected {name}" for name in extra]
    faults += list(info["error_msgs"])
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"the weights in {path} do not fit its {type(model).__name__} config: {'; '.join(faults[:5])}{more}; "
            "fetch the model again or correct config.json"
        )
    return sorted({*info["missing_keys"], *mismatched})


def _droppable(model: nn.Module, name: str, prefix: str, classifies: bool) -> bool:
    """May this tensor of the file be left behind? Buffers that nothing learns; another task's head."""
    if _NOT_LEARNED.search(name):
        return True
    inner = name.removeprefix(prefix).partition(".")[0]
    return classifies and (inner == "pooler" or inner not in dict(backbone(model).named_children()))
