"""The rivals of LoRA as configs: what each may be asked for. What each computes stands in the file that it names.

Imports no torch, because recipes are checked without it. Every config constructs without arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from lofi.adapters.config import AdapterConfig, LoraConfig, Names, choice_faults, count_faults

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
BOTTLENECK_INITS = ("zero", "normal")
PREFIX_INITS = ("vocab", "random")
PROMPT_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
VIRTUAL_UNMERGEABLE = "its virtual tokens are read by attention beside the text, and belong to no weight"
BOTTLENECK_UNMERGEABLE = "a bottleneck is a layer of its own, with a non-linearity that no weight can hold"


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """What both kinds of adapter layers may be asked for."""

    implementation: ClassVar[str] = "lofi.adapters.bottleneck"
    unmergeable: ClassVar[str | None] = BOTTLENECK_UNMERGEABLE

    bottleneck_size: int = 64
    """Width m of the bottleneck; each trains 2 D m + D + m parameters, Lin's norm 2 D more."""
    non_linearity: str = "gelu"
    """f: gelu, relu, silu or tanh."""
    init: str = "zero"
    """"zero": U starts at zero, so the model starts as its base; "normal": U and D normal(0.01), as in the paper."""
    mlp_modules: Names = None
    """Where the bottleneck after the MLP goes, as suffixes or a regex; None: known by family."""

    def faults(self) -> list[str]:
        choices = (("non_linearity", ACTIVATIONS), ("init", BOTTLENECK_INITS))
        usual = count_faults(self, bottleneck_size="usual widths are 8 to 256")
        return [*super().faults(), *usual, *choice_faults(self, *choices)]


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(BottleneckConfig):
    """A bottleneck y + U f(D y + d) + u after attention and one after the MLP.   Houlsby et al. (arXiv 1902.00751)"""

    method: ClassVar[str] = "houlsby"
    peft_type: ClassVar[str] = "LOFI_HOULSBY"

    attention_modules: Names = None
    """Where the bottleneck after the attention goes, as suffixes or a regex; None: its output, known by family."""


@dataclass(frozen=True, kw_only=True)
class LinConfig(BottleneckConfig):
    """One bottleneck h + U f(D norm(h) + d) + u on each block's output.   Lin, Madotto and Fung (arXiv 2004.03829)"""

    method: ClassVar[str] = "adapter-lin"
    peft_type: ClassVar[str] = "LOFI_LIN"

    non_linearity: str = "relu"


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(AdapterConfig):
    """Trained keys and values before those of every layer's tokens.   Prefix tuning (arXiv 2101.00190), sec. 4

    The model does not start as its base: whatever a prefix holds takes attention away from the tokens.
    """

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    implementation: ClassVar[str] = "lofi.adapters.prefix"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    num_virtual_tokens: int = 20
    """Positions that the prefix takes."""
    prefix_projection: bool = False
    """Train through an MLP, which is dropped when the adapter is saved (sec. 4.3)."""
    encoder_hidden_size: int | None = None
    """Hidden width of that MLP; None: the width of a layer's keys."""
    init: str | None = None
    """"vocab": keys and values of tokens drawn from the vocabulary (sec. 7.4: real words train best); "random":
    normal(1), as in PEFT. None: "vocab", or "random" with prefix_projection, whose MLP cannot start elsewhere."""

    def finished(self) -> AdapterConfig:
        return replace(self, prefix_projection=False, encoder_hidden_size=None, init="random")

    def faults(self) -> list[str]:
        faults = [*super().faults(), *count_faults(self, num_virtual_tokens="usual numbers are 5 to 100")]
        faults += choice_faults(self, ("init", (None, *PREFIX_INITS)))
        if self.prefix_projection and self.init == "vocab":
            faults.append("init is 'vocab', which an MLP cannot start at; leave it out, or prefix_projection")
        if self.encoder_hidden_size is not None:
            faults += count_faults(self, encoder_hidden_size="512 is usual")
            if not self.prefix_projection:
                faults.append("encoder_hidden_size is set but prefix_projection is not; set both, or neither")
        return faults


@dataclass(frozen=True, kw_only=True)
class PromptConfig(AdapterConfig):
    """Trained embeddings before those of the input.   Prompt tuning (arXiv 2104.08691)

    The model does not start as its base but as the base with P more tokens before its input.
    """

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    implementation: ClassVar[str] = "lofi.adapters.prompt"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    num_virtual_tokens: int = 20
    """Embeddings that train."""
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    """"RANDOM": normal(0, 1), as PEFT draws them; "SAMPLE_VOCAB": rows drawn from it; "TEXT": those of a text."""
    prompt_tuning_init_text: str | None = None
    """The text whose embeddings are the start, repeated or cut to the number of virtual tokens."""

    def finished(self) -> AdapterConfig:
        return replace(self, prompt_tuning_init="RANDOM", prompt_tuning_init_text=None)

    def faults(self) -> list[str]:
        faults = [*super().faults(), *count_faults(self, num_virtual_tokens="usual numbers are 5 to 100")]
        faults += choice_faults(self, ("prompt_tuning_init", PROMPT_INITS))
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            faults.append(
                f"prompt_tuning_init is {self.prompt_tuning_init!r} and prompt_tuning_init_text "
                f"{self.prompt_tuning_init_text!r}; the text goes with 'TEXT', and 'TEXT' needs it"
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Copies of every bias, and nothing else.   BitFit (arXiv 2106.10199)"""

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "LOFI_BITFIT"
    implementation: ClassVar[str] = "lofi.adapters.bitfit"


@dataclass(frozen=True, kw_only=True)
class LastLayersConfig(AdapterConfig):
    """Copies of the last k blocks, trained in full ("FT top2" of LoRA, arXiv 2106.09685, table 3)."""

    method: ClassVar[str] = "last-layers"
    peft_type: ClassVar[str] = "LOFI_LAST_LAYERS"
    implementation: ClassVar[str] = "lofi.adapters.last_layers"

    num_layers: int = 2
    """k: how many blocks train, counted from the output (the decoder's, beside an encoder); norms after them do not."""

    def faults(self) -> list[str]:
        return [*super().faults(), *count_faults(self, num_layers="the paper takes 2")]


@dataclass(frozen=True, kw_only=True)
class MixedConfig(AdapterConfig):
    """Several methods as one adapter, such as LoRA with prefix tuning (LoRA, arXiv 2106.09685, appendix E)."""

    method: ClassVar[str] = "mixed"
    peft_type: ClassVar[str] = "LOFI_MIXED"
    implementation: ClassVar[str] = "lofi.adapters.mixed"

    configs: Sequence[AdapterConfig] = (LoraConfig(), PrefixConfig())
    """The configs, each of another method; what they adapt must not overlap."""

    def faults(self) -> list[str]:
        names = [type(config).__name__ for config in self.configs]
        faults = super().faults()
        if len(names) < 2 or len(set(names)) < len(names) or "MixedConfig" in names:
            faults.append(f"configs holds {', '.join(names) or 'nothing'}, expected at least two of different methods")
        return faults

    def why_unmergeable(self) -> str | None:
        """The reason of the first config that cannot be merged."""
        return next((reason for config in self.configs if (reason := config.why_unmergeable())), None)

    def finished(self) -> AdapterConfig:
        return replace(self, configs=tuple(config.finished() for config in self.configs))

    def to_dict(self) -> dict[str, object]:
        own = {f.name: getattr(self, f.name) for f in fields(AdapterConfig)}
        return own | {"configs": [{"peft_type": c.peft_type, **c.to_dict()} for c in self.configs]}


CONFIGS: tuple[type[AdapterConfig], ...] = (
    *(LoraConfig, HoulsbyConfig, LinConfig, PrefixConfig, PromptConfig, BitFitConfig, LastLayersConfig, MixedConfig),
)


def virtual_length(config: AdapterConfig | None) -> int:
    """Positions that an adapter's virtual tokens take before every input: 0 for the methods that have none."""
    inner = (virtual_length(one) for one in getattr(config, "configs", ()))
    return getattr(config, "num_virtual_tokens", 0) + sum(inner)


BY_METHOD = {config.method: config for config in CONFIGS}
BY_PEFT_TYPE = {config.peft_type: config for config in CONFIGS}
