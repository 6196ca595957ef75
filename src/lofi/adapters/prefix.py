"""Prefix tuning: trained keys and values for P virtual tokens in every layer.   Li and Liang (arXiv 2101.00190), sec. 4

K' = [K_p; K], V' = [V_p; V] in each self-attention, with K_p, V_p (P, H K) trained. Keys carry no position of their
own, and real tokens count from P on, as in PEFT. A prefix takes attention away from the tokens, so no values make the
model start as its base: the start is that of a real text (`init="vocab"`), or noise.
Encoder-decoders: the decoder's self-attention, as PEFT 0.21 does. Encoders have no cache and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.attention import Pair, VirtualTokens, seam
from lofi.adapters.decoder import Decoder, find_decoder
from lofi.adapters.methods import PrefixConfig
from lofi.adapters.report import Resolved
from lofi.adapters.switch import adapters_off
from lofi.errors import TargetError


class Shape:
    """Layers L, key/value heads H and head size K of a decoder, as its config states them."""

    def __init__(self, decoder: Decoder):
        config = decoder.module.config.get_text_config(decoder=True)
        heads = _first(config, "num_attention_heads", "n_head", "num_heads")
        width = _first(config, "hidden_size", "n_embd", "d_model")
        self.layers = len(decoder.attentions)
        self.heads = getattr(config, "num_key_value_heads", None) or heads
        self.size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // heads
        self.token = self.heads * self.size
        self.width = 2 * self.layers * self.token


class Prefix(VirtualTokens):
    """P virtual tokens as one matrix (P, 2 L H K): layer by layer its keys, then its values, as PEFT stores them."""

    transform: nn.Sequential | None

    def __init__(self, shape: Shape, start: Tensor, hidden: int | None = None):
        super().__init__()
        self.shape, self.length = shape, start.shape[0]
        if hidden is None:
            self.prompt_embeddings, self.transform = nn.Parameter(start), None
            return
        self.embedding = nn.Parameter(start)  # (P, H K)
        inner = nn.Linear(shape.token, hidden, device=start.device)
        self.transform = nn.Sequential(inner, nn.Tanh(), nn.Linear(hidden, shape.width, device=start.device))

    def flat(self) -> Tensor:
        """(P, 2 L H K), through the MLP where there is one."""
        return self.prompt_embeddings if self.transform is None else self.transform(self.embedding)

    def pairs(self, module: Any) -> list[Pair]:
        shape = self.shape
        split = self.flat().view(self.length, 2 * shape.layers, shape.heads, shape.size)
        split = split.permute(1, 2, 0, 3).unsqueeze(1)  # (2 L, 1, H, P, K)
        return list(zip(split[0::2].unbind(), split[1::2].unbind(), strict=True))

    def shapes(self) -> dict[str, int]:
        """What PEFT's config says of the decoder."""
        shape = self.shape
        return {"num_layers": shape.layers, "num_attention_heads": shape.heads, "token_dim": shape.token}

    def exported(self) -> dict[str, Tensor]:
        """The keys and values alone: the MLP is dropped (sec. 4.3)."""
        return {"prompt_embeddings": self.flat()}


def resolve(model: Any, config: PrefixConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The owner on the decoder and a part on each self-attention module.

    Raises  TargetError for a model without keys and values of a decoder, or whose attention cannot be given more
    """
    decoder = find_decoder(model, "prefix")
    shape, count = Shape(decoder), config.num_virtual_tokens
    device = model.get_input_embeddings().weight.device
    if config.prefix_projection:
        start = torch.randn(count, shape.token, device=device)
        return Resolved(seam(decoder, Prefix(shape, start, config.encoder_hidden_size or shape.token)))
    if config.init == "random" or device.type == "meta":
        return Resolved(seam(decoder, Prefix(shape, torch.randn(count, shape.width, device=device))))
    with adapters_off(model):
        return Resolved(seam(decoder, Prefix(shape, _of_real_tokens(decoder, count))))


@torch.no_grad()
def _of_real_tokens(decoder: Decoder, count: int) -> Tensor:
    """(P, 2 L H K): what the base computes for `count` tokens drawn from its vocabulary, at positions 0 to P - 1."""
    from transformers import DynamicCache

    embedding = decoder.module.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (1, count), device=embedding.weight.device)
    cache: Any = DynamicCache()  # without the config: a sliding layer's would keep its window alone
    with evaluating(decoder.module):
        decoder.module(input_ids=ids, past_key_values=cache, use_cache=True)
    both = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # 2 L of (1, H, P, K)
    return torch.cat([tensor[0].transpose(0, 1).flatten(1).float() for tensor in both], dim=1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every module inside in evaluation mode, and as it was afterwards."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def _first(config: Any, *names: str) -> int:
    found = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if found is None:
        raise TargetError(f"prefix tuning needs {names[0]} in the config of {type(config).__name__}, which lacks it")
    return int(found)
