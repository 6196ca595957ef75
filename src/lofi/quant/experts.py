"""The fused 3-D weights of mixture-of-experts models, held in 4 or 8 bits.

`freeze_experts` changes an experts module in place, as adapters do: its class gains the mixin `FrozenExperts`, its 3-D
parameters become codes, and forward goes over the experts that tokens were routed to, dequantizing one at a time into
the workspace. The module must follow transformers' experts convention (adapters/experts.py). Rejected: one frozen
linear an expert (hundreds of thousands of small modules in the models that matter), and the batched implementations of
transformers, which want all experts dense at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi.adapters.experts import experts_forward
from lofi.adapters.fused import Product
from lofi.quant.codes import dynamic_code, nf4_code
from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.kernels.workspace import workspace
from lofi.quant.linear import FrozenProduct, quantize_4bit
from lofi.quant.origin import sample
from lofi.quant.storage import EightBit, FourBit, Nested


class FrozenExperts:
    """Mixin in front of an experts module's class: 3-D parameters (E, O, I) as codes, forward one expert at a time.

    For a parameter `p`: 4 bits hold `p` uint8 (1, ceil(E O I / 2), 1), whose blocks run over the whole, `p_absmax` and
    `p_quant_map`, and under double quantization `p_nested_absmax`, `p_nested_offset` and `p_nested_quant_map`; int8
    holds `p` int8 (E, O, I) and `p_SCB` float32 (E, O).
    Dtypes   products in `compute_dtype`, results in the input's dtype
    """

    kind: str
    block: int
    compute_dtype: torch.dtype
    dense_dtype: torch.dtype
    packed_shapes: dict[str, tuple[int, ...]]
    dense_sample: str | None = None
    dense_samples: dict[str, str]
    """quant.origin.sample of each parameter before it was quantized, where it was seen."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, [], hidden_states, top_k_index, top_k_weights)

    @property
    def quant_type(self) -> str:
        """ "nf4", "fp4" or "int8"."""
        if self.kind == "int8":
            return "int8"
        book: Tensor = getattr(self, f"{next(iter(self.packed_shapes))}_quant_map")
        return "nf4" if bool(book[0] == -1) else "fp4"

    def packed_tensors(self, name: str) -> dict[str, Tensor]:
        """Codes and scales of one parameter, under the names that this module has them by."""
        held: Any = {**self._parameters, **self._buffers}  # type: ignore[attr-defined]
        own = [name, *(f"{name}_{part}" for part in _PARTS)]
        return {key: held[key] for key in own if held.get(key) is not None}

    def stored(self, name: str) -> FourBit | EightBit:
        """The codes and scales of one parameter as one value; int8 as a matrix (E O, I). Views, no copies."""
        held = self.packed_tensors(name)
        shape = self.packed_shapes[name]
        if self.kind == "int8":
            return EightBit(held[name].view(-1, shape[-1]), held[f"{name}_SCB"].view(-1))
        nested = None
        if held[f"{name}_absmax"].dtype == torch.uint8:
            spread, offset = held[f"{name}_nested_absmax"], held[f"{name}_nested_offset"]
            nested = Nested(spread, offset, held[f"{name}_nested_quant_map"])
        scales, book = held[f"{name}_absmax"], held[f"{name}_quant_map"]
        return FourBit(held[name].view(-1, 1), scales, book, shape, self.block, nested)

    def dense_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One parameter (E, O, I) as numbers, by default in the dtype it had before quantization."""
        stored, shape = self.stored(name), self.packed_shapes[name]
        out = torch.empty(shape, dtype=dtype or self.dense_dtype, device=stored.codes.device)
        if isinstance(stored, FourBit):
            return kernels_for(out.device).dequantize_blockwise(stored, out)
        return kernels_for(out.device).dequantize_int8(stored, out.view(-1, shape[-1])).view(shape)

    def expert_product(self, name: str, expert: int) -> Product:
        """How one expert's matrix multiplies, for adapters and for this module's own forward."""
        transposed = bool(self.is_transposed)  # type: ignore[attr-defined]
        dtype = self.compute_dtype

        def forward(x: Tensor, bias: Tensor | None) -> Tensor:
            weight = self._expert(name, expert)
            rows = x.to(dtype)
            y = rows @ weight if transposed else F.linear(rows, weight)
            return (y if bias is None else y + bias.to(dtype)).to(x.dtype)

        def input_gradient(g: Tensor) -> Tensor:
            weight = self._expert(name, expert)
            return (g.to(dtype) @ (weight.t() if transposed else weight)).to(g.dtype)

        def safe(x: Tensor, bias: Tensor | None) -> Tensor:
            if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
                return FrozenProduct.apply(x, bias, forward, input_gradient)  # the workspace must not be saved
            return forward(x, bias)

        rows, columns = self.packed_shapes[name][1:]
        shape = (columns, rows) if transposed else (rows, columns)
        return Product(safe, input_gradient, _nothing, lambda module: shape)

    def _expert(self, name: str, expert: int) -> Tensor:
        """One expert's matrix in the workspace: to be read at once."""
        stored, (_, rows, columns) = self.stored(name), self.packed_shapes[name]
        out = workspace((rows, columns), self.compute_dtype, stored.codes.device)
        if isinstance(stored, FourBit):
            return kernels_for(out.device).dequantize_rows(stored, expert * rows, out)
        part = slice(expert * rows, (expert + 1) * rows)
        return kernels_for(out.device).dequantize_int8(EightBit(stored.codes[part], stored.scale[part]), out)

    @torch.no_grad()
    def quantize_(self, name: str, weight: Tensor) -> None:
        """Take the codes of one dense parameter (E, O, I), on its device."""
        if self.kind == "int8":
            rows = kernels_for(weight.device).quantize_weight_rows(weight.reshape(-1, weight.shape[-1]))
            made = {name: rows.codes.view(weight.shape), f"{name}_SCB": rows.scale.view(weight.shape[:2])}
        else:
            double = f"{name}_nested_absmax" in self._buffers  # type: ignore[attr-defined]
            stored = quantize_4bit(weight, block=self.block, double_quant=double)
            made = {
                name: stored.codes.view(1, -1, 1),
                f"{name}_absmax": stored.absmax,
                f"{name}_quant_map": stored.quant_map,
            }
            if stored.nested is not None:
                made[f"{name}_nested_absmax"] = stored.nested.absmax
                made[f"{name}_nested_offset"] = stored.nested.offset
                made[f"{name}_nested_quant_map"] = stored.nested.quant_map
        for key, tensor in made.items():
            setattr(self, key, nn.Parameter(tensor, requires_grad=False) if key == name else tensor)
        self.dense_samples[name], self.dense_dtype = sample(weight), weight.dtype

    def to_dense(self) -> nn.Module:
        """A module of the class this one had, with every packed parameter dense and the rest shared."""
        cls: Any = thawed_class(type(self))
        dense = cls.__new__(cls)
        own = {key for name in self.packed_shapes for key in self.packed_tensors(name)}
        state = {key: value for key, value in self.__dict__.items() if key not in _OWN}
        for held in ("_parameters", "_buffers"):
            state[held] = {key: value for key, value in state[held].items() if key not in own}
        dense.__dict__.update(state)
        for name in self.packed_shapes:
            dense._parameters[name] = nn.Parameter(self.dense_parameter(name), requires_grad=False)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move codes and scales as asked, but never cast them."""
        before = {key: t for name in self.packed_shapes for key, t in self.packed_tensors(name).items()}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for key, tensor in before.items():
            after = getattr(self, key)
            if after.dtype != tensor.dtype:
                uncast = tensor.to(after.device)
                setattr(self, key, nn.Parameter(uncast, requires_grad=False) if key in self.packed_shapes else uncast)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (thawed_class(type(self)),), self.__dict__


_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_offset", "nested_quant_map", "SCB")
_OWN = ("kind", "block", "compute_dtype", "dense_dtype", "packed_shapes", "dense_samples")
_FROZEN: dict[Any, Any] = {}


def frozen_class(cls: Any) -> Any:
    """The class `cls` takes when its experts are packed: a subclass made once, rebuilt from its origin."""
    if cls not in _FROZEN:
        _FROZEN[cls] = type(f"Frozen{cls.__name__}", (FrozenExperts, cls), {"__module__": cls.__module__})
    return _FROZEN[cls]


def thawed_class(cls: type) -> type:
    """The class an experts module had before it was packed."""
    return cls.__mro__[cls.__mro__.index(FrozenExperts) + 1]


def _rebuild(cls: Any) -> Any:
    made = frozen_class(cls)
    return made.__new__(made)


def freeze_experts(module: Any, names: Iterable[str], options: NF4Options | Int8Options, *, device: Any) -> None:
    """Make an experts module hold these 3-D parameters as codes, empty ones on `device`, to be filled or loaded."""
    shapes = {name: tuple(getattr(module, name).shape) for name in names}
    dense_dtype = getattr(module, next(iter(shapes))).dtype
    module.__class__ = frozen_class(type(module))
    module.kind = "int8" if isinstance(options, Int8Options) else "nf4"
    module.block = 0 if isinstance(options, Int8Options) else options.block
    module.compute_dtype, module.dense_dtype = getattr(torch, options.compute_dtype), dense_dtype
    module.packed_shapes, module.dense_samples = shapes, {}
    for name, shape in shapes.items():
        empty = _empty_int8(shape, device) if isinstance(options, Int8Options) else _empty_4bit(shape, options, device)
        setattr(module, name, nn.Parameter(empty.pop(""), requires_grad=False))
        for part, tensor in empty.items():
            module.register_buffer(f"{name}_{part}", tensor)


def _empty_int8(shape: tuple[int, ...], device: Any) -> dict[str, Tensor]:
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    return {"": codes, "SCB": torch.empty(shape[:2], dtype=torch.float32, device=device)}


def _empty_4bit(shape: tuple[int, ...], options: NF4Options, device: Any) -> dict[str, Tensor]:
    count = torch.Size(shape).numel()
    blocks = -(-count // options.block)
    made = {
        "": torch.empty(1, -(-count // 2), 1, dtype=torch.uint8, device=device),
        "absmax": torch.empty(blocks, dtype=torch.uint8 if options.double_quant else torch.float32, device=device),
        "quant_map": nf4_code().to(device),
    }
    if options.double_quant:
        made["nested_absmax"] = torch.empty(-(-blocks // 256), dtype=torch.float32, device=device)
        made["nested_offset"] = torch.empty((), dtype=torch.float32, device=device)
        made["nested_quant_map"] = dynamic_code().to(device)
    return made


def _nothing(module: Any) -> tuple[Tensor, ...]:
    return ()
