"""Adapting a module in place: its class gains the mixin `Adapted`, and gives it back on removal.

The module object stays the same, so hooks, tying, `isinstance` and parameter names do. `Adapted` decides one thing:
whether any active adapter has a part here; what the part computes is the part's affair (`Part.run`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lofi.adapters.switch import Switch


class Part(nn.Module):
    """What one adapter holds for one module: its trainable tensors, how they act and how they merge."""

    kind: ClassVar[str]
    """One word for reports: linear, embedding, experts, rows, bias or copy."""
    rank: int | None = None
    """Rank R of the update, None for parts that are not low-rank."""
    scale: float | None = None
    """Effective multiplier of B A, None for parts that are not low-rank."""
    unmergeable: ClassVar[str | None] = None
    """Why no weight can hold what this part computes; None where a merge can."""
    order: ClassVar[int] = 0
    """Where parts of several classes meet: 0 acts on the module's weights (and may not ask `base`), 1 shifts its
    output, 2 is a function of that."""

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output under `parts` (all of this class, at least one); `base` is the module's own forward."""
        raise NotImplementedError

    def changes(self) -> list[str]:
        """Names of the module's own tensors that a merge rewrites."""
        raise NotImplementedError

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        """The new value of one tensor: summed in float32 (float64 for float64), rounded once to the base's dtype."""
        raise NotImplementedError

    def zero_delta(self) -> bool | None:
        """True if the part changes nothing at all; None where that is no fault (biases, heads, token rows)."""
        return None

    def on_attach(self, module: Any) -> None:
        """Called when the part has been put on its module, for what must be told to others; `on_detach` undoes it."""

    def on_detach(self, module: Any) -> None:
        """Called before the part is taken off."""

    def exported(self) -> dict[str, Tensor]:
        """What a saved adapter holds of this part: the trained tensors, unless the file's form is another."""
        return dict(self.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the trained tensors and the persistent buffers, under their names here."""
        return dict(self.state_dict(keep_vars=True))


class Adapted:
    """Mixin in front of a module's own class: runs the active parts, or the untouched base when there is none."""

    adapters: nn.ModuleDict
    switch: Switch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = super().forward  # type: ignore[misc]
        held = self._modules["adapters"]._modules  # type: ignore[attr-defined]  # past two Python calls each: hot
        parts: list[Any] = [held[name] for name in self.switch.current() if name in held]
        if not parts:
            return base(*args, **kwargs)
        if len(parts) == 1:
            return type(parts[0]).run(self, parts, base, *args, **kwargs)
        return _nested(self, parts, base)(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (own_class(type(self)),), self.__dict__


def _nested(module: Any, parts: list[Any], base: Callable[..., Any]) -> Callable[..., Any]:
    """Parts of one class run together; those of another class run around those before them in `order`."""
    by_class: dict[type, list[Any]] = {}
    for part in parts:
        by_class.setdefault(type(part), []).append(part)
    for cls, group in sorted(by_class.items(), key=lambda item: item[0].order):  # type: ignore[attr-defined]
        base = functools.partial(cls.run, module, group, base)  # type: ignore[attr-defined]
    return base


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with adapters beside it."""


class AdaptedEmbedding(Adapted, nn.Embedding):
    """An embedding with adapters beside it."""


_ADAPTED: dict[Any, Any] = {nn.Linear: AdaptedLinear, nn.Embedding: AdaptedEmbedding}


def adapted_class(cls: Any) -> Any:
    """The class `cls` takes when adapted: one of the two above, else a subclass made once and pickled by its origin."""
    if cls not in _ADAPTED:
        _ADAPTED[cls] = type(f"Adapted{cls.__name__}", (Adapted, cls), {"__module__": cls.__module__})
    return _ADAPTED[cls]


def own_class(cls: type) -> type:
    """The class a module had before it was adapted."""
    return cls.__mro__[cls.__mro__.index(Adapted) + 1] if issubclass(cls, Adapted) else cls


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    made = adapted_class(cls)
    return made.__new__(made)


def attach_part(module: Any, name: str, part: Part, switch: Switch) -> None:
    """Hold `part` for adapter `name` at `module`, adapting the module's class if this is its first part."""
    if not isinstance(module, Adapted):
        module.__class__ = adapted_class(type(module))
        module.adapters = nn.ModuleDict()
        module.switch = switch
    module.adapters[name] = part.train(module.training)
    part.on_attach(module)


def detach_part(module: Any, name: str) -> None:
    """Forget adapter `name` at `module`; the last part to go gives the module its own class back."""
    module.adapters[name].on_detach(module)
    del module.adapters[name]
    if not module.adapters:
        del module.adapters, module.switch
        module.__class__ = own_class(type(module))


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named parameters and persistent buffers of the base alone, each storage once, under their original names."""
    seen: set[int] = set()
    for path, module in named_base_modules(model):
        persistent = ((k, b) for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set)
        for key, tensor in (*module._parameters.items(), *persistent):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{path}.{key}" if path else key), tensor


def named_base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the adapters' own modules."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[int] = set()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = [
            (f"{path}.{key}" if path else key, child)
            for key, child in module._modules.items()
            if child is not None and not (key == "adapters" and isinstance(module, Adapted))
        ]
        stack.extend(reversed(children))


def float_sum(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta, added in float32 (float64 where either is) and rounded once to the base's dtype."""
    wide = torch.float64 if torch.float64 in (base.dtype, delta.dtype) else torch.float32
    return (base.detach().to(wide) + delta.to(wide)).to(base.dtype)
