"""One training step of a bf16 model with LoRA r=16 on all linears, PEFT's layers over lofi's, with and without dropout.

Both sides run the same model, tokens, optimizer and loss (the model's own), adapters in float32, no compilation; PEFT
under bf16 autocast, as it needs for float32 adapters over a bf16 base. What is compared is the layers alone; the whole
trainer is another claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lofi
from bench.checkpoints import STEP
from bench.claim import line
from bench.paired import paired

TOKENS = (1, 256)


def run(rounds: int = 12) -> list[dict[str, Any]]:
    """Step time of PEFT over lofi, dropout 0 and 0.05."""
    rows = []
    for dropout in (0.0, 0.05):
        ratio = paired(_peft(dropout), _lofi(dropout), rounds=rounds, warm_up=2)
        what = f"PEFT step / lofi step, dropout {dropout}, {TOKENS[0]} x {TOKENS[1]} tokens"
        rows.append(line(what, ratio, peer=1.0, times_ms={"PEFT": ratio.a_ms, "lofi": ratio.b_ms}))
    return rows


def _lofi(dropout: float) -> Callable[[], object]:
    model = STEP.model(torch.bfloat16)
    lofi.add_adapter(model, lofi.LoraConfig(r=16, lora_dropout=dropout))
    return _stepper(model, autocast=False)


def _peft(dropout: float) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return _stepper(get_peft_model(STEP.model(torch.bfloat16), config), autocast=True)


def _stepper(model: Any, *, autocast: bool) -> Callable[[], object]:
    ids = torch.randint(0, 8192, TOKENS, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return step
