"""What an adapter is, whatever its method, and what a LoRA adapter is: PEFT's field names, checked where they are made.

Knows values and their limits; it does not know any model, so whether a name exists is `target.py`'s question. Imports
no torch, because recipes are checked without it. The other methods' configs stand in `methods.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from lofi.errors import RecipeError

ALL_LINEAR = "all-linear"
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian", "olora", "pissa", "orthogonal")
_RANDOMISED = re.compile(r"pissa_niter_\d+")

Names = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method's config has; a subclass is one method, and one file implements it.

    `implementation` names the module whose `resolve(model, config, saved) -> attach.Resolved` makes the method's parts.
    """

    method: ClassVar[str]
    """Its name in a recipe."""
    peft_type: ClassVar[str]
    """What adapter_config.json calls it: PEFT's word where PEFT has the method, else one that begins with LOFI_."""
    implementation: ClassVar[str]
    unmergeable: ClassVar[str | None] = None
    """Why no merge can hold this method, in words that follow "because"; None where one can."""

    task_type: str | None = None
    """CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS; inferred from the model where None."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained in full, as copies beside the frozen ones; task heads are added by themselves."""

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise RecipeError("; ".join(faults))

    def faults(self) -> list[str]:
        """Every impossible value, as a sentence each."""
        return choice_faults(self, ("task_type", (None, *TASK_TYPES)))

    def why_unmergeable(self) -> str | None:
        """Why no merge can hold an adapter of this config; None where one can."""
        return self.unmergeable

    def finished(self) -> AdapterConfig:
        """The config of the trained adapter as a folder holds it: without what only said where training starts."""
        return self

    def to_dict(self) -> dict[str, object]:
        """Plain values under PEFT's names, lists as lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def choice_faults(config: object, *choices: tuple[str, tuple[object, ...]]) -> list[str]:
    """A sentence for every field whose value is not one of those allowed."""
    return [
        f"{key} is {value!r}, expected one of {', '.join(map(repr, allowed))}"
        for key, allowed in choices
        if (value := getattr(config, key)) not in allowed
    ]


def count_faults(config: object, **usual: str) -> list[str]:
    """A sentence for every field that is not a whole number of at least 1; `usual` says which values are."""
    return [
        f"{key} is {value!r}, expected a whole number of at least 1; {words}"
        for key, words in usual.items()
        if not isinstance(value := getattr(config, key), int) or isinstance(value, bool) or value < 1
    ]


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """A low-rank update W0 + (alpha / r) B A of chosen weights.   LoRA (arXiv 2106.09685), eq. 3

    Raises RecipeError where a value is impossible; names are checked against the model by `add_adapter`.
    """

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    implementation: ClassVar[str] = "lofi.adapters.lora"

    r: int = 16
    """Rank R of every update, unless `rank_pattern` says otherwise."""
    lora_alpha: float = 32
    """Numerator of the scale; the effective multiplier is lora_alpha / r (lora_alpha / sqrt(r) with rsLoRA)."""
    target_modules: Names = ALL_LINEAR
    """"all-linear" (every linear but the head), a list of name suffixes, or a regex that matches the full path."""
    exclude_modules: Names = None
    """Modules to leave out, written like `target_modules`."""
    lora_dropout: float = 0.0
    """Share of the inputs of A that is dropped while training, in [0, 1)."""
    bias: str = "none"
    """Which bias vectors train (as copies): "none", "all", or "lora_only", those of the adapted modules."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r.   rsLoRA (arXiv 2312.03732)"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank by name suffix or regex; the first that matches wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha by name suffix or regex; the first that matches wins."""
    layers_to_transform: Sequence[int] | int | None = None
    """Only these layer indices."""
    layers_pattern: Names = None
    """Name of the module list that the indices count in (`layers`, `h`, ...); any list where None."""
    target_parameters: Sequence[str] | None = None
    """Suffixes of fused 3-D expert parameters to adapt, e.g. `mlp.experts.gate_up_proj`."""
    trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None
    """Token ids whose embedding rows train; a dict maps an embedding's name to ids."""
    init_lora_weights: bool | str = True
    """True: A Kaiming-uniform(sqrt 5), B zero; "gaussian": A normal(1/r), B zero; False: both random (for tests).

    "olora" (QR of the weight), "pissa" (its SVD; "pissa_niter_4" a quick one) and "orthogonal" start from both factors
    in use and train s (B A - B0 A0); the saved folder is then plain LoRA of rank 2r. See `adapters/init.py`.
    """
    use_dora: bool = False
    """Train the length of every row of W0 + s B A on its own.   DoRA (arXiv 2402.09353); see `adapters/dora.py`"""

    def faults(self) -> list[str]:
        return [*self._number_faults(), *self._choice_faults()]

    def _number_faults(self) -> list[str]:
        ranks = {"r": self.r, **{f"rank_pattern[{k}]": v for k, v in self.rank_pattern.items()}}
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k}]": v for k, v in self.alpha_pattern.items()}}
        faults = [
            f"{key} is {value!r}, expected a whole number of at least 1; usual ranks are 4 to 64"
            for key, value in ranks.items()
            if not isinstance(value, int) or isinstance(value, bool) or value < 1
        ]
        faults += [
            f"{key} is {value!r}, expected a finite number above 0; twice the rank is usual"
            for key, value in alphas.items()
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf
        ]
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout is {self.lora_dropout!r}, expected a share from 0 up to but not including 1")
        return faults

    def _choice_faults(self) -> list[str]:
        faults = [*super().faults(), *choice_faults(self, ("bias", BIASES)), *self._start_faults()]
        if not isinstance(self.target_modules, str) and not (self.target_modules or self.target_parameters):
            faults.append(
                f"target_modules is {self.target_modules!r}, which adapts nothing; "
                "name some modules, or leave it out for all-linear"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            faults.append("layers_pattern is set but layers_to_transform is not; say which layers")
        return faults

    def _start_faults(self) -> list[str]:
        faults, start = [], self.init_lora_weights
        if start not in INITS and not _RANDOMISED.fullmatch(str(start)):
            names = ", ".join(map(repr, INITS))
            faults.append(f"init_lora_weights is {start!r}, expected one of {names}, or 'pissa_niter_4'")
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if isinstance(rank, int) and rank % 2]
        if start == "orthogonal" and odd:
            faults.append(f"init_lora_weights 'orthogonal' needs an even rank, got {odd[0]}; take {odd[0] + 1}")
        if self.use_dora and self.bias != "none":
            faults.append(f"use_dora with bias {self.bias!r} is not defined; leave bias at 'none'")
        if self.use_dora and self.target_parameters:
            faults.append("use_dora does not reach target_parameters (fused experts); leave one of them out")
        return faults

    @property
    def shifted(self) -> bool:
        """Whether both factors start in use, so that what they start from is subtracted."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    def finished(self) -> LoraConfig:
        """What the folder is: after a shifted start plain LoRA of rank 2r, alpha doubled, rsLoRA folded into B."""
        if not self.shifted:
            return self
        ranks = {key: 2 * rank for key, rank in self.rank_pattern.items()}
        alphas = {key: 2 * alpha for key, alpha in self.alpha_pattern.items()}
        twice = replace(self, r=2 * self.r, lora_alpha=2 * self.lora_alpha, rank_pattern=ranks, alpha_pattern=alphas)
        return replace(twice, use_rslora=False, init_lora_weights=True)

    def scale(self, rank: int, alpha: float) -> float:
        """The effective multiplier of B A: alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return value
