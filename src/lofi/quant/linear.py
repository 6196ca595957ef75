"""Linear layers whose frozen weight is held in 4 or 8 bits.

The codes are parameters without gradient, the scales are buffers; both keep their dtype whatever the module is cast
to. The names are the ones bitsandbytes uses on disk, with underscores for its dots. Adapters, merging and files treat
these layers as any linear: `frozen_product` says how they multiply, `dense_weight` what they stand for. Rejected: a
tensor subclass for the weight, which every operation of torch would have to be taught.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lofi.adapters.fused import Product
from lofi.quant.codes import dynamic_code, nf4_code
from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.nf4 import quantize_scales
from lofi.quant.origin import sample
from lofi.quant.products import dense_copy, input_gradient, int8_forward, nf4_forward
from lofi.quant.storage import EightBit, FourBit, Nested


class FrozenLinear(nn.Module):
    """A linear with a quantized weight (O, I): forward, input gradient, and the dense weight on demand.

    Dtypes   products in `compute_dtype`, results in the input's dtype (autocast's, inside autocast)
    """

    kind: ClassVar[str]
    weight: nn.Parameter
    dense_sample: str | None = None
    """quant.origin.sample of the dense weight that was quantized; None where it was never seen."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        dense_dtype: torch.dtype,
        device: Any = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype, self.dense_dtype = compute_dtype, dense_dtype
        empty = torch.empty(out_features, dtype=dense_dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @property
    def stored(self) -> FourBit | EightBit:
        """The codes and scales as one value; views of this module's tensors."""
        raise NotImplementedError

    @property
    def logical_shape(self) -> tuple[int, int]:
        """(O, I), whatever the shape of the codes."""
        return self.out_features, self.in_features

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the weight that its codes stand for, for those who count elements."""
        return {"weight": self.logical_shape}

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I) that the codes stand for, in `dtype`, by default the dtype it had before quantization."""
        return dense_copy(self.stored, dtype or self.dense_dtype)

    def to_dense(self, weight: Tensor | None = None) -> nn.Linear:
        """A plain linear with `weight` (the dequantized one by default) and this bias, frozen."""
        weight = self.dense_weight() if weight is None else weight
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.register_parameter("bias", self._parameters["bias"])
        return linear.train(self.training)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I) W^T + bias -> (..., O), without a gradient."""
        raise NotImplementedError

    def frozen_product(self) -> Product:
        """How this layer multiplies, for adapters: no stored tensor passes through autograd."""
        return Product(self.product, self._input_gradient, _nothing, _logical_shape)

    def _input_gradient(self, g: Tensor) -> Tensor:
        return input_gradient(g, self.stored, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._multiply(x)
        with torch.autocast(kind, enabled=False):
            return self._multiply(x.to(torch.get_autocast_dtype(kind)))

    def _multiply(self, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        needs_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
        if torch.is_grad_enabled() and needs_gradient:
            return FrozenProduct.apply(x, bias, self.product, self._input_gradient)
        return self.product(x, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Move codes and scales as asked, but never cast them."""
        parameters = {"weight": self.weight.detach()}  # torch swaps the data inside the parameter
        buffers = {name: held for name, held in self._buffers.items() if held is not None}
        super()._apply(fn, recurse)
        for name, before in (parameters | buffers).items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                uncast = before.to(after.device)
                setattr(self, name, nn.Parameter(uncast, requires_grad=False) if name in parameters else uncast)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(FrozenLinear):
    """A frozen weight in 4-bit codes: nf4, or fp4 where a checkpoint holds that.   QLoRA (arXiv 2305.14314)

    `weight` uint8 (ceil(O I / 2), 1); `absmax` float32 or, double quantized, uint8 (blocks,) with `nested_absmax`,
    `nested_offset` and `nested_quant_map`; `quant_map` float32 (16,).
    """

    kind = "nf4"
    absmax: Tensor
    quant_map: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        options: NF4Options,
        bias: bool = True,
        dense_dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
    ):
        compute = getattr(torch, options.compute_dtype)
        super().__init__(
            in_features, out_features, bias=bias, compute_dtype=compute, dense_dtype=dense_dtype, device=device
        )
        self.block = options.block
        elements = in_features * out_features
        blocks = -(-elements // self.block)
        codes = torch.empty(-(-elements // 2), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale_dtype = torch.uint8 if options.double_quant else torch.float32
        self.register_buffer("absmax", torch.empty(blocks, dtype=scale_dtype, device=device))
        self.register_buffer("quant_map", _on(nf4_code(), device))
        if options.double_quant:
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // 256), dtype=torch.float32, device=device))
            self.register_buffer("nested_offset", torch.empty((), dtype=torch.float32, device=device))
            self.register_buffer("nested_quant_map", _on(dynamic_code(), device))

    @classmethod
    def from_dense(cls, linear: nn.Linear, options: NF4Options) -> NF4Linear:
        """The quantized form of a linear; its bias is kept as it is."""
        return _from_dense(cls, linear, options)

    @property
    def double_quant(self) -> bool:
        """Whether the block scales are themselves in 8 bits."""
        return self.absmax.dtype == torch.uint8

    @property
    def quant_type(self) -> str:
        """ "nf4" or "fp4", by the code book."""
        return "nf4" if bool(self.quant_map[0] == -1) else "fp4"

    @property
    def stored(self) -> FourBit:
        held: Any = self._buffers
        nested = None
        if self.absmax.dtype == torch.uint8:
            nested = Nested(held["nested_absmax"], held["nested_offset"], held["nested_quant_map"])
        codes: Any = self._parameters["weight"]
        return FourBit(codes, held["absmax"], held["quant_map"], self.logical_shape, self.block, nested)

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> NF4Linear:
        """Take the codes of a dense weight (O, I), on the weight's device."""
        stored = quantize_4bit(weight, block=self.block, double_quant=self.double_quant)
        self.weight = nn.Parameter(stored.codes.view(-1, 1), requires_grad=False)
        self.absmax, self.quant_map = stored.absmax, stored.quant_map
        if stored.nested is not None:
            self.nested_absmax, self.nested_offset = stored.nested.absmax, stored.nested.offset
            self.nested_quant_map = stored.nested.quant_map
        self.dense_sample, self.dense_dtype = sample(weight), weight.dtype
        return self

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nf4_forward(x, bias, self.stored, self.compute_dtype)


class Int8Linear(FrozenLinear):
    """A frozen weight in row-wise int8 codes, multiplied in integers.   LLM.int8() (arXiv 2208.07339)

    `weight` int8 (O, I); `SCB` float32 (O,), each row's largest magnitude. Activations of magnitude >= threshold are
    multiplied in the compute dtype; the input gradient goes through the dequantized weight.
    """

    kind = "int8"
    SCB: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        options: Int8Options,
        bias: bool = True,
        dense_dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
    ):
        compute = getattr(torch, options.compute_dtype)
        super().__init__(
            in_features, out_features, bias=bias, compute_dtype=compute, dense_dtype=dense_dtype, device=device
        )
        self.threshold = options.threshold
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", torch.empty(out_features, dtype=torch.float32, device=device))

    @classmethod
    def from_dense(cls, linear: nn.Linear, options: Int8Options) -> Int8Linear:
        """The quantized form of a linear; its bias is kept as it is."""
        return _from_dense(cls, linear, options)

    @property
    def stored(self) -> EightBit:
        return EightBit(self.weight, self.SCB)

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> Int8Linear:
        """Take the codes of a dense weight (O, I), on the weight's device."""
        stored = kernels_for(weight.device).quantize_weight_rows(weight)
        self.weight, self.SCB = nn.Parameter(stored.codes, requires_grad=False), stored.scale
        self.dense_sample, self.dense_dtype = sample(weight), weight.dtype
        return self

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return int8_forward(x, bias, self.stored, self.compute_dtype, self.threshold)


def quantize_4bit(weight: Tensor, *, block: int = 64, double_quant: bool = True) -> FourBit:
    """A weight of any shape in NF4 codes, by the kernels of its device; see nf4.py for the formula."""
    code = nf4_code().to(weight.device)
    codes, absmax = kernels_for(weight.device).quantize_blockwise(weight.contiguous(), code, block)
    nested = None
    if double_quant:
        absmax, nested = quantize_scales(absmax)
    return FourBit(codes, absmax, code, tuple(weight.shape), block, nested)


class FrozenProduct(torch.autograd.Function):
    """y = x W^T + b; dx = g W, db = sum of g. Saves nothing: the weight is the module's, and frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, product: Any, gradient: Any) -> Tensor:
        ctx.gradient, ctx.shape = gradient, x.shape
        return product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rows = g.reshape(-1, g.shape[-1])  # (M, O)
        gx = ctx.gradient(rows).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, rows.sum(0) if ctx.needs_input_grad[1] else None, None, None


def _from_dense(cls: Any, linear: nn.Linear, options: Any) -> Any:
    weight = linear.weight.detach()
    made = cls(
        linear.in_features,
        linear.out_features,
        options=options,
        bias=linear.bias is not None,
        dense_dtype=weight.dtype,
        device="meta",
    )
    made.quantize_(weight)
    if linear.bias is not None:
        made.bias = linear.bias
    return made.train(linear.training)


def _on(constant: Tensor, device: Any) -> Tensor:
    return constant if device is None else constant.to(device)


def _nothing(module: Any) -> tuple[Tensor, ...]:
    return ()


def _logical_shape(module: Any) -> tuple[int, int]:
    return module.logical_shape

