"""What a method costs when the model answers: forward passes of base and adapted models, timed in turn.

Knows  shapes, settings (batch, sequence), and how to time one thing against another: in one process, warmed up, every
       side once a round, the order turning from round to round, so that whatever else the machine does falls on all
       alike; ratios are taken round by round. Imports no torch until something is measured.
Knows not  data, training or quality: adapters get random weights that are not zero; time does not depend on them.
Rejected  one model whose adapters are switched: a method that changes how attention runs would slow the others down.
       Each side is a module tree of its own over the same weights, which costs no memory; merged LoRA has new ones.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field, field_validator, model_validator

from lofi.errors import ModelError, RecipeError
from lofi.files.atomic import write_json
from lofi.recipe.words import no_such

SIZE_OF = {
    "lora-merged": "r",
    "lora": "r",
    "adapter-lin": "bottleneck_size",
    "houlsby": "bottleneck_size",
    "prefix": "num_virtual_tokens",
    "prompt": "num_virtual_tokens",
}
"""The methods that can be timed, and the field of each one's config that says how large its adapter is."""
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
}
"""Models of these names are built with random weights: no download, and the time is that of the trained model."""
MERGED = "lora-merged"
KEPT = "latency.json"
SPREAD = 0.02  # standard deviation of the adapters' weights
_PAUSE = 0.005  # seconds before a turn: the threads of the side before stop spinning
_RESAMPLES = 2000

Count = Annotated[int, Field(ge=1)]
Row = dict[str, Any]


class _Frozen(pydantic.BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Setting(_Frozen):
    """One column of the table: how many sequences of how many tokens, and about how many parameters an adapter has."""

    batch: Count
    sequence: Count
    parameters: Annotated[float, Field(ge=1)] | None = None  # the size of an adapter that was given none follows


class Timed(_Frozen):
    """One row of the table: a method, how large (rank, width or number of virtual tokens), and what it is called."""

    method: str
    size: Count | None = None  # None: from the setting's parameters, else the method's own default
    name: str | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SIZE_OF:
            raise ValueError(no_such("latency.methods", value, tuple(SIZE_OF)))
        return value

    @property
    def who(self) -> str:
        return self.name or (self.method if self.size is None else f"{self.method} {self.size}")


class LatencySpec(_Frozen):
    """What a study of kind latency measures: table 1 of LoRA (arXiv 2106.09685) unless it says otherwise."""

    shape: str = "gpt2-medium"  # a name in SHAPES (random weights), a model folder or a hub id
    settings: tuple[Setting, ...] = (
        *(Setting(batch=32, sequence=512, parameters=0.5e6), Setting(batch=16, sequence=256, parameters=11e6)),
        Setting(batch=1, sequence=128, parameters=11e6),
    )
    methods: tuple[Timed, ...] = tuple(Timed(method=name) for name in SIZE_OF if name != "prompt")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the model; adapters are float32
    device: str = "auto"
    rounds: Annotated[int, Field(ge=2)] = 40
    warm_up: Count = 2
    new_tokens: Annotated[int, Field(ge=0)] = 0  # 0: one forward pass; else so many are decoded
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("methods", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A method may be a bare name, and a list of YAML is a tuple."""
        if not isinstance(value, (list, tuple)):
            return value
        return tuple({"method": item} if isinstance(item, str) else item for item in value)

    @field_validator("settings", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A setting may be written [batch, sequence]."""
        if not isinstance(value, (list, tuple)):
            return value
        pair = ("batch", "sequence", "parameters")
        return tuple(
            dict(zip(pair, item, strict=False)) if isinstance(item, (list, tuple)) and 2 <= len(item) <= 3 else item
            for item in value
        )

    @model_validator(mode="after")
    def _something_to_time(self) -> LatencySpec:
        names = ["base", *(timed.who for timed in self.methods)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"latency.methods names {', '.join(twice)} twice; give one of them another name")
        if not self.settings or not self.methods:
            empty = "latency.methods" if self.settings else "latency.settings"
            raise ValueError(f"{empty} is empty, so there is nothing to time; name at least one")
        return self


def run_latency(study: Any, output: str | Path, on_event: Callable[[str], object]) -> list[Row]:
    """Time every setting of `study.latency`; a row for each setting and method, the base first.

    A row has who, method, size, parameters, batch, sequence, ms [low, high] and ratio [ratio_low, ratio_high] to the
    base: medians with 95 % bootstrap intervals over the rounds. Settings that OUTPUT/latency.json holds of the same
    spec are not measured again.
    Raises  ModelError for a shape that is not known or too short for a setting; TargetError where the model cannot take
            a method
    """
    spec: LatencySpec = study.latency
    kept = Path(output) / KEPT
    same = spec.model_dump(mode="json", exclude={"settings"})
    done = _kept(kept, same)
    model = None
    rows: list[Row] = []
    for setting in spec.settings:
        key = f"{setting.batch} x {setting.sequence}, {setting.parameters or 'default'} parameters"
        if key not in done:
            model = model if model is not None else open_shape(spec)
            done[key] = measure(model, spec, setting)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"spec": same, "settings": done})
        rows += done[key]
        on_event(_said(setting, done[key]))
    return rows


def open_shape(spec: LatencySpec) -> Any:
    """The model to time: built from its shape with random weights, or loaded from a folder or hub id."""
    import torch

    from lofi.models.dtypes import choose_dtype, parse_dtype, resolve_device
    from lofi.models.load import load_model

    device = resolve_device(spec.device)
    if spec.shape not in SHAPES:
        return load_model(spec.shape, dtype=spec.dtype, device=spec.device)
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = choose_dtype(device).dtype if spec.dtype == "auto" else parse_dtype(spec.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        config = AutoConfig.for_model(**SHAPES[spec.shape])
        return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def measure(model: Any, spec: LatencySpec, setting: Setting) -> list[Row]:
    """The rows of one setting; the given model is not touched."""
    _check_length(model, spec, setting)
    sides: dict[str, Any] = {"base": model}
    facts: dict[str, Row] = {"base": {"method": "base", "size": None, "parameters": 0}}
    for timed in spec.methods:
        sides[timed.who], facts[timed.who] = adapted(model, timed, setting, spec.seed)
        if SIZE_OF[timed.method] == "num_virtual_tokens":
            _check_length(model, spec, setting, timed.who, virtual=facts[timed.who]["size"])
    seconds = interleaved(
        {who: call(side, spec, setting) for who, side in sides.items()},
        rounds=spec.rounds,
        warm_up=spec.warm_up,
        synchronize=synchronizer(model.device),
    )
    return [
        {"who": who, **facts[who], "batch": setting.batch, "sequence": setting.sequence}
        | figures(seconds[who], seconds["base"])
        for who in sides
    ]


def adapted(model: Any, timed: Timed, setting: Setting, seed: int) -> tuple[Any, Row]:
    """A module tree over the model's own weights with one adapter on it (or merged in), and what it is."""
    import torch

    from lofi.adapters.attach import add_adapter
    from lofi.adapters.merge import merge_in_memory
    from lofi.adapters.registry import adapter_tensors

    size = timed.size or _size(model, timed, setting.parameters)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = same_weights(model)
        report = add_adapter(own, _config(timed.method, size))
        with torch.no_grad():
            for tensor in adapter_tensors(own).values():
                tensor.normal_(std=SPREAD)
    if timed.method == MERGED:
        own = merge_in_memory(own, inplace=True)
    return own.eval(), {"method": timed.method, "size": size, "parameters": report.trainable}


def same_weights(model: Any) -> Any:
    """A copy of the module tree that shares every parameter and buffer with the model."""
    import copy

    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _config(method: str, size: int | None) -> Any:
    from lofi.adapters.methods import BY_METHOD

    kind = "lora" if method == MERGED else method
    sized: dict[str, Any] = {} if size is None else {SIZE_OF[method]: size}
    return BY_METHOD[kind](task_type="CAUSAL_LM", **sized)


def _size(model: Any, timed: Timed, parameters: float | None) -> int:
    """The size whose adapter comes closest to so many parameters; they grow by the same amount with every step."""
    if parameters is None:
        return int(getattr(_config(timed.method, None), SIZE_OF[timed.method]))
    one, two = (_trained(model, timed.method, size) for size in (1, 2))
    return max(1, round(1 + (parameters - one) / (two - one)))


def _trained(model: Any, method: str, size: int) -> int:
    from lofi.models.counting import count_adapter

    return count_adapter(model.config, _config(method, size)).trainable


def _check_length(model: Any, spec: LatencySpec, setting: Setting, who: str = "a setting", virtual: int = 0) -> None:
    """Refuse more positions than the model has: the sequence, what is decoded after it, virtual tokens before it."""
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    asked = virtual + setting.sequence + spec.new_tokens
    if asked > limit:
        raise ModelError(
            f"{who} asks for {asked} positions, but {spec.shape} has {limit}; make sequence, new_tokens or size smaller"
        )


def call(model: Any, spec: LatencySpec, setting: Setting) -> Callable[[], object]:
    """What is timed: one forward pass over random ids (N, T), or the greedy decoding of tokens after them."""
    import torch

    generator = torch.Generator().manual_seed(spec.seed)
    ids = torch.randint(0, model.config.vocab_size, (setting.batch, setting.sequence), generator=generator)  # (N, T)
    given = {"input_ids": (ids := ids.to(model.device)), "attention_mask": torch.ones_like(ids)}

    @torch.inference_mode()
    def forward() -> object:
        return model(**given, use_cache=False)

    @torch.inference_mode()
    def decode() -> object:
        count = {"max_new_tokens": spec.new_tokens, "min_new_tokens": spec.new_tokens}
        return model.generate(**given, **count, do_sample=False, pad_token_id=0)

    return decode if spec.new_tokens else forward


def interleaved(
    sides: dict[str, Callable[[], object]], *, rounds: int, warm_up: int, synchronize: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every side, round by round; another side begins each round."""
    for _ in range(warm_up):
        for side in sides.values():
            side()
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            time.sleep(_PAUSE)
            started = time.perf_counter()
            sides[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronizer(device: Any) -> Callable[[], object]:
    """What waits until the device has done what it was given; nothing to wait for on a CPU."""
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


def figures(seconds: Sequence[float], base: Sequence[float]) -> Row:
    """Milliseconds and the ratio to the base, each the median over rounds with its 95 % bootstrap interval."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
    ms, low, high = median([1e3 * second for second in seconds])
    ratio, ratio_low, ratio_high = median(ratios)
    values = {"ms": ms, "low": low, "high": high, "ratio": ratio, "ratio_low": ratio_low, "ratio_high": ratio_high}
    return values | {"rounds": len(ratios)}


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % percentile-bootstrap interval (2,000 resamples, seed 0)."""
    generator = random.Random(0)
    drawn = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = round(0.025 * _RESAMPLES)
    return statistics.median(values), drawn[cut], drawn[-cut - 1]


def _kept(path: Path, spec: Row) -> dict[str, list[Row]]:
    """The settings that were measured before under this spec."""
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held["settings"] if held["spec"] == spec else {}
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{path} cannot be read as the rows of a latency study; remove it and run again") from None


def _said(setting: Setting, rows: Sequence[Row]) -> str:
    times = ", ".join(f"{row['who']} {row['ms']:.4g} ms ({row['ratio']:.3f})" for row in rows)
    return f"batch {setting.batch}, sequence {setting.sequence}: {times}"
