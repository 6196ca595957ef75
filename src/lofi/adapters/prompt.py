"""Prompt tuning: P trained embeddings before the input's.   Lester, Al-Rfou and Constant (arXiv 2104.08691)

A decoder's prompt sees only itself, so what it adds to a forward is its keys and values, layer by layer: the decoder
runs on the (1, P, D) embeddings alone and `attention.py` puts the result before every example's keys. That equals
joining the embeddings, costs P tokens a batch instead of P an example, leaves the sequence as long as it was, and
is kept between forwards without a gradient. An encoder sees both ways, so there the embeddings are joined to the
input, and the decoder behind it is told of P more positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.attention import Pair, VirtualTokens, find_decoder, recorded, seam
from lofi.adapters.methods import PromptConfig
from lofi.adapters.report import Resolved
from lofi.errors import TargetError


class Prompt(VirtualTokens):
    """P trained embeddings (P, D) of a decoder."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.length = start.shape[0]
        self.prompt_embeddings = nn.Parameter(start)
        self.__dict__["kept"] = None  # (what the pairs were computed from, the pairs)

    def pairs(self, module: Any) -> list[Pair]:
        if module.training or torch.is_grad_enabled():
            return self._computed(module)
        state = _state(module)
        if self.kept is None or not _same(self.kept[0], state):
            self.__dict__["kept"] = (state, self._computed(module))
        return self.kept[1]

    def _computed(self, module: Any) -> list[Pair]:
        embeddings = self.prompt_embeddings.to(module.get_input_embeddings().weight.dtype)
        return recorded(self, module, embeddings[None])


def _state(module: Any) -> list[Any]:
    """What the pairs depend on: every parameter, with its count of changes (held, so none takes another's place)."""
    weights = list(module.parameters())
    device = weights[0].device.type
    versions = [None if p.is_inference() else p._version for p in weights]
    return [module.switch.current(), torch.is_autocast_enabled(device), versions, weights]


def _same(old: list[Any], new: list[Any]) -> bool:
    return old[:3] == new[:3] and all(a is b for a, b in zip(old[3], new[3], strict=True))


def resolve(model: nn.Module, config: PromptConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The owner on the decoder (its self-attentions take the keys), or on the encoder.

    Raises  TargetError for a model that takes no embeddings, or whose decoder's attention cannot be given more keys
    """
    start = _start(model, config)
    return Resolved(seam(find_decoder(model, "prompt"), Prompt(start)))


@torch.no_grad()
def _start(model: Any, config: PromptConfig) -> Tensor:
    """Where the embeddings start: (P, D) float32."""
    embedding = model.get_input_embeddings()
    count, device = config.num_virtual_tokens, embedding.weight.device
    if config.prompt_tuning_init == "RANDOM":
        probe = embedding(torch.zeros(1, dtype=torch.long, device=device))
        return torch.randn(count, probe.shape[-1], device=device)
    if config.prompt_tuning_init == "TEXT":
        ids = _ids_of(model, str(config.prompt_tuning_init_text), count).to(device)
    else:
        ids = torch.randint(embedding.num_embeddings, (count,), device=device)
    return embedding(ids).float()


def _ids_of(model: Any, text: str, count: int) -> Tensor:
    from transformers import AutoTokenizer

    path = getattr(model.config, "_name_or_path", None)
    try:
        ids = AutoTokenizer.from_pretrained(path, local_files_only=True)(text)["input_ids"] if path else []
    except (OSError, ValueError) as error:
        raise TargetError(
            f"prompt_tuning_init TEXT needs the tokenizer of {path}, which cannot be read ({str(error)[:80]}); put it "
            "beside the model, or use SAMPLE_VOCAB"
        ) from None
    if not ids:
        raise TargetError(
            "prompt_tuning_init TEXT needs a text of at least one token and a model that was loaded from a folder with "
            "its tokenizer; use SAMPLE_VOCAB"
        )
    return torch.tensor((ids * count)[:count])
