"""A merged model whose linears are quantized: each weight W0 + s B A is formed in float32 and rounded once, to codes.

The open model is turned over stage by stage: while one stage's inputs are gathered, the earlier stages already speak
through their codes and the later ones still through base + adapter. Weights that are packed in the same way already and
that the adapter does not change keep their codes. Knows frozen linears and what marks a transformers model as
quantized; the rounding itself is quant/requantize.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.linear import product_of
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapter_of, registry_of
from lofi.errors import ModelError
from lofi.merge.calibration import Calibration, grams, stages
from lofi.merge.packed_experts import pack_experts
from lofi.merge.shards import Change, changes
from lofi.quant.config import COMPUTE_DTYPES
from lofi.quant.linear import FrozenLinear, Int8Linear, NF4Linear
from lofi.quant.origin import sample
from lofi.quant.requantize import requantize_4bit, requantize_int8
from lofi.quant.storage import EightBit, FourBit


@dataclass
class Packed:
    """A merged model with packed weights, how many tensors the merge changed, and what there is to say."""

    model: Any
    changed: int
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def pack_merged(model: Any, name: str, into: str, rounding: str, calibration: Calibration | None) -> Packed:
    """Merge adapter `name` into the model and pack its linears as `into` ("nf4", "int8"); the model is consumed.

    `calibration` is needed for the rounding "compensated".
    Memory  beside the model, one stage's H and one layer's weight in float32 three times
    Raises  ModelError for a model without a linear to quantize
    """
    wanted, config = changes(model, name), _config(model, into)
    twin = _packed_twin(model, config)
    paths = _to_pack(model, twin, config, wanted)
    steps = stages(model, paths, calibration) if calibration is not None and paths else []
    for stage in steps:
        seen = grams(model, stage, calibration) if calibration is not None else {}
        _pack_all(model, name, [path for group in stage for path in group], config, rounding, seen)
    staged = {path for stage in steps for group in stage for path in group}
    unseen = [path for path in paths if path not in staged]
    _pack_all(model, name, unseen, config, rounding, {})
    told = [f"{len(unseen)} linears saw no calibration row and were rounded without it"] if steps and unseen else []
    experts = pack_experts(model, name, twin, wanted, config)
    told += [f"the experts of {experts} layers were rounded to nearest"] if experts and rounding != "nearest" else []
    merge_in_memory(model, name, inplace=True)
    _mark(model, config)
    return Packed(model, len(wanted), [*told, *_left_dense(wanted)])


def unpack(model: Any) -> Any:
    """Every packed weight of the model as a dense one, in place, and nothing left that says quantized."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "packed_shapes"):
            model.set_submodule(path, module.to_dense())
    return settle(model)


def settle(model: Any) -> Any:
    """A model of which some or all packed linears became dense, as its architecture has them, and saying so.

    GPT-2's Conv1D hold their weights (I, O) again. Marks of quantization go where nothing is packed any more.
    """
    twin = _twin(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and (own := _as_in(twin, path, module)) is not module:
            model.set_submodule(path, own)
    if not any(hasattr(module, "packed_shapes") for module in model.modules()):
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
        model.lofi_quantization = None
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers as they are held, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _class(config: Any) -> type[FrozenLinear]:
    return Int8Linear if config.kind == "int8" else NF4Linear


def _config(model: Any, into: str) -> Any:
    """The quantization config of the merged model: the base's own where it is of that kind, else lofi's default."""
    from lofi.models.quantization import asked_config

    held = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if held is not None and held.kind == into:
        return held
    config = asked_config(into)
    dtype = str(model.dtype).removeprefix("torch.")
    return replace(config, compute_dtype=dtype) if dtype in COMPUTE_DTYPES else config


def _to_pack(model: Any, twin: Any, config: Any, wanted: dict[str, Change]) -> list[str]:
    """Paths of the linears whose weights are to be rounded; those that an adapter trained in full stay dense."""
    frozen = [path for path, module in model.named_modules() if isinstance(module, FrozenLinear)]
    paths = frozen or [path for path, module in twin.named_modules() if isinstance(module, FrozenLinear)]
    trained = {key for key, change in wanted.items() if change.part.kind == "copy"}
    return [p for p in paths if f"{p}.weight" not in trained and not _stays(model, p, config, wanted)]


def _stays(model: Any, path: str, config: Any, wanted: dict[str, Change]) -> bool:
    module = model.get_submodule(path)
    kind = getattr(module, "quant_type", getattr(module, "kind", None)) if isinstance(module, FrozenLinear) else None
    return kind == config.kind and f"{path}.weight" not in wanted


def _twin(model: Any) -> Any:
    """An empty model of the same class and config, without adapters or packed weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def _packed_twin(model: Any, config: Any) -> Any:
    """An empty model as loading with `config` would pack it."""
    from lofi.models.quantizer import FrozenQuantizer

    twin = _twin(model)
    FrozenQuantizer(config, pre_quantized=False).preprocess_model(twin)
    return twin


def _pack_all(model: Any, name: str, paths: list[str], config: Any, rounding: str, seen: dict[str, Tensor]) -> None:
    """Put the packed form of each merged linear in its place; `seen` holds H by path, where it is known."""
    parts, wanted = adapter_of(model, name).parts, changes(model, name)
    for path in paths:
        module = model.get_submodule(path)
        weight = _merged_weight(module, wanted.get(f"{path}.weight"))  # (O, I)
        made = _holding(module, _round(module, weight, config, rounding, seen.get(path)), config, weight)
        made.bias = _merged_bias(module, wanted.get(f"{path}.bias"))
        model.set_submodule(path, made.train(module.training))
        registry_of(model).required_grad.pop(f"{path}.weight", None)  # codes cannot be thawed
        parts.pop(path, None)


def _merged_weight(module: Any, change: Change | None) -> Tensor:
    """W0 + s B A (O, I) in float32, or W0 where the adapter has no part here."""
    packed = isinstance(module, FrozenLinear)
    base: Any = module.dense_weight(torch.float32) if packed else module.weight.detach().float()
    whole = base if change is None else change.part.merged("weight", base)
    product = product_of(module)
    return whole.t().contiguous() if product is not None and product.transposed else whole


def _merged_bias(module: Any, change: Change | None) -> nn.Parameter | None:
    if module.bias is None or change is None:
        return module.bias
    return nn.Parameter(change.part.merged("bias", module.bias), requires_grad=False)


def _round(module: Any, weight: Tensor, config: Any, rounding: str, gram: Tensor | None) -> FourBit | EightBit:
    if config.kind == "int8":
        like = module.stored if isinstance(module, Int8Linear) else None
        return requantize_int8(weight, gram=gram, rounding=rounding, like=like)
    same = isinstance(module, NF4Linear) and module.quant_type == "nf4"
    options = _options(module, config)
    return requantize_4bit(
        weight,
        gram=gram,
        rounding=rounding,
        like=module.stored if same else None,
        double=options.double_quant,
        block=options.block,
    )


def _options(module: Any, config: Any) -> Any:
    """The config for one linear: its own block size and nesting where it is in 4 bits already."""
    if config.kind == "int8" or not isinstance(module, NF4Linear):
        return config
    return replace(config, double_quant=module.double_quant, block=module.block)


def _holding(module: Any, stored: FourBit | EightBit, config: Any, weight: Tensor) -> FrozenLinear:
    """A frozen linear with these codes and scales; its origin is the merged weight."""
    rows, columns = weight.shape
    dtype = module.dense_dtype if isinstance(module, FrozenLinear) else module.weight.dtype
    made: Any = _class(config)(
        columns, rows, options=_options(module, config), bias=False, dense_dtype=dtype, device="meta"
    )
    codes = stored.codes if isinstance(stored, EightBit) else stored.codes.view(-1, 1)
    made.weight = nn.Parameter(codes, requires_grad=False)
    for key, scales in _scales(stored):
        setattr(made, key, scales)
    made.dense_sample = sample(weight.to(dtype))
    return made


def _scales(stored: FourBit | EightBit) -> Iterator[tuple[str, Tensor]]:
    if isinstance(stored, EightBit):
        yield "SCB", stored.scale
        return
    yield from (("absmax", stored.absmax), ("quant_map", stored.quant_map))
    if stored.nested is not None:
        yield from (("nested_absmax", stored.nested.absmax), ("nested_offset", stored.nested.offset))
        yield "nested_quant_map", stored.nested.quant_map


def _mark(model: Any, config: Any) -> None:
    """Say to transformers that the model is quantized, as loading it so would have."""
    from lofi.models.quantizer import FrozenQuantizer

    if not any(hasattr(module, "packed_shapes") for module in model.modules()):
        raise ModelError(f"no linear layer of {type(model).__name__} is left to hold as {config.kind}; merge it dense")
    model.hf_quantizer = FrozenQuantizer(config, pre_quantized=False)
    model.hf_quantizer.rules = list(getattr(model, "_weight_conversions", None) or [])
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
    model.lofi_quantization = config.kind


def _left_dense(wanted: dict[str, Change]) -> list[str]:
    """What stays dense because the adapter trained it in full."""
    trained = [key for key, change in wanted.items() if change.part.kind == "copy" and key.endswith(".weight")]
    return [f"{len(trained)} weights that the adapter trained in full stay dense"] if trained else []


def _as_in(twin: nn.Module, path: str, linear: nn.Linear) -> nn.Module:
    """The linear as the architecture has it: GPT-2's Conv1D keeps its weight (I, O)."""
    own: Any = twin.get_submodule(path)
    product = product_of(own)
    if product is None or not product.transposed:
        return linear
    own.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
    own.bias = linear.bias
    return own.train(linear.training)
