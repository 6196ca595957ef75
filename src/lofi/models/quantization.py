"""What a user asks for and what a folder holds: the quantization configs, and which of the two decides.

`NF4Config` and `Int8Config` are what `from_pretrained(quantization_config=...)` takes; in a saved config.json they are
the BitsAndBytesConfig that reads the same weights. Knows config.json's `quantization_config`. Does not know tensors
(bitsandbytes_format.py) or how a model is filled (quantizer.py). Rejected: taking over bitsandbytes' own name in
transformers' table, which would change what other code's from_pretrained does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from lofi.errors import ModelError
from lofi.models.quantizer import FrozenQuantizer
from lofi.quant.config import COMPUTE_DTYPES, Int8Options, NF4Options

KINDS = ("nf4", "int8")
"""What can be asked for; fp4 is read where a folder holds it, and written back as it was."""


class _ForTransformers(QuantizationConfigMixin):
    """What transformers asks of a quantization config, over the frozen options of lofi.quant.config."""

    kind: ClassVar[str]
    quant_method: ClassVar[str]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (made, kwargs) if return_unused_kwargs else made

    def own_dict(self) -> dict[str, Any]:
        """The config under lofi's name: what transformers looks up again, and what a folder says of packed experts."""
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {"quant_method": self.quant_method, **own}


class NF4Config(NF4Options, _ForTransformers):
    """4-bit NormalFloat for every linear layer but heads, for `load_model` and `from_pretrained`; see NF4Options."""

    kind = "nf4"
    quant_method = "lofi_nf4"

    def to_dict(self) -> dict[str, Any]:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=None if self.skip_modules is None else list(self.skip_modules),
        ).to_dict()


class FP4Config(NF4Config):
    """The 4-bit floats of a folder that bitsandbytes wrote: read, and written back as they were."""

    kind = "fp4"
    quant_method = "lofi_fp4"


class Int8Config(Int8Options, _ForTransformers):
    """LLM.int8() for every linear layer but heads, for `load_model` and `from_pretrained`; see Int8Options."""

    kind = "int8"
    quant_method = "lofi_int8"

    def to_dict(self) -> dict[str, Any]:
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=float(self.threshold),
            llm_int8_skip_modules=None if self.skip_modules is None else list(self.skip_modules),
        ).to_dict()


_CONFIGS: dict[str, Any] = {config.kind: config for config in (NF4Config, FP4Config, Int8Config)}
for _config in _CONFIGS.values():
    register_quantization_config(_config.quant_method)(_config)
    register_quantizer(_config.quant_method)(FrozenQuantizer)


def asked_config(given: Any) -> NF4Config | Int8Config | None:
    """The config that `quantization=` stands for: None, "nf4", "int8", or a config of lofi's; ModelError otherwise."""
    if given is None or isinstance(given, _ForTransformers):
        return given  # type: ignore[return-value]
    if isinstance(given, str) and given in KINDS:
        return _CONFIGS[given]()
    if isinstance(given, NF4Options | Int8Options):
        return (NF4Config if isinstance(given, NF4Options) else Int8Config)(**vars(given))
    if given == "fp4":
        raise ModelError("quantization 'fp4' is only read, from folders that hold it; use nf4, which errs less")
    near = get_close_matches(str(given), KINDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use {' or '.join(KINDS)}, or lofi's config for it."
    raise ModelError(f"quantization {given!r} is not known; {hint}")


def held_kind(raw: Mapping[str, Any] | None, where: str) -> str | None:
    """How config.json says the weights are packed: "nf4", "fp4", "int8", or None for dense ones.

    Raises  ModelError for another library's format, or a bitsandbytes config that says neither 4 nor 8 bits
    """
    if not raw:
        return None
    four, eight = bool(raw.get("load_in_4bit")), bool(raw.get("load_in_8bit"))
    method = raw.get("quant_method", "bitsandbytes" if four or eight else "unknown")
    own = next((kind for kind, config in _CONFIGS.items() if config.quant_method == method), None)
    if own is not None:
        return own
    if method != "bitsandbytes":
        raise ModelError(
            f"{where} holds {method}-quantized weights, but lofi reads dense weights and bitsandbytes' formats; "
            "give the dense model and say quantization=nf4 or int8"
        )
    kind = str(raw.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    if four == eight or kind not in _CONFIGS:
        raise ModelError(
            f"{where} has a bitsandbytes config of neither nf4, fp4 nor int8 weights; correct quantization_config in "
            "its config.json, or give the dense model"
        )
    return kind


def reading_config(raw: Mapping[str, Any], kind: str, asked: NF4Config | Int8Config | None, where: str) -> Any:
    """The config to load a packed folder with: the folder's format, and of `asked` what does not touch the codes.

    Raises  ModelError where another kind was asked for: quantizing again would add both errors
    """
    if asked is not None and asked.kind != kind:
        raise ModelError(
            f"quantization {asked.kind} was asked for, but {where} holds {kind} weights already; leave quantization "
            f"out to use them, or give the dense model to have {asked.kind}"
        )
    if raw.get("quant_method") == _CONFIGS[kind].quant_method:
        told = {f.name: raw[f.name] for f in fields(_CONFIGS[kind]) if f.name in raw}
    else:
        told = _from_bitsandbytes(raw, kind)
    if asked is not None:
        told |= {"compute_dtype": asked.compute_dtype, "norms_in_float32": asked.norms_in_float32}
    if isinstance(asked, Int8Config):
        told["threshold"] = asked.threshold
    return _CONFIGS[kind](**told)


def _from_bitsandbytes(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {"skip_modules": raw.get("llm_int8_skip_modules")}
    if kind == "int8":  # which has no compute dtype there
        return told | {"threshold": raw.get("llm_int8_threshold", 6.0)}
    return told | {
        "double_quant": bool(raw.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": raw.get("bnb_4bit_compute_dtype", "float32"),
    }


def computing_in(config: Any, dtype: torch.dtype | str) -> Any:
    """The config with products in `dtype`; "auto" leaves what it says, ModelError for one that products have not."""
    if dtype == "auto":
        return config
    name = str(dtype).removeprefix("torch.")
    if name not in COMPUTE_DTYPES:
        raise ModelError(f"dtype {name} was asked for over quantized weights; use auto, bf16, fp16 or fp32")
    return replace(config, compute_dtype=name)
