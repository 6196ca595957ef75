"""Where a model's decoder is and how its attention modules take a cache and a mask, known by their forwards.

A module counts as self-attention that can be given keys if its forward goes through transformers' attention interface,
takes a cache and a mask, and is causal. Knows transformers' argument names; does not know what is given.
Rejected: a list of families, which would be wrong for every class written since.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

from torch import nn

from lofi.adapters.surgery import named_base_modules, own_class
from lofi.errors import TargetError

_CACHES, _MASKS = ("past_key_values", "layer_past"), ("attention_mask", "mask")
_MIXTURES = ("chunked_attention", "linear_attention", "recurrent", "mamba")


class Decoder(NamedTuple):
    """Where the seam lies in one model: the decoder, its self-attention modules in order, and its position table."""

    path: str
    module: Any
    attentions: list[str]
    positions: str | None
    """Module that turns position_ids into vectors by itself (BART, OPT); None where the decoder takes them."""


@functools.cache
def signature(cls: type) -> inspect.Signature:
    """Of the class's forward, `self` included."""
    return inspect.signature(cls.forward)  # type: ignore[attr-defined]


def called(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call of the module's own forward."""
    return signature(own_class(type(module))).bind_partial(module, *args, **kwargs)


def by_name(call: inspect.BoundArguments) -> dict[str, Any]:
    """Every argument by its name, as the decorators of transformers' forwards want them."""
    names = iter(call.arguments.items())
    next(names)  # the module
    return {k: v for k, v in names if k != "kwargs"} | call.arguments.get("kwargs", {})


@functools.cache
def cache_and_mask(cls: type) -> tuple[str | None, str | None]:
    """What an attention class calls its cache and its mask; None for what it does not take."""
    names = signature(cls).parameters
    return next((n for n in _CACHES if n in names), None), next((n for n in _MASKS if n in names), None)


def find_decoder(model: nn.Module, method: str) -> Decoder:
    """The decoder and its self-attention modules, known by what their forwards take and call.

    Raises  TargetError where there is none that virtual keys and values can be given to, with the reason
    """
    modules = dict(named_base_modules(model))
    attentions = [path for path, module in modules.items() if _takes_keys(module)]
    paths = [p for p, m in modules.items() if p and _decodes(m) and attentions and _all_within(p, attentions)]
    if not paths:
        raise TargetError(_no_decoder(model, modules, method))
    path = max(paths, key=len)
    _refuse_mixtures(modules[path], len(attentions), method)
    table = f"{path}.embed_positions"
    by_table = table in modules and "position_ids" in signature(own_class(type(modules[table]))).parameters
    return Decoder(path, modules[path], attentions, table if by_table else None)


def _takes_keys(module: Any) -> bool:
    """A causal self-attention that goes through transformers' attention interface and takes a cache and a mask."""
    forward = inspect.unwrap(getattr(own_class(type(module)), "forward", None) or (lambda: None))
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if "ALL_ATTENTION_FUNCTIONS" not in names or not getattr(module, "is_causal", True):
        return False
    return None not in cache_and_mask(own_class(type(module)))


def _decodes(module: Any) -> bool:
    names = signature(own_class(type(module))).parameters if hasattr(module, "config") else {}
    return {"inputs_embeds", "past_key_values"} <= set(names)


def _all_within(path: str, inner: list[str]) -> bool:
    return all(one.startswith(f"{path}.") for one in inner)


def _no_decoder(model: Any, modules: dict[str, Any], method: str) -> str:
    deaf = sorted({type(module).__name__ for module in modules.values() if _keeps_keys(module)})
    if not deaf:
        return f"{method} tuning needs a decoder's keys and values, which this {type(model).__name__} does not have"
    return (
        f"{method} tuning gives keys and values through transformers' attention interface, which {', '.join(deaf)} "
        "does not use; use lora, houlsby or another method"
    )


def is_encoder(model: Any) -> bool:
    """Whether the model reads both ways and writes nothing: no attention in it keeps keys and values."""
    generates = getattr(model, "can_generate", lambda: False)()
    return not generates and not any(_keeps_keys(module) for _, module in named_base_modules(model))


def _keeps_keys(module: Any) -> bool:
    """An attention that takes a cache, and none that reads both ways (those of BERT take one too, for other uses)."""
    if "ttention" not in type(module).__name__ or cache_and_mask(own_class(type(module)))[0] is None:
        return False
    return not any(getattr(inner, "is_causal", None) is False for inner in module.modules())


def _refuse_mixtures(decoder: Any, attentions: int, method: str) -> None:
    config = decoder.config.get_text_config()
    kinds = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind in _MIXTURES})
    layers = getattr(config, "num_hidden_layers", attentions)
    if kinds or getattr(config, "kv_lora_rank", None):
        raise TargetError(
            f"{method} tuning needs plain keys and values in every layer, but {type(decoder).__name__} has "
            f"{', '.join(kinds) or 'compressed ones (kv_lora_rank)'}; use lora or another method"
        )
    if attentions != layers and not getattr(config, "is_encoder_decoder", False):
        raise TargetError(
            f"{method} tuning found {attentions} self-attention modules in the {layers} layers of "
            f"{type(decoder).__name__}; use lora or another method"
        )
