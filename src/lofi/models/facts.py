"""What a transformers model is: its task, its heads, which names share one tensor, what could be adapted.

Read-only: no function here changes the model. Does not know files (load.py) or adapters.
"""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lofi.errors import ModelError

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
_SUFFIX = {  # of transformers' class names; the auto mappings miss remote and composite classes
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def class_task(class_name: str, seq2seq: bool) -> str | None:
    """The task that a transformers class name stands for; None for classes that lofi does not train (BertModel)."""
    for suffix, task in _SUFFIX.items():
        if class_name.endswith(suffix):
            return task
    if class_name.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
        return "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if seq2seq and class_name.endswith("MTModel") else None


def check_task(task: str) -> str:
    """The task itself if it is one of TASKS; ModelError naming the nearest otherwise."""
    if task in TASKS:
        return task
    near = get_close_matches(str(task).upper(), TASKS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASKS)}."
    raise ModelError(f"task '{task}' is not known; {hint}")


def task_of(model: nn.Module) -> str:
    """CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS; ModelError for a model of another kind."""
    name = type(model).__name__
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    task = class_task(name, seq2seq)
    if task is None:
        raise ModelError(f"a {name} has none of the tasks {', '.join(TASKS)}; load it with task=... to give it a head")
    return task


def backbone(model: nn.Module) -> nn.Module:
    """The part that makes hidden states: everything but the task head (the model itself where it has none)."""
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


def head_names(model: nn.Module) -> list[str]:
    """Module paths of a classification model's head, to be trained in full beside an adapter; [] for language models.

    Every child outside the backbone that has parameters ("classifier", "score", "pre_classifier", "pooler"; PEFT's
    default covers the first two), and the owners of tensors that loading had to initialise ("bert.pooler.dense").
    """
    if task_of(model) not in ("SEQ_CLS", "TOKEN_CLS"):
        return []
    body = backbone(model)
    outside = [(name, child) for name, child in model.named_children() if child is not body]
    names = [name for name, child in outside if next(child.parameters(), None) is not None]
    for tensor in getattr(model, "lofi_new_tensors", []):
        owner = tensor.rpartition(".")[0]
        if not any(owner == name or owner.startswith(name + ".") for name in names):
            names.append(owner)
    return names


def output_head_name(model: Any) -> str | None:
    """Module path of the language-model head ("lm_head", "cls.predictions.decoder"), None where there is none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def twin_tokens(model: nn.Module, token: int, *, within: float = 0.05) -> int:
    """How many other tokens have nearly the same row in the output head: ||W_j - W_t|| < within ||W_t||.

    Tokens that pretraining never saw keep one common row (rows of tokens that it saw are about their own norm apart).
    Hardly any hidden state prefers one of them, so an answer that must end in such a token does not end while that row
    is frozen. 0 for a model without an output head.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        return 0
    wanted = head.weight.detach()[token].float()  # (D,)
    limit = within * wanted.norm()
    near = sum(int(((rows.float() - wanted).norm(dim=1) < limit).sum()) for rows in head.weight.detach().split(4096))
    return near - 1


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that share one tensor, e.g. [["lm_head.weight", "model.embed_tokens.weight"]]."""
    groups: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_identity(parameter), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def _identity(parameter: Tensor) -> Any:
    if parameter.device.type == "meta" or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr(), tuple(parameter.shape), parameter.stride()


def linear_counts(model: nn.Module) -> dict[tuple[str, str], int]:
    """How often each kind of two-dimensional weight occurs: ("q_proj", "4096 x 1024 Linear") -> 32, in model order.

    A packed weight counts with the shape that its codes stand for.
    """
    found: Counter[tuple[str, str]] = Counter()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        shape = getattr(module, "packed_shapes", {}).get("weight", getattr(weight, "shape", ()))
        if isinstance(weight, Tensor) and len(shape) == 2:
            found[path.rpartition(".")[2], f"{shape[0]} x {shape[1]} {type(module).__name__}"] += 1
    return dict(found)
