"""Who the base is: its architecture's numbers and a sample of every tensor, so that another base is noticed and named.

The sample is a few evenly spaced values of each tensor in bfloat16, compared with a tolerance of one step: the same
checkpoint loaded as bf16, fp16 or fp32 is the same base. Fields that do not change the function (dtype, cache, paths,
labels, dropout) are not part of it, and a quantized weight is described by its dense origin: name, shape, and the
sample that was taken when it was quantized ("" where nobody took one). Rejected: hashing the files (minutes for a large
base, and a re-sharded or re-cast copy would be refused) and an exact digest (rounding fp32 to fp16 to bf16 moves one
value in sixteen by a step).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
from torch import Tensor, nn

from lofi.adapters.linear import product_of
from lofi.adapters.registry import adapters_of, base_state
from lofi.adapters.surgery import named_base_modules
from lofi.files.quantized import packed_weights
from lofi.quant.origin import SMALLEST, sample

_ONE_STEP_SHARE = 0.15  # double rounding moves about 1/16 of the values by one step; other weights move most of them
_IGNORED = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "dtype", "eos_token_id",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_factor", "initializer_range", "keys_to_ignore_at_inference", "label2id", "mask_token_id",
    "max_length", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "router_aux_loss_coef", "sep_token_id", "suppress_tokens", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache",
}


def base_fingerprint(model: nn.Module, *, exclude: Iterable[str] = ()) -> dict[str, Any]:
    """Describe the frozen base of a model as plain JSON values, without its adapters.

    Left out: tensors whose name begins with one of `exclude`, newly initialised task heads (`model.lofi_new_tensors`)
    and modules that an adapter replaces by a trained copy; their names are listed under "excluded".
    Exact   the same checkpoint gives a fingerprint without `compare` reasons whatever dtype it is loaded in, dense or
            quantized
    """
    packed, scales, turned = _packed(model)
    heads = sorted({*exclude, *getattr(model, "lofi_new_tensors", ()), *_copied_modules(model)})
    tensors: dict[str, str] = {}  # "53x24 <base64>": one line each in the record
    for name, tensor in base_state(model).items():
        if not _under(name, heads) and name not in scales:
            shape, values = packed[name] if name in packed else _described(tensor, name in turned)
            tensors[name] = f"{'x'.join(map(str, shape))} {values}"
    record = {"architecture": architecture(model), "tensors": tensors, "excluded": heads}
    return {**record, "digest": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}


def architecture(model: nn.Module) -> dict[str, Any]:
    """The fields of a model's config that change its function, nested ones with dots; without config its class."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {"class": type(model).__name__}
    return dict(sorted(_flatten(json.loads(json.dumps(config.to_dict(), default=str)))))


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Reasons why `b` (the base at hand) is not `a` (the base on record), in words; [] if it is the same.

    Fields that only one side has are ignored: releases of transformers add some. A tensor whose values one side does
    not know is compared by its shape.
    """
    excluded = [*a.get("excluded", ()), *b.get("excluded", ())]
    mine = {k: v.split(" ") for k, v in a["tensors"].items() if not _under(k, excluded)}
    yours = {k: v.split(" ") for k, v in b["tensors"].items() if not _under(k, excluded)}
    reasons = _field_reasons(a["architecture"], b["architecture"])
    reasons += _name_reasons(mine, yours)
    common = [name for name in mine if name in yours]
    shapes = [n for n in common if mine[n][0] != yours[n][0]]
    if shapes:
        first = shapes[0]
        reasons.append(f"{_of(shapes, common)} other shapes, first: {first} {yours[first][0]} against {mine[first][0]}")
    same_shape = [n for n in common if n not in set(shapes)]
    changed = _changed(mine, yours, same_shape)
    if changed:
        what = "same shapes, other weights" if not reasons else "other weights"
        reasons.append(f"{what}: {_of(changed, same_shape)} differ, first: {changed[0]}")
    return reasons


_Described = tuple[tuple[int, ...], str]


def _described(tensor: Tensor, turned: bool) -> _Described:
    """(shape, sample) of a dense tensor; one stored (I, O) as the (O, I) that it would be packed as."""
    tensor = tensor.t() if turned else tensor
    return tuple(tensor.shape), sample(tensor)


def _packed(model: nn.Module) -> tuple[dict[str, _Described], set[str], set[str]]:
    """(each quantized weight's dense origin, the tensors that scale one, the dense weights that are stored (I, O))."""
    weights = packed_weights(model)
    packed = {weight.full_name: (weight.shape, weight.sample) for weight in weights}
    scales = {name for weight in weights for name in weight.scales}
    turned = {
        f"{path}.weight"
        for path, module in named_base_modules(model)
        if (product := product_of(module)) is not None and product.transposed
    }
    return packed, scales, turned


def _of(some: list[str], of: list[str]) -> str:
    return f"{len(some)} of {len(of)} tensors"


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def _copied_modules(model: nn.Module) -> list[str]:
    held = adapters_of(model).values()
    return [path for adapter in held for path, part in adapter.parts.items() if part.kind == "copy"]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    for key, value in config.items():
        if key in _IGNORED or "dropout" in key or key.startswith("_") or key.endswith("_pdrop"):
            continue
        if isinstance(value, dict):
            fields += _flatten(value, f"{prefix}{key}.")
        else:
            fields.append((prefix + key, value))
    return fields


def _field_reasons(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [f"{key} {b[key]} against {a[key]}" for key in a if key in b and a[key] != b[key]]


def _name_reasons(mine: Mapping[str, Any], yours: Mapping[str, Any]) -> list[str]:
    missing, extra = [n for n in mine if n not in yours], [n for n in yours if n not in mine]
    reasons = [f"{len(missing)} tensors are not in this base, first: {missing[0]}"] if missing else []
    return reasons + ([f"{len(extra)} tensors of this base are new, first: {extra[0]}"] if extra else [])


def _steps(sample: str) -> numpy.ndarray:
    """The sampled values as positions on the ladder of bfloat16 numbers, so that neighbours differ by one."""
    bits = numpy.frombuffer(base64.b64decode(sample), dtype=numpy.int16).astype(numpy.int64)
    return numpy.where(bits < 0, -(bits & 0x7FFF), bits)


def _changed(mine: Mapping[str, Any], yours: Mapping[str, Any], names: list[str]) -> list[str]:
    far: list[str] = []
    near: list[str] = []
    moved = total = 0
    for name in names:
        if not (mine[name][1] and yours[name][1]):
            continue  # one side's values are not known: a folder that was quantized elsewhere
        if mine[name][1] != yours[name][1]:
            gap = numpy.abs(_steps(mine[name][1]) - _steps(yours[name][1]))
            # zero stands for everything below SMALLEST, whose own step is one as well
            far += [name] if bool((_off_floor(gap) > 1).any()) else []
            near.append(name)
            moved += int((gap == 1).sum())
        total += len(_steps(mine[name][1]))
    return far or (near if moved > _ONE_STEP_SHARE * total else [])


_FLOOR = int(numpy.float32(SMALLEST).view(numpy.int32)) >> 16


def _off_floor(gap: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(gap >= _FLOOR, gap - _FLOOR + 1, gap)
