"""BitFit: copies of every bias train, and nothing else.   Ben Zaken, Goldberg and Ravfogel (arXiv 2106.10199), sec. 3

Each is a `BiasShift`, so the frozen bias keeps its bits and a merge writes the trained one in its place. Linears and
normalisations count, quantized ones too; a bias that a module adds in a way of its own is left out and reported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lofi.adapters.copies import BiasShift, shiftable
from lofi.adapters.methods import BitFitConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part, named_base_modules
from lofi.errors import TargetError


class TrainedBias(BiasShift):
    """A bias that trains for its own sake, so one that has not moved from its module's is dead."""

    def on_attach(self, module: Any) -> None:
        self._frozen = (module,)  # in a tuple, or torch would register the module as a part of this one

    def zero_delta(self) -> bool | None:
        (module,) = self._frozen
        return bool(torch.equal(self.bias, module.bias.to(self.bias)))


def resolve(model: nn.Module, config: BitFitConfig, saved: dict[str, nn.Module]) -> Resolved:
    """A copy of every bias outside the modules that train in full.

    Raises  TargetError on a model without biases
    """
    covered = tuple(f"{path}." for path in saved)
    parts: dict[str, Part] = {}
    left_out: list[tuple[str, str]] = []
    for path, module in named_base_modules(model):
        if path in saved or path.startswith(covered):
            continue
        if path and shiftable(module):
            parts[path] = TrainedBias(module)
        else:
            left_out += [
                (f"{path}.{name}", f"a bias that a {type(module).__name__} adds in a way of its own")
                for name, parameter in module._parameters.items()
                if parameter is not None and name.endswith("bias")
            ]
    if not parts:
        raise TargetError(
            f"BitFit trains biases, but this {type(model).__name__} has none (as Llama and most models since); "
            "use lora, or another method"
        )
    return Resolved(parts, left_out)
