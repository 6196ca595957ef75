"""One LoRA training step, r=16 on every linear, as two libraries take it: LofiTrainer over lofi's layers, and
transformers' Trainer over PEFT and bitsandbytes.

A step is the trainer's own `training_step` (forward, loss, backward), gradient clipping, the optimizer (the trainer's
default) and zeroing gradients. Dropout 0, adapters in float32, no compilation. The peer at its best: bf16 autocast
(`bf16=True`), no cast of norms to float32. Our side as `lofi train` sets it up, which chooses the attention by the
length of the rows; the peer has transformers' default.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

RANK = 16


class Step:
    """A trainer, its prepared model, and one batch of tokens that it steps on again and again."""

    def __init__(self, trainer: Any, shape: tuple[int, int]) -> None:
        self.trainer = trainer
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        vocabulary = trainer.model.config.vocab_size
        ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))  # (N, T)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.items = torch.tensor(shape[0] * (shape[1] - 1))
        self.model.train()

    def __call__(self) -> float:
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> float:
        """Forward and backward; the gradients stay."""
        loss = self.trainer.training_step(self.model, dict(self.inputs), num_items_in_batch=self.items)
        return float(loss)

    def update(self) -> None:
        """Clip, let the optimizer step, and drop the gradients."""
        self.trainer._clip_grad_norm(self.model)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def ours(folder: Path, kind: str | None, shape: tuple[int, int], *, checkpointing: bool = False) -> Step:
    """lofi: `kind` None (bf16), "nf4" or "int8"; a folder that is quantized already takes None."""
    import lofi
    from lofi.models import checkpointing as recompute

    model = lofi.load_model(folder, quantization=kind)
    lofi.add_adapter(model, lofi.LoraConfig(r=RANK, lora_alpha=2 * RANK))
    _attend(model, shape[1])
    if checkpointing:
        recompute.enable(model)
    return Step(lofi.LofiTrainer(model=model, args=_arguments(bf16=False)), shape)


def _attend(model: Any, longest: int) -> None:
    """The attention that `lofi train` chooses for rows of this length."""
    from lofi.models.attention import choose_attention, set_attention
    from lofi.train.settings import CPU_FORWARD_TOKENS, free_bytes

    chosen = choose_attention(
        model,
        compute=torch.bfloat16,
        row_tokens=longest,
        forward_tokens=CPU_FORWARD_TOKENS,
        free_bytes=free_bytes(str(model.device)),
    )
    set_attention(model, chosen.name)


def theirs(folder: Path, kind: str, shape: tuple[int, int], *, checkpointing: bool = False) -> Step:
    """PEFT over bitsandbytes' layers, in transformers' Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization(kind))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Step(Trainer(model=model, args=_arguments(bf16=True)), shape)


def quantization(kind: str) -> Any:
    """The BitsAndBytesConfig of "nf4" (double quantization, bf16 products) or "int8"."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _arguments(*, bf16: bool) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written: no checkpoint, no log
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        log_level="error",
    )
