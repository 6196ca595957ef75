"""The last k blocks trained in full, as copies: "FT top2" of LoRA (arXiv 2106.09685, table 3), after Li and Liang.

Only the blocks: the paper's 25.19M parameters on GPT-2 medium are its last two blocks, and the final norm after them
stays frozen. Of an encoder-decoder they are the decoder's. A copy computes in the dtypes of the block that it stands
for, with its float32 masters rounded on the way, so a fresh copy is its block bit for bit, and so is a merged one.
Rejected: thawing the blocks in place, which would not leave the base as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lofi.adapters.blocks import stacks
from lofi.adapters.copies import ModuleCopy, holds_codes
from lofi.adapters.methods import LastLayersConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part
from lofi.errors import TargetError

_ROUNDED = threading.RLock()  # torch puts rounded weights into the copy for the length of its forward


class BlockCopy(ModuleCopy):
    """A trainable copy of one block, run in its place and in its dtypes."""

    def on_attach(self, module: Any) -> None:
        self._frozen = (module,)  # in a tuple, or torch would register the block as a part of this one

    def zero_delta(self) -> bool | None:
        (module,) = self._frozen
        return all(torch.equal(p, module.get_parameter(name).to(p)) for name, p in self.copy.named_parameters())

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (part,) = ModuleCopy.alone(module, parts)
        dtypes = {name: module.get_parameter(name).dtype for name, _ in part.copy.named_parameters()}
        if all(dtype == torch.float32 for dtype in dtypes.values()):
            return part(*args, **kwargs)
        with _ROUNDED:
            rounded = {f"copy.{name}": p.to(dtypes[name]) for name, p in part.copy.named_parameters()}
            return torch.func.functional_call(part, rounded, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's own forward: checkpointing, and what records outputs, already stand around the block itself."""
        if getattr(self.copy, "gradient_checkpointing", False):
            self.copy.gradient_checkpointing = False  # type: ignore[assignment]
        return self.copy.forward(*args, **kwargs)


def resolve(model: nn.Module, config: LastLayersConfig, saved: dict[str, nn.Module]) -> Resolved:
    """A copy of each of the last k blocks.

    Raises  TargetError where the model has fewer blocks, or none that are known, or where their weights are quantized
    """
    path, stack = _stack(model)
    count, wanted = len(stack), config.num_layers
    if wanted > count:
        raise TargetError(
            f"num_layers is {wanted}, but this {type(model).__name__} has {count} blocks in {path}; "
            f"give a number from 1 to {count}, or use method full"
        )
    chosen = {f"{path}.{index}": stack[index] for index in range(count - wanted, count)}
    for name, block in chosen.items():
        if holds_codes(block):
            raise TargetError(
                f"{name} holds quantized weights, which cannot be trained in full; load the base dense, or use lora"
            )
        inside = [other for other in saved if other.startswith(f"{name}.")]
        if inside:
            raise TargetError(f"modules_to_save names {inside[0]}, which lies in the trained {name}; leave it out")
    parts: dict[str, Part] = {name: BlockCopy(block) for name, block in chosen.items()}
    return Resolved(parts)


def _stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack whose last block is nearest the output: the decoder's where there is one beside an encoder."""
    found = stacks(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        found = {path: stack for path, stack in found.items() if "decoder" in path.split(".")} or found
    if not found:
        raise TargetError(
            f"this {type(model).__name__} keeps no list of blocks, so it has no last layers; "
            "name what is to train in modules_to_save of another method"
        )
    return max(found.items(), key=lambda item: len(item[1]))
