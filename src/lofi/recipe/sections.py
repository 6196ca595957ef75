"""The sections of a recipe, as frozen pydantic models; every default stands here once (a method's own in its config).

Knows  names, types, ranges, and which values exclude each other. Knows not  files and lines: `build` adds those.
Rejected  accepting numbers as text ("16") and booleans as numbers: a recipe says what it means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pydantic
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from lofi.adapters.config import AdapterConfig, LoraConfig
from lofi.adapters.methods import (
    BitFitConfig,
    HoulsbyConfig,
    LastLayersConfig,
    LinConfig,
    MixedConfig,
    PrefixConfig,
    PromptConfig,
)
from lofi.errors import RecipeError
from lofi.recipe.words import known_but_later, no_such
from lofi.recipe.writing import resolved_yaml

SECTIONS_OF: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "qlora": ("lora",),
    "int8-lora": ("lora",),
    "full": (),
    "houlsby": ("houlsby",),
    "adapter-lin": ("adapter_lin",),
    "prefix": ("prefix",),
    "prompt": ("prompt",),
    "bitfit": ("bitfit",),
    "last-layers": ("last_layers",),
    "lora+prefix": ("lora", "prefix"),
    "lora+prompt": ("lora", "prompt"),
}
"""The methods, and which of the methods' sections each reads."""
METHODS = tuple(SECTIONS_OF)
TASKS = ("sft", "text", "classification", "token_classification")
LATER_TASKS = ("preference",)
QUANTIZATIONS = ("nf4", "int8")
QUANTIZATION_OF = {"qlora": "nf4", "int8-lora": "int8"}
"""The methods that are LoRA over a quantized base: `method: lora` with that `quantization` is the same."""

Origin = Literal["default", "file", "command line"]
Count = Annotated[int, Field(ge=1)]


class Section(pydantic.BaseModel):
    """A frozen part of a recipe that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class MethodSection(Section):
    """The section of a method: the fields of its config, with the defaults that the config owns."""

    _config: ClassVar[type[AdapterConfig]]

    @model_validator(mode="after")
    def _config_accepts(self) -> MethodSection:
        try:
            self.to_config()
        except RecipeError as error:
            raise ValueError(f"{_key_of(self._config)}: {error}") from None
        return self

    def to_config(self) -> Any:
        """The config that this section describes.  Raises  RecipeError if it contradicts itself."""
        return self._config(**{name: getattr(self, name) for name in type(self).model_fields})


def _key_of(config: type[AdapterConfig]) -> str:
    return config.method.replace("-", "_")


def _section(config: type[AdapterConfig]) -> Any:
    """A section with each field of a config as a pydantic field: the same type, the default that the config owns."""
    hints = get_type_hints(config)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        default = Field(default_factory=field.default_factory) if made else field.default  # type: ignore[arg-type]
        fields[field.name] = (hints[field.name], default)
    name = config.__name__.replace("Config", "Section")
    section = pydantic.create_model(name, __base__=MethodSection, __module__=__name__, **fields)
    section._config = config
    return section


LoraSection = _section(LoraConfig)
HoulsbySection = _section(HoulsbyConfig)
LinSection = _section(LinConfig)
PrefixSection = _section(PrefixConfig)
PromptSection = _section(PromptConfig)
BitFitSection = _section(BitFitConfig)
LastLayersSection = _section(LastLayersConfig)


class DataSection(Section):
    """Where the rows are: files or hub ids, relative to the working directory."""

    train: Annotated[str, Field(min_length=1)]
    validation: str | None = None
    test: str | None = None
    columns: dict[str, str] | None = None  # lofi's column name -> the name in the file
    labels: list[str] | None = None  # the classes in their order; None: found in the training rows


class TrainSection(Section):
    """How to train. Tokens are counted without padding; steps are optimizer steps."""

    epochs: Annotated[float, Field(gt=0)] | None = 3.0
    max_steps: Count | None = None  # instead of epochs
    batch_tokens: Count | None = 4096  # tokens an optimizer step sees
    micro_batch_size: Count | None = None  # rows a forward pass; None: chosen
    gradient_accumulation_steps: Count | None = None  # forward passes a step; None: follows from batch_tokens
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: the method's own (2e-4 LoRA, 2e-5 full)
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None  # LoRA+: B learns so many times faster than A
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    save_steps: Count = 200
    eval_steps: Count | None = None  # None: each epoch
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03  # steps, or below 1 a share of all steps
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: not clipped
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    early_stopping: Count | None = None  # evaluations without a better one before stopping; None: never
    logging_steps: Count = 10
    report_to: Literal["none", "tensorboard"] = "none"
    max_length: Annotated[int, Field(ge=2)] | None = None  # tokens a row; None: the model's context

    @model_validator(mode="before")
    @classmethod
    def _set_rivals_aside(cls, values: Any) -> Any:
        """A default gives way to the key that replaces it, so the resolved recipe names only what is read."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("max_steps") is not None:
            values.setdefault("epochs", None)
        if values.get("micro_batch_size") is not None and values.get("gradient_accumulation_steps") is not None:
            values.setdefault("batch_tokens", None)
        return values

    @model_validator(mode="after")
    def _rivals_exclude_each_other(self) -> TrainSection:
        if (self.epochs is None) == (self.max_steps is None):
            both = "both set" if self.epochs is not None else "both empty"
            raise ValueError(f"train.epochs and train.max_steps are {both}; a run has one length, set one of them")
        counted = self.micro_batch_size is not None and self.gradient_accumulation_steps is not None
        if counted and self.batch_tokens is not None:
            raise ValueError(
                "train.batch_tokens is set beside micro_batch_size and gradient_accumulation_steps, which already fix "
                "the size of a step; leave one of the three out"
            )
        if not counted and self.batch_tokens is None:
            raise ValueError(
                "train.batch_tokens is empty; set it, or both micro_batch_size and gradient_accumulation_steps"
            )
        return self


class Recipe(Section):
    """Everything a run was asked for; `origins` says where each value came from."""

    model: Annotated[str, Field(min_length=1)]
    method: str = "lora"
    task: str | None = None  # None: inferred from the columns
    quantization: str | None = None  # of the frozen base; the method's own under qlora and int8-lora
    lora: LoraSection = Field(default_factory=LoraSection)  # type: ignore[valid-type]
    houlsby: HoulsbySection = Field(default_factory=HoulsbySection)  # type: ignore[valid-type]
    adapter_lin: LinSection = Field(default_factory=LinSection)  # type: ignore[valid-type]
    prefix: PrefixSection = Field(default_factory=PrefixSection)  # type: ignore[valid-type]
    prompt: PromptSection = Field(default_factory=PromptSection)  # type: ignore[valid-type]
    bitfit: BitFitSection = Field(default_factory=BitFitSection)  # type: ignore[valid-type]
    last_layers: LastLayersSection = Field(default_factory=LastLayersSection)  # type: ignore[valid-type]
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    output: Annotated[str, Field(min_length=1)]

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        return _one_of("method", value, METHODS, ())

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        return value if value is None else _one_of("task", value, TASKS, LATER_TASKS)

    @field_validator("quantization")
    @classmethod
    def _known_quantization(cls, value: str | None) -> str | None:
        return value if value is None else _one_of("quantization", value, QUANTIZATIONS, ())

    @model_validator(mode="before")
    @classmethod
    def _method_says_quantization(cls, values: Any) -> Any:
        """qlora is lora over nf4: the resolved recipe says so under `quantization`."""
        method = values.get("method")
        own = QUANTIZATION_OF.get(method) if isinstance(method, str) else None
        return values if own is None or values.get("quantization") is not None else {**values, "quantization": own}

    @model_validator(mode="after")
    def _method_and_quantization_agree(self) -> Recipe:
        own, asked = QUANTIZATION_OF.get(self.method), self.quantization
        if self.method == "full" and asked is not None:
            raise ValueError(
                f"method is full and quantization {asked}, but quantized weights cannot train; "
                f"use method {method_over(asked)}, or leave quantization out"
            )
        if own is not None and asked is not None and asked != own:
            raise ValueError(
                f"method {self.method} is LoRA over an {own} base, but quantization is {asked}; "
                f"use method {method_over(asked)}, or leave quantization out"
            )
        return self

    @property
    def trains_adapter(self) -> bool:
        """Whether the base stays as it is and an adapter beside it trains (every method but full)."""
        return self.method != "full"

    def adapter_config(self) -> AdapterConfig | None:
        """The config of the adapter that the method trains; None for full fine-tuning."""
        configs = [getattr(self, section).to_config() for section in SECTIONS_OF[self.method]]
        return MixedConfig(configs=configs) if len(configs) > 1 else configs[0] if configs else None

    def values(self) -> dict[str, Any]:
        """The recipe as plain values, without the sections of methods that this one does not read."""
        return without_unread(self.model_dump(mode="json"), self.method)

    @property
    def origins(self) -> dict[str, Origin]:
        """Dotted key -> "default", "file" or "command line"."""
        return dict(self._origins)

    def resolved_yaml(self) -> str:
        """The whole recipe as YAML, each value with its origin in a comment; reading it gives this recipe again."""
        return resolved_yaml(self.values(), self._origins)


def without_unread(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A recipe's keys (nested or dotted) without the sections that belong to other methods."""
    others = {section for sections in SECTIONS_OF.values() for section in sections} - set(SECTIONS_OF[method])
    return {key: value for key, value in values.items() if key.partition(".")[0] not in others}


def method_over(quantization: str) -> str:
    """The method whose base is quantized so: qlora for nf4 and fp4, int8-lora for int8."""
    return "int8-lora" if quantization == "int8" else "qlora"


def _one_of(key: str, value: str, now: tuple[str, ...], later: tuple[str, ...]) -> str:
    if value in now:
        return value
    raise ValueError(known_but_later(key, value, now) if value in later else no_such(key, value, now + later))


def known_keys() -> list[str]:
    """Every dotted key of a recipe, sections included."""
    keys = []
    for name, field in Recipe.model_fields.items():
        keys.append(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{leaf}" for leaf in section.model_fields]
    return keys
