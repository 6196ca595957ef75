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

from lofi.adapters.attention import Decoder, Pair, VirtualTokens, find_decoder, seam
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


class Prefix(VirtualTokens):
    """P virtual tokens as one matrix (P, 2 L H K): layer by layer its keys, then its values, as PEFT stores them."""

    def __init__(self, shape: Shape, config: PrefixConfig, device: torch.device):
        super().__init__()
        self.shape, self.length = shape, config.num_virtual_tokens
        width = 2 * shape.layers * shape.token
        if config.prefix_projection:
            hidden = config.encoder_hidden_size or shape.token
            self.embedding = nn.Parameter(torch.randn(self.length, shape.token, device=device))
            self.transform: nn.Module | None = nn.Sequential(
                nn.Linear(shape.token, hidden, device=device), nn.Tanh(), nn.Linear(hidden, width, device=device)
            )
        else:
            self.transform = None
            self.prompt_embeddings = nn.Parameter(torch.randn(self.length, width, device=device))

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


def resolve(model: nn.Module, config: PrefixConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The owner on the decoder and a part on each self-attention module.

    Raises  TargetError for a model without keys and values of a decoder, or whose attention cannot be given more
    """
    decoder = find_decoder(model, "prefix")
    shape = Shape(decoder)
    device = model.get_input_embeddings().weight.device
    owner = Prefix(shape, config, device)
    if config.init != "random" and not config.prefix_projection and device.type != "meta":
        with adapters_off(model):
            owner.prompt_embeddings.data.copy_(_of_real_tokens(model, decoder, config.num_virtual_tokens))
    return Resolved(seam(decoder, owner))


@torch.no_grad()
def _of_real_tokens(model: Any, decoder: Decoder, count: int) -> Tensor:
    """(P, 2 L H K): what the base computes for `count` tokens drawn from its vocabulary, at positions 0 to P - 1."""
    from transformers import DynamicCache

    embedding = decoder.module.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (1, count), device=embedding.weight.device)
    cache = DynamicCache()  # without the config: a sliding layer's would keep its window alone
    with evaluating(decoder.module):
        decoder.module(input_ids=ids, past_key_values=cache, use_cache=True)
    both = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]  # 2 L of (1, H, P, K)
    return torch.cat([tensor[0].transpose(0, 1).flatten(1) for tensor in both], dim=1)


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
