"""BitFit: copies of every bias train, and nothing else.   Ben Zaken, Goldberg and Ravfogel (arXiv 2106.10199)

Each is a `BiasShift`, so the frozen bias keeps its bits and a merge writes the trained one in its place.
"""

from __future__ import annotations

from torch import nn

from lofi.adapters.copies import BiasShift, shiftable
from lofi.adapters.methods import BitFitConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part, named_base_modules
from lofi.errors import TargetError


def resolve(model: nn.Module, config: BitFitConfig, saved: dict[str, nn.Module]) -> Resolved:
    """A copy of every bias outside the modules that train in full.

    Raises  TargetError on a model without biases
    """
    covered = tuple(f"{path}." for path in saved)
    parts: dict[str, Part] = {}
    for path, module in named_base_modules(model):
        if path and path not in saved and not path.startswith(covered) and shiftable(module):
            parts[path] = BiasShift(module)
    if not parts:
        raise TargetError(
            f"BitFit trains biases, but this {type(model).__name__} has none (as Llama and most models since); "
            "use lora, or another method"
        )
    return Resolved(parts)
