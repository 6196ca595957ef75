"""A second set of modules over the same weights, so that an adapter can be tried while the first set is at work.

The twin's parameters and buffers are other objects over the same storage (buffers are the very same): loading, training
flags and adapters of one are never seen by the other, and no weight is held twice. Does not know what it is for.
Rejected: trying adapters on the model that serves (a module's class and its table of parts change under a running
forward), and a second load of the checkpoint (twice the memory, and quantized bases would be quantized again).
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from lofi.adapters.surgery import Adapted, own_class

Model = TypeVar("Model", bound=nn.Module)

_RECORDS = ("lofi_registry", "lofi_bank")
"""What a model is told of its adapters, which the twin does not have."""


def twin(model: Model) -> Model:
    """The same model without its adapters: own modules and configs, every weight and buffer in the same storage.

    The twin's parameters are frozen; weights that are tied in the model are tied in the twin. A model that is moved or
    cast afterwards leaves its twin where it was.
    Exact   the same output bit for bit, dense or quantized
    """
    shared: dict[int, object] = {id(p): _same_storage(p) for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    for module in model.modules():
        if isinstance(module, Adapted):
            shared |= {id(module.adapters): None, id(module.switch): None}
    shared |= {id(held): None for name in _RECORDS if (held := model.__dict__.get(name)) is not None}
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        if isinstance(module, Adapted):
            del module.adapters, module.switch
            module.__class__ = own_class(type(module))
    for name in _RECORDS:
        made.__dict__.pop(name, None)
    return made


def _same_storage(parameter: nn.Parameter) -> Tensor:
    if type(parameter) is not nn.Parameter:
        return parameter  # a class of its own may hold more than its storage
    return nn.Parameter(parameter.detach(), requires_grad=False)
