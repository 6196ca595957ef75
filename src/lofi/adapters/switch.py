"""Which adapter speaks: the model's default, or the choice of one thread.

One `Switch` is shared by every adapted module of a model, so changing the default is one assignment whatever the
number of adapters and layers. A thread's own choice lives in a context variable: it is seen by that thread alone and
is handed to the recomputation of checkpointed activations, which may run in another thread and after the `with` ended.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

from torch import nn

from lofi.errors import TargetError

Choice = str | Iterable[str] | None

_OVERRIDES: ContextVar[tuple[tuple[Switch, tuple[str, ...]], ...]] = ContextVar("lofi_adapter_choice", default=())
_HANDED: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("lofi_handed_down", default=())


class Switch:
    """The adapters that are active in a model: `default` for every thread, unless a thread is inside `using`."""

    def __init__(self) -> None:
        self.default: tuple[str, ...] = ()
        self.overrides = 0  # how many `using` blocks are open anywhere: 0 lets the forward skip the context variable
        self._lock = threading.Lock()

    def current(self) -> tuple[str, ...]:
        """Names of the adapters that this thread's next forward uses."""
        if self.overrides:
            for switch, names in reversed(_OVERRIDES.get()):
                if switch is self:
                    return names
        return self.default

    @contextmanager
    def overridden(self, names: tuple[str, ...]) -> Iterator[None]:
        """This thread uses `names` inside the block."""
        with self._lock:
            self.overrides += 1
        token = _OVERRIDES.set((*_OVERRIDES.get(), (self, names)))
        try:
            yield
        finally:
            _OVERRIDES.reset(token)
            with self._lock:
                self.overrides -= 1

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default}  # open `using` blocks and the lock belong to this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.default = state["default"]


@contextmanager
def handing_down(owner: Any, value: Any) -> Iterator[None]:
    """Inside the block, parts deeper in the model get `value` from `handed_by(owner)`; recomputation gets it again."""
    token = _HANDED.set((*_HANDED.get(), (owner, value)))
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed_by(owner: Any) -> Any:
    """What the forward of an outer part hands to the parts inside; None outside of such a forward."""
    return next((value for giver, value in reversed(_HANDED.get()) if giver is owner), None)


def switch_of(model: nn.Module) -> Switch:
    """The switch of an adapted model; TargetError where the model has no adapter."""
    registry = model.__dict__.get("lofi_registry")
    if registry is None:
        raise TargetError(f"this {type(model).__name__} has no adapter; add one with add_adapter or load_adapter first")
    return registry.switch


def set_adapter(model: nn.Module, name: Choice) -> None:
    """Make one adapter, several (their updates add up) or none (None) the model's default, in O(1).

    Raises TargetError if a name is unknown.
    """
    switch = switch_of(model)
    switch.default = _names(model, name)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names that the calling thread's next forward uses; () for a model without adapters."""
    registry = model.__dict__.get("lofi_registry")
    return registry.switch.current() if registry is not None else ()


@contextmanager
def using(model: nn.Module, name: Choice) -> Iterator[nn.Module]:
    """Inside the block this thread, and no other, uses the named adapter(s); None means the base alone.

    Activations recomputed under non-reentrant gradient checkpointing use the adapter of their forward, also when the
    backward runs after the block or in another thread. Raises TargetError if a name is unknown.
    """
    switch, names = switch_of(model), _names(model, name)
    guard_checkpointing(model, switch)
    with switch.overridden(names):
        yield model


def adapters_off(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Inside the block this thread gets exactly the base, bit for bit; also fine on a model without adapters."""
    return using(model, None) if "lofi_registry" in model.__dict__ else nullcontext(model)


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """A `context_fn` for `torch.utils.checkpoint`: recomputation uses the adapters that the forward used."""
    return functools.partial(_contexts, switch_of(model))


def _contexts(switch: Switch) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _as_now(switch, switch.current(), _HANDED.get())


@contextmanager
def _as_now(switch: Switch, names: tuple[str, ...], handed: tuple[tuple[Any, Any], ...]) -> Iterator[None]:
    token = _HANDED.set(handed)
    try:
        with switch.overridden(names):
            yield
    finally:
        _HANDED.reset(token)


def _names(model: nn.Module, choice: Choice) -> tuple[str, ...]:
    names = () if choice is None else (choice,) if isinstance(choice, str) else tuple(dict.fromkeys(choice))
    known = model.__dict__["lofi_registry"].adapters
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "load_adapter adds one."
            raise TargetError(f"no adapter {name!r} in this model, which has {', '.join(map(repr, known))}; {hint}")
    return names


def guard_checkpointing(model: nn.Module, switch: Switch) -> None:
    """Give the checkpointing that transformers set up inside `model` our contexts; refuse the reentrant kind."""
    if not model.training:
        return
    module: Any
    for module in model.modules():
        function: Any = module.__dict__.get("_gradient_checkpointing_func")
        keywords = getattr(function, "keywords", None)
        if not getattr(module, "gradient_checkpointing", False) or keywords is None or "context_fn" in keywords:
            continue
        if keywords.get("use_reentrant", True):
            raise TargetError(
                "adapters cannot follow reentrant gradient checkpointing, which recomputes without them; "
                "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        contexts = functools.partial(_contexts, switch)
        module._gradient_checkpointing_func = functools.partial(function, context_fn=contexts)
