"""How the two factors of LoRA learn: B quicker than A (LoRA+), and never one of them alone after a split weight.

LoRA+ (arXiv 2402.12354) gives B `ratio` times the learning rate of A; 16 is the paper's advice, 1 is plain
LoRA. The optimizer is the Trainer's own: its
groups are split, so decay, options, schedule and checkpoints stay what they are. Embeddings' B too. What is neither A
nor B (heads, biases, magnitudes) learns at the plain rate.
Rejected: an optimizer of our own beside the Trainer's, which would have to know every `optim` it can be asked for.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lofi.adapters.config import AdapterConfig
from lofi.adapters.registry import adapters_of
from lofi.errors import RequestError
from lofi.files.updates import lora_of

B_FACTORS = ("lora_B", "lora_embedding_B")
_COLLAPSES = ("olora", "pissa")


def ratio_fault(ratio: float, configs: list[AdapterConfig]) -> str | None:
    """Why training with this ratio is refused; None where LoRA is trained and the ratio is one."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
        return f"loraplus_lr_ratio is {ratio!r}, expected a finite number above 0; 16 is the LoRA+ paper's advice"
    if not any(lora_of(config) for config in configs):
        methods = ", ".join(config.method for config in configs) or "full fine-tuning"
        return f"loraplus_lr_ratio is set, but {methods} has no LoRA factors; leave it out, or train with LoRA"
    return None


def split_rates(optimizer: Any, model: nn.Module, ratio: float) -> None:
    """Give every factor B of the optimizer `ratio` times its group's learning rate, in a group of its own.

    eta_B = ratio * eta_A   LoRA+ (arXiv 2402.12354), section 4. Call before a scheduler reads the rates.
    Raises  RequestError for an optimizer that sets its own rate (Adafactor)
    """
    quick = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in B_FACTORS}
    groups, added = [], []
    for group in optimizer.param_groups:
        if group["lr"] is None:
            raise RequestError("loraplus_lr_ratio needs an optimizer that is given its learning rate; take optim=adamw")
        some = [p for p in group["params"] if id(p) in quick]
        rest = [p for p in group["params"] if id(p) not in quick]
        groups += [{**group, "params": rest}] if rest else []
        added += [{**group, "params": some, "lr": group["lr"] * ratio}] if some else []
    optimizer.param_groups[:] = []
    for group in (*groups, *added):
        optimizer.add_param_group(group)


def refuse_frozen_factor(model: nn.Module) -> None:
    """Refuse LoRA whose start split the weight (OLoRA, PiSSA) if one factor of it is frozen.

    The frozen factor holds the weight's largest directions, so the other could only rescale those: GSM8K falls from
    57.3 to 10.6 (PiSSA) and 3.1 (OLoRA) where A is frozen, as LoRA-FA (arXiv 2308.03303) does.
    Raises  RequestError naming the factor and the remedy
    """
    for adapter in adapters_of(model).values():
        lora = lora_of(adapter.config)
        start = str(lora.init_lora_weights) if lora is not None else ""
        if not start.startswith(_COLLAPSES):
            continue
        for path, part in adapter.parts.items():
            for name, parameter in part.named_parameters():
                if part.rank is not None and not parameter.requires_grad and "lora_" in name:
                    raise RequestError(
                        f"{path}.{name} is frozen, but after init_lora_weights {start!r} both factors must train, or "
                        "the adapter collapses onto the weight's largest directions; unfreeze it, or start from True"
                    )
