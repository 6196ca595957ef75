"""Keys and values before those of a layer's tokens: the seam that prefix tuning and prompt tuning of decoders share.

An owner (`VirtualTokens`) on the decoder makes, once a forward, the keys and values of P virtual tokens for every
layer, counts the positions of the real tokens from P on, and hands both down to a `FrontKeys` part on each
self-attention module. That gives the attention a cache object which puts the virtual keys and values first, and a mask
as much wider. The user's own cache never holds them, so caches of every kind, left padding, packed rows, labels and
recomputed activations work as without. Where a model's attention modules are is `decoder.py`'s question, and what the
keys and values are that of the owner's file.
Rejected: filling the user's cache, as PEFT does (lost under gradient checkpointing, blind to packed rows, and it lets
the prefix slide out of sliding caches by how long the row is padded); a second attention implementation registered
with transformers (one for each that exists, and a model-wide switch that others set again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lofi.adapters.decoder import Decoder, by_name, cache_and_mask, called, signature
from lofi.adapters.methods import VIRTUAL_UNMERGEABLE
from lofi.adapters.surgery import Part, own_class
from lofi.adapters.switch import guard_checkpointing, handed_by, handing_down
from lofi.errors import TargetError

Pair = tuple[Tensor, Tensor]
"""One layer's virtual keys and values, each (1, H, P, K); H counts key/value heads."""

_IMPLEMENTATIONS = ("sdpa", "eager")


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


def seam(decoder: Decoder, owner: VirtualTokens) -> dict[str, Part]:
    """The parts of one adapter: the owner's, one for each attention module, the position table's where there is one."""
    takes = signature(own_class(type(decoder.module))).parameters
    owner.counts = decoder.positions is None and "position_ids" in takes
    parts: dict[str, Part] = {decoder.path: owner}
    parts |= {path: FrontKeys(owner, layer) for layer, path in enumerate(decoder.attentions)}
    if decoder.positions is not None:
        parts[decoder.positions] = ShiftedPositions(owner)
    return parts
