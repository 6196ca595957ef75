"""Filling a model with packed weights through transformers' quantizer interface: made on the fly, or read as they are.

On the fly: the linears and experts of the empty model become frozen ones, and each dense tensor is quantized as it
arrives. Packed: the files are read first (bitsandbytes_format.py), so that every fault is one sentence before anything
is loaded; exactly the modules whose weights are packed become frozen ones, and codes stay in the mapped file. Rejected:
`is_loaded_in_4bit`, at which other libraries cast what trains; a converter for each packed weight, which would keep
transformers from casting the dense ones.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lofi.adapters.experts import is_experts
from lofi.errors import LofiWarning, ModelError
from lofi.models.bitsandbytes_format import (
    PackedWeight,
    origin_metadata,
    packed_modules,
    packed_state,
    read_checkpoint,
)
from lofi.models.packable import (
    dense_patterns,
    kept_heads,
    linear_shape,
    packable_experts,
    packable_linears,
    stacked_weights,
    widen_norms,
)
from lofi.quant.experts import FrozenExperts, freeze_experts
from lofi.quant.linear import Int8Linear, NF4Linear

_FILE_NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # after a dot on disk
_IGNORED = {  # by the loader: read before it starts, or set when it is done
    "_keys_to_ignore_on_load_unexpected": {r"\.quant_state\.bitsandbytes__\w+$", r"\.weight_format$"},
    "_keys_to_ignore_on_load_missing": {r"[._]nested_offset$"},
}


class FrozenQuantizer(HfQuantizer):
    """transformers' hooks for lofi's NF4Config, FP4Config and Int8Config."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self.filled: set[str] = set()
        self.rules: list[Any] | None = None
        self.packed: dict[str, PackedWeight] = {}
        self.origins: dict[str, str] = {}
        self.awaited: dict[str, nn.Parameter] = {}
        self.faults: list[str] = []

    is_trainable = True  # type: ignore[assignment]  # adapters beside the frozen codes train
    is_qat_trainable = True  # type: ignore[assignment]  # else Trainer insists on PEFT's own classes

    def is_serializable(self) -> bool:
        return True

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Put empty frozen modules in place; until loaded, their parameters are of the dtype that will be read.

        The loader casts what it reads to the dtype of the empty parameter (transformers 5.20 even before quantizing).
        """
        super().preprocess_model(model, dtype=dtype, **kwargs)
        for place, parameter in self.awaited.items():
            path, _, name = place.rpartition(".")
            model.get_submodule(path)._parameters[name] = parameter
        self.awaited = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.pre_quantized:
            self._expect_packed(model, checkpoint_files or [])
        else:
            self._expect_dense(model)
        return model

    def _expect_dense(self, model: Any) -> None:
        """Empty frozen linears in place of the linears that are to be quantized; ModelError if there is none."""
        skip = self._skipped(model)
        linears = {path: m for path, m in packable_linears(model).items() if should_convert_module(path, skip)}
        experts = {path: m for path, m in packable_experts(model).items() if should_convert_module(path, skip)}
        if not linears and not experts:
            raise ModelError(
                f"{type(model).__name__} has no linear layer to quantize beside its heads and what skip_modules names; "
                "load it dense"
            )
        for path, linear in linears.items():
            self._replace(model, path, linear, self.quantization_config, linear.weight.dtype)
            self.awaited[f"{path}.weight"] = linear.weight
        for path, module in experts.items():
            dense = {name: getattr(module, name) for name in stacked_weights(module)}
            self.awaited |= {f"{path}.{name}": parameter for name, parameter in dense.items()}
            with torch.device("cpu"):
                freeze_experts(module, dense, self.quantization_config, device="meta")
        left = [path for path, m in model.named_modules() if stacked_weights(m) and not isinstance(m, FrozenExperts)]
        if left := [path for path in left if should_convert_module(path, skip)]:
            warnings.warn(
                f"{len(left)} modules of stacked experts stay dense, first {left[0]}: they do not follow transformers' "
                "experts interface", LofiWarning, stacklevel=2,
            )  # fmt: skip

    def _skipped(self, model: Any) -> list[str]:
        """Module names and patterns that stay dense: heads, tied weights, the user's own.

        Raises  ModelError for one of the user's that no linear has
        """
        own = list(self.quantization_config.skip_modules or ())
        linears = [*packable_linears(model), *packable_experts(model)]
        for name in own:
            if all(should_convert_module(path, [name]) for path in linears):
                last = sorted({path.rpartition(".")[2] for path in linears})
                near = get_close_matches(name, [*linears, *last], n=1)
                hint = f"did you mean {near[0]}?" if near else f"linears are called {', '.join(last[:8])}."
                raise ModelError(f"skip_modules names '{name}', which no linear layer of the model is called; {hint}")
        keep = self.get_modules_to_not_convert(model, own, model._keep_in_fp32_modules, add_default_skips=True)
        return sorted({*keep, *kept_heads(model)})

    def _expect_packed(self, model: Any, files: Iterable[str]) -> None:
        """Empty frozen linears in place of the linears whose weights the files hold packed."""
        where = str(getattr(model, "name_or_path", "") or "the folder")
        checkpoint = read_checkpoint(files, where)
        if checkpoint.kind != self.quantization_config.kind:
            raise ModelError(
                f"config.json in {where} says {self.quantization_config.kind}, but its weights are {checkpoint.kind}; "
                "correct its quantization_config"
            )
        paths = self._paths(model, checkpoint.weights)
        dense = {f"{path}.weight": linear for path, linear in packable_linears(model).items()}
        for name, place in paths.items():
            self._check_one(model, name, place, checkpoint.weights[name], dense)
        named = self._paths(model, checkpoint.origins)  # names of the saved model, which transformers renames in files
        self.origins = {place: checkpoint.origins[name] for name, place in named.items()}
        self._refuse(where)
        for place in (place for place in self.packed if place in dense):
            self._expect_linear(model, place.removesuffix(".weight"), dense[place])
        for path, module in packable_experts(model).items():
            self._expect_experts(path, module)
        for key, patterns in _IGNORED.items():
            setattr(model, key, {*(getattr(model, key) or ()), *patterns})

    def _paths(self, model: Any, names: Iterable[str]) -> dict[str, str]:
        """Name of a weight in the files -> its name in this model, by transformers' own renaming rules."""
        rules = get_model_conversion_mapping(model, None, self)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        own = model.state_dict()
        paths = {}
        for name in names:
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
            if renamed not in own and name in own:
                renamed = name
            if renamed in own:  # else it is of a head that this model has not: the loader judges what is left over
                paths[name] = renamed
        return paths

    def _check_one(
        self, model: Any, name: str, place: str, weight: PackedWeight, dense: dict[str, nn.Module]
    ) -> None:
        """Note a packed weight for the parameter `place`, or a fault where that cannot hold it."""
        parameter = model.get_parameter_or_buffer(place)
        expected = linear_shape(dense[place]) if place in dense else tuple(parameter.shape)
        if place not in dense and not is_experts(model.get_submodule(place.rpartition(".")[0])):
            self.faults.append(f"{name} is packed, but {place} is of no linear layer")
        elif weight.shape != expected:
            self.faults.append(f"{name} is {weight.shape}, expected {expected}")
        else:
            self.packed[place], self.awaited[place] = weight, _as_filed(weight)

    def _options(self, weight: PackedWeight) -> Any:
        if weight.kind == "int8":
            return self.quantization_config
        return replace(self.quantization_config, double_quant=weight.offset is not None, block=weight.block)

    def _expect_linear(self, model: Any, path: str, linear: Any) -> None:
        weight = self.packed[f"{path}.weight"]
        dense = getattr(torch, weight.dense_dtype) if weight.dense_dtype else linear.weight.dtype
        self._replace(model, path, linear, self._options(weight), dense)

    def _expect_experts(self, path: str, module: Any) -> None:
        names = [name for name in stacked_weights(module) if f"{path}.{name}" in self.packed]
        if names:
            with torch.device("cpu"):
                freeze_experts(module, names, self._options(self.packed[f"{path}.{names[0]}"]), device="meta")

    def _replace(self, model: Any, path: str, linear: Any, options: Any, dense_dtype: torch.dtype) -> None:
        rows, columns = linear_shape(linear)
        cls = Int8Linear if options.kind == "int8" else NF4Linear
        with torch.device("cpu"):  # constants are made here; everything else says meta
            made = cls(columns, rows, options=options, bias=False, dense_dtype=dense_dtype, device="meta")
        made.bias = linear.bias
        if isinstance(linear, Conv1D):
            self.transposed.add(path)
        model.set_submodule(path, made.train(linear.training))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name in getattr(model.get_submodule(path), "packed_shapes", {})

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        experts = [_FromDisk(rf"(?<!\.weight)\.{name}$", f"_{name}") for name in _FILE_NAMES]  # they apply in turn
        return experts + [_FromDisk(rf"\.weight\.{name}$", f".{name}") for name in _FILE_NAMES]

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes an element will take, for transformers' device maps; packed parameters have their own size already."""
        if self.pre_quantized:
            return None
        return 1.0 if self.quantization_config.kind == "int8" else 0.5

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, module in packed_modules(model).items():
            for name in module.packed_shapes:
                place = f"{path}.{name}"
                if place in self.packed:
                    self._finish(place, name, module)
                elif place not in self.filled:
                    self.faults.append(f"missing {place}")
        self._refuse(str(getattr(model, "name_or_path", "") or "the model"))
        for key in _IGNORED:
            vars(model).pop(key, None)
        rules = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = self.rules = [rule for rule in rules if not isinstance(rule, _FromDisk)]
        if self.quantization_config.norms_in_float32:
            widen_norms(model)
        model.lofi_quantization = self.quantization_config.kind
        self.packed, self.origins, self.filled = {}, {}, set()
        return model

    def _finish(self, place: str, name: str, module: Any) -> None:
        """What the loader could not set: the offset, the codes' own dtype and shape, where the weight comes from."""
        codes, packed = module.get_parameter(name).detach(), self.packed[place]
        if codes.device.type == "meta":  # missing, which the loader says
            return
        if packed.kind != "int8":
            codes = codes.view(torch.uint8).view((-1, 1) if name == "weight" else (1, -1, 1))
            if codes.numel() != -(-math.prod(packed.shape) // 2):
                self.faults.append(f"{place} came as {codes.numel():,} bytes of codes")
            setattr(module, name, nn.Parameter(codes, requires_grad=False))
            if packed.offset is not None:
                offset = torch.tensor(packed.offset, dtype=torch.float32, device=codes.device)
                setattr(module, "nested_offset" if name == "weight" else f"{name}_nested_offset", offset)
        if isinstance(module, FrozenExperts):
            module.dense_samples |= {name: self.origins[place]} if place in self.origins else {}
        else:
            module.dense_sample = self.origins.get(place)

    def _refuse(self, where: str) -> None:
        if self.faults:
            more = f" and {len(self.faults) - 5} more" if len(self.faults) > 5 else ""
            told = "; ".join(self.faults[:5])
            raise ModelError(f"the weights in {where} do not fit the model: {told}{more}; fetch the model again")

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """bitsandbytes' names for the packed weights, and a config that names exactly the linears that are dense.

        Packed experts go into the file as they are, not as transformers would take the dense stacks apart, and the
        config calls the format lofi's: bitsandbytes would find experts that it cannot read.
        """
        packed = packed_modules(model)
        stacks = [f"{p}.{name}" for p, m in packed.items() if isinstance(m, FrozenExperts) for name in m.packed_shapes]
        if self.rules is not None:
            model._weight_conversions = [rule for rule in self.rules if not _takes_apart(rule, stacks)]
        if not packed:  # everything was merged and unpacked
            vars(model.config).pop("quantization_config", None)
            return None, {}
        config = replace(self.quantization_config, skip_modules=dense_patterns(model))
        model.config.quantization_config = config.own_dict() if stacks else config
        return packed_state(model), origin_metadata(model)


class _FromDisk(WeightRenaming):
    """A renaming of this room's own: of no use when the model is saved again."""

    __slots__ = ()


class _Quantize(ConversionOps):
    """One dense tensor -> codes and scales, under the names of the frozen linear that takes them."""

    def __init__(self, quantizer: FrozenQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        self.quantizer.filled.add(name)
        if path in self.quantizer.transposed:
            weight = weight.t()
        if tuple(weight.shape) != module.packed_shapes[own]:
            self.quantizer.faults.append(f"{name} is {tuple(weight.shape)}, expected {module.packed_shapes[own]}")
            return {name: module.get_parameter(own)}
        if isinstance(module, FrozenExperts):
            module.quantize_(own, weight)
            made = module.packed_tensors(own)
        else:
            module.quantize_(weight)
            made = {own: module.weight, **dict(module.named_buffers())}
        if not all(bool(tensor.isfinite().all()) for tensor in made.values() if tensor.is_floating_point()):
            self.quantizer.faults.append(f"{name} has entries that are not finite")
        return {f"{path}.{key}": tensor for key, tensor in made.items()}


def _as_filed(weight: PackedWeight) -> nn.Parameter:
    """An empty parameter for the codes as they stand in the file."""
    dtype, shape = weight.filed
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _takes_apart(rule: Any, stacks: list[str]) -> bool:
    """Whether a conversion rule of transformers splits one of these parameters when saving."""
    targets = rule._original_target_patterns if isinstance(rule, WeightConverter) else []
    return any(re.search(target, stack) for target in targets for stack in stacks)
