"""The base's weights behind an adapter's updates, each turned as B A stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lofi.adapters.linear import product_of
from lofi.adapters.merge import dense_tensor
from lofi.errors import AdapterFileError
from lofi.files.adapter_folder import AdapterFolder
from lofi.files.updates import LowRank, lora_of


class BaseWeights:
    """Gives the weight (O, I) of a model that an update is added to; quantized ones by what their codes stand for."""

    def __init__(self, model: Any, folder: AdapterFolder):
        config = lora_of(folder.config)
        self.model, self.parameters = model, tuple((config and config.target_parameters) or ())

    def __call__(self, update: LowRank) -> Sequence[Tensor]:
        """One weight, or one for each expert.

        Raises  AdapterFileError where the model has no such weight, or one of another shape
        """
        path, _, named = update.path.partition(".pairs.")
        try:
            module: Any = self.model.get_submodule(path)
        except AttributeError:
            raise AdapterFileError(
                f"this base has no {path}, which the adapter updates; give the base it is for"
            ) from None
        if update.kind == "experts":
            stacked = dense_tensor(module, named or self._expert_name(module, update)).detach()
            weights = [weight.t() if module.is_transposed else weight for weight in stacked]
        else:
            weight = dense_tensor(module, "weight").detach()
            product = product_of(module)
            turned = update.kind == "embedding" or (product is not None and product.transposed)
            weights = [weight.t() if turned else weight]
        shape = tuple(weights[0].shape)
        if shape != update.shape or len(weights) != len(update.pairs):
            raise AdapterFileError(f"{path} is {shape} in this base, but the update is {update.shape}; give its base")
        return weights

    def _expert_name(self, module: Any, update: LowRank) -> str:
        """PEFT wraps the parameters of one module in the order they were registered; the last one is outermost."""
        held = [*module._parameters, *getattr(module, "packed_shapes", {})]
        names = {parameter.rpartition(".")[2] for parameter in self.parameters}
        order = [name for name in dict.fromkeys(held) if name in names]
        return order[len(order) - 1 - update.depth]
