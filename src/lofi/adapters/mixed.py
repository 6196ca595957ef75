"""Several methods as one adapter: the parts of each, side by side, under one name, in one folder.

LoRA with prefix tuning is LoRA+PL of LoRA (arXiv 2106.09685), appendix E; with prompt tuning it is LoRA+PE.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lofi.adapters.attach import resolve as resolve_one
from lofi.adapters.methods import MixedConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part
from lofi.errors import TargetError


def resolve(model: nn.Module, config: MixedConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The parts of every config.

    Raises  TargetError where two methods adapt the same module, or one of them cannot take this model
    """
    whole = Resolved({})
    for one in config.configs:
        found = resolve_one(model, replace(one, task_type=config.task_type), saved)
        _refuse_overlap(whole.parts, found.parts)
        whole.parts |= found.parts
        whole.left_out += found.left_out
        whole.notes += found.notes
    return whole


def _refuse_overlap(held: dict[str, Part], more: dict[str, Part]) -> None:
    """Two methods on one module, or one inside what the other replaces, would hide each other."""
    clash = sorted(held.keys() & more.keys())
    if clash:
        raise TargetError(f"two methods of one adapter adapt {clash[0]}; leave it out of one of them")
    for whole, others in ((held, more), (more, held)):
        for path in (path for path, part in whole.items() if part.kind == "copy"):
            inside = [other for other in others if other.startswith(f"{path}.")]
            if inside:
                raise TargetError(f"{path} trains in full and {inside[0]} is adapted inside it; choose one of them")
