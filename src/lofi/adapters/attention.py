"""Keys and values before those of a layer's tokens: the seam that prefix tuning and prompt tuning of decoders share.

An owner (`VirtualTokens`) on the decoder makes, once a forward, the keys and values of P virtual tokens for every
layer, counts the positions of the real tokens from P on, and hands both down to a `FrontKeys` part on each
self-attention module. That gives the attention a cache object which puts the virtual keys and values first, and a mask
as much wider. The user's own cache never holds them, so caches of every kind, left padding, packed rows, labels and
recomputed activations work as without. Knows how attention modules of transformers take a cache and a mask, by their
signatures; does not know what the keys and values are.
Rejected: filling the user's cache, as PEFT does (lost under gradient checkpointing, blind to packed rows, and it lets
the prefix slide out of sliding caches by how long the row is padded); a second attention implementation registered
with transformers (one for each that exists, and a model-wide switch that others set again).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lofi.adapters.methods import VIRTUAL_UNMERGEABLE
from lofi.adapters.surgery import Part, named_base_modules, own_class
from lofi.adapters.switch import guard_checkpointing, handed_by, handing_down
from lofi.errors import TargetError

Pair = tuple[Tensor, Tensor]
"""One layer's virtual keys and values, each (1, H, P, K); H counts key/value heads."""

_CACHES, _MASKS = ("past_key_values", "layer_past"), ("attention_mask", "mask")
_IMPLEMENTATIONS = ("sdpa", "eager")
_MIXTURES = ("chunked_attention", "linear_attention", "recurrent", "mamba")


class Decoder(NamedTuple):
    """Where the seam lies in one model: the decoder, its self-attention modules in order, and its position table."""

    path: str
    module: Any
    attentions: list[str]
    positions: str | None
    """Module that turns position_ids into vectors by itself (BART, OPT); None where the decoder takes them."""


class Front(NamedTuple):
    """What an owner hands down: a pair for each layer, and the positions (N, T) of the real tokens, counted from P."""

    pairs: list[Pair]
    positions: Tensor

    @property
    def length(self) -> int:
        """P."""
        return self.pairs[0][0].shape[2]


class Recording(dict[int, Pair]):
    """Handed down in place of a Front while virtual tokens are computed: layer index -> its keys and values."""


class VirtualTokens(Part):
    """The owner of P virtual tokens, on the decoder module."""

    kind = "virtual tokens"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE
    length: int
    counts = True
    """Whether it counts the tokens from P on; else a `ShiftedPositions` does, or each layer by its cache (T5)."""

    def pairs(self, module: Any) -> list[Pair]:
        """Keys and values for every layer of `module`, the decoder."""
        raise NotImplementedError

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        owner = only(parts)
        if isinstance(handed_by(owner), Recording):
            return base(*args, **kwargs)
        if module.training and torch.is_grad_enabled():
            guard_checkpointing(module, module.switch)
        call = called(module, args, kwargs)
        positions = real_positions(call.arguments, owner.length)
        if owner.counts:
            call.arguments["position_ids"] = positions
        with handing_down(owner, Front(owner.pairs(module), positions)):
            return base(**by_name(call))

    def on_attach(self, module: Any) -> None:
        keep_recording(module)

    def changes(self) -> list[str]:
        return []


class FrontKeys(Part):
    """Puts one layer's virtual keys and values before those of its tokens; holds no tensor itself."""

    kind = "virtual keys"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    def __init__(self, owner: VirtualTokens, layer: int):
        super().__init__()
        self.__dict__["owner"] = owner  # not registered: the decoder's part owns, saves and moves the tensors
        self.layer = layer

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        part = only(parts)
        handed = handed_by(part.owner)
        if handed is None:
            raise TargetError(
                f"virtual tokens reach {type(module).__name__} through its decoder's forward; call the model, not the "
                "layer alone, and with gradient checkpointing use lofi.models.checkpointing.enable"
            )
        call = called(module, args, kwargs)
        cache_name, mask_name = map(str, cache_and_mask(own_class(type(module))))
        inner = call.arguments.get(cache_name)
        inner = getattr(inner, "self_attention_cache", inner)
        if isinstance(handed, Recording):
            call.arguments[cache_name] = RecordingCache(inner, handed, part.layer)
        else:
            call.arguments[cache_name] = FrontCache(inner, *handed.pairs[part.layer])
            call.arguments[mask_name] = widened(module, call.arguments.get(mask_name), inner, handed)
        return base(**by_name(call))

    def changes(self) -> list[str]:
        return []


class ShiftedPositions(Part):
    """Counts positions from P on where the decoder leaves them to a table of its own (BART, OPT)."""

    kind = "virtual positions"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    def __init__(self, owner: VirtualTokens):
        super().__init__()
        self.__dict__["owner"] = owner

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        handed = handed_by(only(parts).owner)
        call = called(module, args, kwargs)
        if isinstance(handed, Front):
            call.arguments["position_ids"] = call.arguments["position_ids"] + handed.length
        return base(**by_name(call))

    def changes(self) -> list[str]:
        return []


class FrontCache:
    """A cache for one attention call that puts virtual keys and values before those of `inner` (None: no cache)."""

    def __init__(self, inner: Any, keys: Tensor, values: Tensor):
        self.inner, self.keys, self.values = inner, keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Pair:
        """All keys and values that the layer attends to: (N, H, P + S, K)."""
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, layer, *args, **kwargs)
        return _joined(self.keys, keys), _joined(self.values, values)

    def get_seq_length(self, layer: int = 0) -> Any:
        """Positions before the call's own tokens, the virtual ones included."""
        past = 0 if self.inner is None else self.inner.get_seq_length(layer)
        return past + self.keys.shape[2]


class RecordingCache:
    """A cache for one attention call that notes its keys and values and leaves them as they are."""

    def __init__(self, inner: Any, record: Recording, layer: int):
        self.inner, self.record, self.layer = inner, record, layer

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Pair:
        """What the layer attends to; what a recomputation would note again is noted already."""
        self.record.setdefault(self.layer, (keys, values))
        return (keys, values) if self.inner is None else self.inner.update(keys, values, layer, *args, **kwargs)

    def get_seq_length(self, layer: int = 0) -> Any:
        """Positions before the call's own tokens."""
        return 0 if self.inner is None else self.inner.get_seq_length(layer)


def keep_recording(module: Any) -> None:
    """Let an adapted model record hidden states and attentions as it did: transformers looks up by the class's name."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # releases that look them up on the class, where they are inherited
        return
    _CAN_RECORD_REGISTRY[module] = getattr(module, "_can_record_outputs", None)


def _joined(front: Tensor, own: Tensor) -> Tensor:
    return torch.cat([front.to(own).expand(own.shape[0], -1, -1, -1), own], dim=2)


def widened(module: Any, mask: Tensor | None, inner: Any, front: Front) -> Tensor | None:
    """The attention mask with P columns before it: every token sees the virtual ones that its window reaches.

    A query at position p sees the virtual token at j < P unless the layer's sliding window w says p - j >= w, as it
    would any token there.
    Shapes  mask (N, 1, T, S) or None -> (N, 1, T, P + S), or None where everything is seen
    Dtypes  as the mask's: bool (True is seen) or float (added to the scores)
    Raises  TargetError for an attention implementation with masks of another form
    """
    implementation = module.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise TargetError(
            f"virtual tokens need sdpa or eager attention, but the model uses {implementation}; load it with "
            "attn_implementation='sdpa'"
        )
    tokens = front.positions.shape[-1]
    seen = _reach(module, front)  # (N, 1, T, P), None: all
    if mask is None:
        causal = implementation == "sdpa" and tokens > 1  # what no mask means there
        if seen is None and not causal:
            return None
        length = tokens if inner is None else int(inner.get_mask_sizes(tokens, module.layer_idx)[0])
        mask = torch.ones((1, 1, tokens, length), dtype=torch.bool, device=front.positions.device)
        mask = mask.tril() if causal else mask
    if seen is None:
        seen = torch.ones((1, 1, 1, front.length), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~seen, torch.finfo(mask.dtype).min
        )
    rows = max(mask.shape[0], seen.shape[0])
    shape = (rows, mask.shape[1], max(tokens, mask.shape[2]), -1)
    return torch.cat([seen.expand(shape), mask.expand(shape)], dim=-1)


def _reach(module: Any, front: Front) -> Tensor | None:
    own = hasattr(module, "sliding_window")
    window = module.sliding_window if own else getattr(module.config, "sliding_window", None)
    if window is None:
        return None
    virtual = torch.arange(front.length, device=front.positions.device)
    return (front.positions[:, None, :, None] - virtual) < window


def real_positions(given: dict[str, Any], count: int) -> Tensor:
    """Positions of the call's own tokens, counted from `count` on: (N or 1, T)."""
    if given.get("position_ids") is not None:
        return given["position_ids"] + count
    ids = given.get("input_ids")
    ids = given["inputs_embeds"][..., 0] if ids is None else ids
    cache = given.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(ids.shape[1], device=ids.device) + past + count)[None]


def recorded(owner: VirtualTokens, module: Any, embeddings: Tensor) -> list[Pair]:
    """The keys and values that the decoder computes for embeddings (1, P, D) at positions 0 to P - 1, layer by layer.

    The owner's own part is silent meanwhile; other active adapters (LoRA beside it) take part.
    """
    record = Recording()
    with handing_down(owner, record):
        module(inputs_embeds=embeddings, use_cache=False)
    return [record[layer] for layer in range(len(record))]


def only(parts: list[Any]) -> Any:
    """The one active part.

    Raises  TargetError for several: whose virtual tokens come first would change all of them
    """
    if len(parts) > 1:
        raise TargetError(
            f"{len(parts)} active adapters bring virtual tokens, and their order would change what each means; "
            "activate one of them"
        )
    return parts[0]


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


def seam(decoder: Decoder, owner: VirtualTokens) -> dict[str, Part]:
    """The parts of one adapter: the owner's, one for each attention module, the position table's where there is one."""
    takes = signature(own_class(type(decoder.module))).parameters
    owner.counts = decoder.positions is None and "position_ids" in takes
    parts: dict[str, Part] = {decoder.path: owner}
    parts |= {path: FrontKeys(owner, layer) for layer, path in enumerate(decoder.attentions)}
    if decoder.positions is not None:
        parts[decoder.positions] = ShiftedPositions(owner)
    return parts
