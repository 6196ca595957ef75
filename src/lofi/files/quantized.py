"""How a base is quantized, and at what cost in bits: asked of a model, of a config, of a folder without its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.surgery import named_base_modules
from lofi.errors import ModelError


@dataclass(frozen=True)
class Packed:
    """What of a model is quantized; parameters are logical (a packed weight counts its elements), tied ones once."""

    kind: str
    double_quant: bool
    packed_weights: int
    packed_parameters: int
    packed_bytes: int
    """Codes and scales; the constant code books, 1 kB a weight in the files, are not counted."""
    dense_parameters: int
    dense_bytes: int
    dense_linears: dict[str, int] = field(default_factory=dict)
    """Last name of each matrix (or stack of them) that stays dense -> how many."""

    @property
    def bits(self) -> float:
        """Bits a packed parameter takes, scales included."""
        return 8 * self.packed_bytes / self.packed_parameters

    @property
    def bits_of_all(self) -> float:
        """Bits a parameter of the whole model takes."""
        return 8 * (self.packed_bytes + self.dense_bytes) / (self.packed_parameters + self.dense_parameters)

    @property
    def scheme(self) -> str:
        """The kind in words: "nf4 with double quantization"."""
        return f"{self.kind} with double quantization" if self.double_quant else self.kind

    def lines(self) -> list[str]:
        """What is packed and what is not."""
        dense = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in self.dense_linears.items()) or "none"
        return [
            f"{self.scheme}: {self.packed_weights} weights with {self.packed_parameters:,} parameters at "
            f"{self.bits:.3f} bits ({self.packed_bytes:,} bytes)",
            f"not quantized: {self.dense_parameters:,} parameters ({self.dense_bytes:,} bytes); matrices: {dense}",
            f"{self.bits_of_all:.3f} bits a parameter of the whole model",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **vars(self),
            "dense_linears": dict(self.dense_linears),
            "bits_per_packed_parameter": self.bits,
            "bits_per_parameter": self.bits_of_all,
        }


@dataclass(frozen=True)
class PackedWeight:
    """One packed parameter of a model: a linear's weight, or the stacked matrices of experts."""

    path: str
    name: str
    shape: tuple[int, ...]
    module: Any

    @property
    def full_name(self) -> str:
        """Its name in the dense model."""
        return f"{self.path}.{self.name}"

    @property
    def stored(self) -> Any:
        """The codes and scales, a FourBit or EightBit."""
        held = self.module.stored
        return held(self.name) if callable(held) else held

    @property
    def sample(self) -> str:
        """quant.origin.sample of the dense weight; "" where it was never seen."""
        several: dict[str, str] | None = getattr(self.module, "dense_samples", None)
        return (self.module.dense_sample if several is None else several.get(self.name)) or ""

    @property
    def scales(self) -> set[str]:
        """Full names of the tensors that only this module's codes need."""
        several = getattr(self.module, "packed_tensors", None)
        held = self.module._buffers if several is None else several(self.name).keys() - {self.name}
        return {f"{self.path}.{name}" for name in held}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, in its logical shape."""
        several = getattr(self.module, "dense_parameter", None)
        return self.module.dense_weight(dtype) if several is None else several(self.name, dtype)


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Every packed parameter, in the order of the modules."""
    return [
        PackedWeight(path, name, tuple(shape), module)
        for path, module in named_base_modules(model)
        for name, shape in getattr(module, "packed_shapes", {}).items()
    ]


def quantization_of(model: nn.Module) -> str | None:
    """ "nf4", "fp4" or "int8" for a model with packed weights; None for a dense one."""
    for weight in packed_weights(model):
        module = weight.module
        on_meta = next(iter(module.buffers())).device.type == "meta"  # the code book is not there to be looked at
        return str(module.kind if on_meta else getattr(module, "quant_type", module.kind))
    return None


def held_quantization(config: Any, where: str) -> str | None:
    """The same of a transformers config, which says how the folder's weights are written.

    Raises  ModelError for weights that another library packed
    """
    from lofi.models.quantization import held_kind

    return held_kind(_held(config), where)


def in_words(quantization: str | None) -> str:
    """ "an nf4 base", "a dense base"."""
    return "a dense base" if quantization is None else f"an {quantization} base"


def packed_of(model: nn.Module) -> Packed | None:
    """What of a model is quantized, on any device (meta too); None for a dense one."""
    packed = packed_weights(model)
    kind = getattr(model, "lofi_quantization", None) or quantization_of(model)
    if not packed or kind is None:
        return None
    codes = {id(getattr(weight.module, weight.name)) for weight in packed}
    own = {id(p): (name, p) for name, p in model.named_parameters() if id(p) not in codes}
    matrices = Counter(
        name.removesuffix(".weight").rpartition(".")[2]
        for name, p in own.values()
        if p.ndim > 1
    )
    stored = [weight.stored for weight in packed]
    return Packed(
        kind=kind,
        double_quant=any(getattr(one, "nested", None) is not None for one in stored),
        packed_weights=len(packed),
        packed_parameters=sum(_elements(one) for one in stored),
        packed_bytes=sum(_bytes(one) for one in stored),
        dense_parameters=sum(p.numel() for _, p in own.values()),
        dense_bytes=sum(p.numel() * p.element_size() for _, p in own.values()),
        dense_linears=dict(matrices),
    )


def packed_on_meta(config: Any, task: str, path: str | Path, quantization: str | None = None) -> nn.Module:
    """The model of a folder on the meta device, packed as its files are, else as `quantization` would pack it.

    Reads the headers of the files, no weight. Raises  ModelError for damaged files, and for a folder that is packed
    in another way than asked for
    """
    from lofi.models.counting import meta_model
    from lofi.models.quantization import asked_config, reading_config
    from lofi.models.quantizer import FrozenQuantizer

    held, asked = held_quantization(config, str(path)), asked_config(quantization)
    wanted = asked if held is None else reading_config(_held(config) or {}, held, asked, str(path))
    if held is not None:
        vars(config).pop("quantization_config")
    model = meta_model(config, task)
    if wanted is not None:
        files = [str(file) for file in sorted(Path(path).glob("*.safetensors"))]
        quantizer: Any = FrozenQuantizer(wanted, pre_quantized=held is not None)
        quantizer._process_model_before_weight_loading(model, checkpoint_files=files)
        model.lofi_quantization = wanted.kind  # type: ignore[assignment]  # fp4 is told from nf4 by the files alone
    return model


def refuse_packed(config: Any, where: str) -> None:
    """Raise ModelError for weights that are quantized already, where dense ones are wanted."""
    held = held_quantization(config, where)
    if held is not None:
        raise ModelError(f"{where} holds {held}-quantized weights already; give the dense model that it was made from")


def _held(config: Any) -> dict[str, Any] | None:
    held = getattr(config, "quantization_config", None)
    return held if held is None or isinstance(held, dict) else held.to_dict()


def _elements(stored: Any) -> int:
    """Elements of the weight that codes stand for."""
    return int(stored.numel) if hasattr(stored, "nested") else stored.codes.numel()


def _bytes(stored: Any) -> int:
    return int(stored.bytes()) if hasattr(stored, "nested") else stored.codes.numel() + 4 * stored.scale.numel()
