"""The proof of the first steps: everything that should learn has moved, or the run stops and names what did not.

Of a pair of factors the one that starts at zero moves at the first update (its gradient carries the other factor), the
other at the second, once the first is no longer zero (LoRA, arXiv 2106.09685, section 4.1); where both start in use
(OLoRA, PiSSA) both move at the first, as DoRA's magnitudes do. Biases, heads and copies
move at the first. Only updates with a non-zero learning rate that were taken count; a shorter run proves what it can.
Not an error, but reported: experts that no token was routed to, rows of new tokens that no batch held, biases of keys
(which shift all of a query's scores alike, so that the softmax does not feel them where positions do not rotate them).
Without adapters (full fine-tuning) tensors are watched through a sample of their values, and only if none of them
moved is that an error: a model may hold parameters that its task never uses.
Rejected: looking at gradients instead of weights (an optimizer that skips a parameter group would pass).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lofi.adapters.registry import adapters_of
from lofi.errors import ProofError

UPDATES = 2
_SAMPLE = 1024  # values watched of each tensor in full fine-tuning
_PARTNER = {"lora_A": "lora_B", "lora_B": "lora_A"}
_PARTNER |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}
_PARTNER |= dict.fromkeys(("down", "down_bias", "norm_weight", "norm_bias"), "up")  # if U starts at zero

_KEY_BIAS = re.compile(r"\.(k|key)(_[a-z]+)?\.adapters\.[^.]+\.bias$")


class FirstSteps(TrainerCallback):
    """Watches the first two updates that count; `lines` says what was proved.

    Raises  ProofError naming the tensors that did not move
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lines: list[str] = []
        self.updates = 0
        self.done = False
        self._counts = False
        self._before: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = state.global_step > 0  # a resumed run was proved when it began

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._counts = not self.done and any(group["lr"] for group in optimizer.param_groups)
        if self._counts and not self._before:
            self._before = {name: tensor.detach().clone() for name, tensor in watched(self.model).items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not self._counts or getattr(optimizer, "step_was_skipped", False):
            return
        self.updates += 1
        self._judge()
        if self.updates == UPDATES:
            self.done, self._before = True, {}

    def _judge(self) -> None:
        now = watched(self.model)
        still = [name for name, tensor in now.items() if torch.equal(tensor, self._before[name])]
        if not adapters_of(self.model):
            self._judge_full(still)
            return
        late = {name for name in now if _waits(name, self._before)} if self.updates == 1 else set()
        excused = [name for name in still if _excusable(name, now.keys() - set(still))]
        dead = [name for name in still if name not in late and name not in excused]
        if dead:
            raise ProofError(_dead(dead, self.updates, len(now)))
        if self.updates == UPDATES:
            self.lines += [f"first steps: all {len(now) - len(excused)} trained tensors moved", *_idle(excused, now)]

    def _judge_full(self, still: list[str]) -> None:
        if len(still) == len(self._before):
            raise ProofError(_dead(still, self.updates, len(still)))
        if self.updates == UPDATES:
            words = f"first steps: {len(self._before) - len(still)} of {len(self._before)} tensors moved"
            self.lines.append(f"{words}; never used by this task: {_names(still)}" if still else words)


def watched(model: nn.Module) -> dict[str, Tensor]:
    """What a model trains, by name; stacks of experts one by one; a sample of each tensor where all of it trains."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not adapters_of(model):
        return {name: _sample(p.detach()) for name, p in trained.items()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        if ".pairs." in name:  # (E, R, I) or (E, O, R)
            tensors |= {f"{name}[{e}]": t for e, t in enumerate(parameter.detach())}
        else:
            tensors[name] = parameter.detach()
    return tensors


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


def _waits(name: str, before: dict[str, Tensor]) -> bool:
    """Whether a factor's partner starts at zero, so that its own first gradient is zero too."""
    stem, _, leaf = name.rpartition(".")
    leaf, bracket, index = leaf.partition("[")
    partner = before.get(f"{stem}.{_PARTNER[leaf]}{bracket}{index}") if leaf in _PARTNER else None
    return partner is not None and not partner.any()


def _excusable(name: str, moved: set[str]) -> bool:
    """New tokens may not have been seen, keys need no bias, an expert may not be reached if another one was."""
    if name.endswith(".rows") or _KEY_BIAS.search(name):
        return True
    stack = name.partition("[")[0].replace("lora_A", "lora_B")
    return name.endswith("]") and any(other.startswith(f"{stack}[") for other in moved)


def _dead(names: list[str], updates: int, total: int) -> str:
    when = "the first update" if updates == 1 else "two updates"
    return (
        f"{len(names)} of {total} trained tensors did not move after {when}: {_names(names)}; "
        "the model's forward does not use them, leave them out of target_modules"
    )


def _idle(names: list[str], now: dict[str, Tensor]) -> list[str]:
    experts = sorted({name for name in names if name.endswith("]")})
    rows = [name for name in names if name.endswith(".rows")]
    keys = [name for name in names if _KEY_BIAS.search(name)]
    lines = []
    if experts:
        stacks = sum(name.endswith("]") for name in now)
        lines.append(
            f"first steps: no token was routed to {len(experts)} of {stacks} expert factors: {_names(experts)}"
        )
    if keys:
        lines.append(f"first steps: the softmax does not feel {_names(keys)}")
    if rows:
        lines.append(f"first steps: no batch held a token of {_names(rows)}")
    return lines


def _names(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
