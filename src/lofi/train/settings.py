"""Every automatic choice of a run, made once, with its reason; stored in the run folder and reused on resume.

Knows  the recipe, what the machine and the model are (`Facts`), and transformers' TrainingArguments.
Rejected  choosing again on resume: a busier machine would measure another dtype or micro-batch, and the run would no
       longer be the run that was started. Rejected too: asking transformers for epochs; steps are counted here once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.errors import RecipeError
from lofi.recipe import Recipe
from lofi.train.seeds import stream

LEARNING_RATE = {
    "lora": 2.0e-4,
    "qlora": 2.0e-4,
    "int8-lora": 2.0e-4,
    "full": 2.0e-5,
    "houlsby": 1.0e-4,
    "adapter-lin": 1.0e-4,
    "prefix": 5.0e-3,
    "prompt": 1.0e-3,
    "bitfit": 1.0e-3,
    "last-layers": 2.0e-5,
    "lora+prefix": 2.0e-4,
    "lora+prompt": 2.0e-4,
}
"""Peak learning rates; an adapter's best is about ten times full fine-tuning's (LoRA Without Regret, 2025), and a
quantized base does not move it (QLoRA, arXiv 2305.14314, trains 7B and 13B at 2e-4). Bottlenecks: LoRA (arXiv
2106.09685), table 12. Prefix and prompt tuning: the best rows of PEFT's method comparison. BitFit: arXiv 2106.10199."""
CPU_FORWARD_TOKENS = 2048
"""More tokens a forward pass gain nothing on a CPU: 512 to 4096 of them were equally fast (lofi-tiny, LoRA, bf16)."""
MEMORY_SHARE = 0.4
"""Share of the free memory that activations may take."""
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known before anything is chosen: the machine, the model, the rows."""

    device: str
    dtype: Any
    """lofi.models.dtypes.DtypeChoice"""
    packs: bool
    packs_why: str
    longest: int
    """Tokens of the longest training row."""
    width: int
    """Hidden size D of the model."""
    free_bytes: int
    activation_bytes: int
    """Bytes that one token's activations take in a forward pass that keeps them."""
    threads: int
    attention: Any
    """lofi.models.attention.Attention"""
    quantization: str | None = None
    """nf4, fp4 or int8 where the base is quantized."""
    quantization_why: str = ""
    workspace_bytes: int = 0
    """One dense copy of the largest quantized weight, which every product with a quantized weight goes through."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen; `why` holds a reason for each field that was not simply asked for."""

    device: str
    dtype: str
    autocast: bool
    scaler: bool
    threads: int
    attention: str
    packing: bool
    micro_tokens: int | None
    """Tokens of a forward pass, padding included; None where micro_rows rules."""
    micro_rows: int | None
    row_tokens: int
    """Most tokens of a packed row: with T <= D attention (4 T D a token) is at most 1/6 of the products (24 D D)."""
    accumulation: int
    learning_rate: float
    gradient_checkpointing: bool
    seed: int
    steps_per_epoch: int = 0
    max_steps: int = 0
    warmup_steps: int = 0
    eval_steps: int | None = None
    quantization: str | None = None
    why: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line per choice, with its reason."""
        return [f"{key.replace('_', ' ')}: {getattr(self, key)} ({reason})" for key, reason in self.why.items()]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Chosen:
        return cls(**stored)


def choose(recipe: Recipe, facts: Facts) -> Chosen:
    """Make every choice that does not need the grouped batches.

    Raises  RecipeError where what was asked for cannot be done with these rows
    """
    train, why = recipe.train, {"device": _device_words(facts), "dtype": facts.dtype.reason}
    why["attention"] = facts.attention.reason
    if facts.quantization is not None:
        why["quantization"] = facts.quantization_why
    accumulation, micro_tokens, why["micro_tokens"] = _micro(recipe, facts)
    why["packing"] = facts.packs_why
    rate = train.learning_rate
    if rate is None:
        rate, why["learning_rate"] = LEARNING_RATE[recipe.method], f"the default of method {recipe.method}"
    if train.micro_batch_size is not None:
        why.pop("micro_tokens")
        why["accumulation"] = f"micro_batch_size {train.micro_batch_size} as asked"
    return Chosen(
        device=facts.device,
        dtype=facts.dtype.name,
        autocast=not recipe.trains_adapter and facts.dtype.autocast,
        scaler=facts.dtype.scaler,
        threads=facts.threads,
        attention=facts.attention.name,
        packing=facts.packs,
        micro_tokens=None if train.micro_batch_size is not None else micro_tokens,
        micro_rows=train.micro_batch_size,
        row_tokens=max(facts.longest, facts.width),
        accumulation=accumulation,
        learning_rate=rate,
        gradient_checkpointing=train.gradient_checkpointing,
        seed=train.seed,
        quantization=facts.quantization,
        why=why,
    )


def _device_words(facts: Facts) -> str:
    return f"{facts.threads} threads" if facts.device == "cpu" else "an accelerator is there"


def _micro(recipe: Recipe, facts: Facts) -> tuple[int, int, str]:
    """(forward passes a step, tokens of one, reason)."""
    train = recipe.train
    if train.micro_batch_size is not None:
        rows = train.micro_batch_size * facts.longest
        if train.gradient_accumulation_steps is not None:
            return train.gradient_accumulation_steps, rows, ""
        return max(1, round((train.batch_tokens or rows) / rows)), rows, ""
    batch = train.batch_tokens or facts.longest
    if train.gradient_accumulation_steps is not None:
        tokens = math.ceil(batch / train.gradient_accumulation_steps)
        if tokens < facts.longest:
            raise RecipeError(
                f"train.batch_tokens {batch} in {train.gradient_accumulation_steps} parts leaves {tokens} tokens a "
                f"forward pass, but the longest row has {facts.longest}; raise batch_tokens or lower max_length"
            )
        return train.gradient_accumulation_steps, tokens, "batch_tokens / gradient_accumulation_steps"
    return _fit(batch, facts, train.gradient_checkpointing)


def _fit(batch: int, facts: Facts, checkpointing: bool) -> tuple[int, int, str]:
    """Cut a step into the fewest forward passes whose activations fit, none shorter than the longest row."""
    free = max(0, facts.free_bytes - facts.workspace_bytes)
    room = int(free * MEMORY_SHARE / max(1, facts.activation_bytes // (4 if checkpointing else 1)))
    limit, reason = room, f"activations of {room} tokens fit in {MEMORY_SHARE:.0%} of the free memory"
    if facts.device == "cpu" and room > CPU_FORWARD_TOKENS:
        limit, reason = CPU_FORWARD_TOKENS, "a CPU gains nothing from longer forward passes"
    if limit < facts.longest:
        limit, reason = facts.longest, "the longest row"
    passes = max(1, math.ceil(batch / limit))
    tokens = max(facts.longest, math.ceil(batch / passes))
    if passes == 1:
        reason = "the whole step at once" if tokens == batch else "the longest row is longer than batch_tokens"
    return passes, tokens, reason


def count_steps(chosen: Chosen, recipe: Recipe, batches: int, validates: bool) -> Chosen:
    """The choices that follow from the number of micro-batches an epoch has."""
    train = recipe.train
    each = math.ceil(batches / chosen.accumulation)
    steps = train.max_steps if train.max_steps is not None else max(1, math.ceil((train.epochs or 1) * each))
    warm = train.warmup_steps if train.scheduler != "constant" else 0
    warm = math.ceil(warm * steps) if warm < 1 else int(warm)
    evaluate = min(train.eval_steps or each, steps) if validates else None
    why = chosen.why | ({"eval_steps": "each epoch"} if validates and train.eval_steps is None else {})
    return dataclasses.replace(
        chosen, steps_per_epoch=each, max_steps=steps, warmup_steps=warm, eval_steps=evaluate, why=why
    )


def training_arguments(chosen: Chosen, recipe: Recipe, folder: str | Path, *, fresh: bool) -> Any:
    """The transformers.TrainingArguments of a run; batches come whole from the data set, so its batch size is 1."""
    from transformers import TrainingArguments

    train = recipe.train
    mixed = {"bf16": chosen.autocast and chosen.dtype == "bf16", "fp16": chosen.scaler}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=chosen.max_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=chosen.accumulation,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=chosen.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        logging_steps=min(train.logging_steps, chosen.max_steps),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if chosen.eval_steps else "no",
        eval_steps=chosen.eval_steps,
        eval_on_start=fresh and chosen.eval_steps is not None,
        metric_for_best_model="loss" if chosen.eval_steps else None,
        save_strategy="steps",
        save_steps=train.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        seed=stream(chosen.seed, "dropout"),
        data_seed=stream(chosen.seed, "data"),
        use_cpu=chosen.device == "cpu",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        ddp_find_unused_parameters=False,
        **mixed,
    )


def activation_bytes(config: Any, itemsize: int) -> int:
    """Bytes of activations that one token leaves behind for the backward pass, about: L (14 D + 4 I) elements.

    Counted for a decoder layer (projections, norms, attention output, gated feed-forward); attention scores are not
    kept by the fused kernels. An estimate within a factor of two, used only to choose the micro-batch.
    """
    get = lambda *names: next((v for n in names if (v := getattr(config, n, None))), 0)  # noqa: E731
    layers = get("num_hidden_layers", "n_layer", "num_layers")
    width = get("hidden_size", "n_embd", "d_model")
    inner = get("intermediate_size", "n_inner", "d_ff") or 4 * width
    return max(1, layers * (14 * width + 4 * inner) * itemsize)


def free_bytes(device: str, base: int = 0) -> int:
    """Memory that is free now on the device, in bytes, less what of a base of `base` bytes is still to come into it.

    A base that is mapped from its files (a pre-quantized folder on a CPU) counts as free memory as long as no page of
    it was read, and again whenever the system may drop the page; every step reads all of it, so it has to stay.
    """
    import psutil
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info()[0])
    memory = psutil.Process().memory_info()
    own = memory.rss - getattr(memory, "shared", 0)  # anonymous: what is here and cannot be dropped
    return max(0, int(psutil.virtual_memory().available) - max(0, base - own))
