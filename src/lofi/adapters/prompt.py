"""Prompt tuning: P trained embeddings before the input's.   Lester, Al-Rfou and Constant (arXiv 2104.08691)

A decoder's prompt sees only itself, so what it adds to a forward is its keys and values, layer by layer: the decoder
runs on the (1, P, D) embeddings alone and `attention.py` puts the result before every example's keys. That equals
joining the embeddings, costs P tokens a batch instead of P an example, leaves the sequence as long as it was, and
is kept between forwards without a gradient. An encoder sees both ways, so there the embeddings are joined to the
input, and the decoder behind it is told of P more positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lofi.adapters.attention import Pair, VirtualTokens, keep_recording, only, recorded, seam
from lofi.adapters.decoder import by_name, called, find_decoder, is_encoder
from lofi.adapters.methods import VIRTUAL_UNMERGEABLE, PromptConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part, named_base_modules
from lofi.errors import TargetError


class Prompt(VirtualTokens):
    """P trained embeddings (P, D) of a decoder."""

    kept: tuple[list[Any], list[Pair]] | None  # what the pairs were computed from, and the pairs

    def __init__(self, start: Tensor, about: Mapping[str, int]):
        super().__init__()
        self.length, self.about = start.shape[0], dict(about)
        self.prompt_embeddings = nn.Parameter(start)
        self.kept = None

    def shapes(self) -> dict[str, int]:
        """What PEFT's config says of the model."""
        return {**self.about, "token_dim": self.prompt_embeddings.shape[1]}

    def pairs(self, module: Any) -> list[Pair]:
        if module.training or torch.is_grad_enabled():
            self.__dict__["kept"] = None  # a fused optimizer changes parameters without raising their version
            return self._computed(module)
        state = _state(module)
        if self.kept is None or not _same(self.kept[0], state):
            self.kept = state, self._computed(module)
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


class JoinedPrompt(Part):
    """P trained embeddings (P, D) joined to the input of an encoder, whose output is P positions longer."""

    kind = "virtual tokens"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    def __init__(self, start: Tensor, about: Mapping[str, int], *, strips: bool):
        super().__init__()
        self.length, self.about, self.strips = start.shape[0], dict(about), strips
        self.prompt_embeddings = nn.Parameter(start)

    def shapes(self) -> dict[str, int]:
        """What PEFT's config says of the model."""
        return {**self.about, "token_dim": self.prompt_embeddings.shape[1]}

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        owner = only(parts)
        given = by_name(called(module, args, kwargs))
        ids = given.pop("input_ids", None)
        own = module.get_input_embeddings()(ids) if given.get("inputs_embeds") is None else given["inputs_embeds"]
        given["inputs_embeds"] = owner.before(own)  # (N, P + T, D)
        for key, value in (("attention_mask", 1), ("token_type_ids", 0)):
            if given.get(key) is not None:
                given[key] = torch.nn.functional.pad(given[key], (owner.length, 0), value=value)
        if given.get("position_ids") is not None:
            places = given["position_ids"]
            first = torch.arange(owner.length, device=places.device).expand(places.shape[0], -1)
            given["position_ids"] = torch.cat([first, places + owner.length], dim=1)
        output = base(**given)
        return owner.stripped(output) if owner.strips else output

    def before(self, own: Tensor) -> Tensor:
        """(N, T, D) -> (N, P + T, D), in the dtype of the input."""
        return torch.cat([self.prompt_embeddings.to(own.dtype).expand(own.shape[0], -1, -1), own], dim=1)

    def stripped(self, output: Any) -> Any:
        """The output without the virtual positions, so that every token has its own place in it."""
        if isinstance(output, tuple):
            return (output[0][:, self.length :], *output[1:])
        output["last_hidden_state"] = output.last_hidden_state[:, self.length :]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(h[:, self.length :] for h in output.hidden_states)
        return output

    def on_attach(self, module: Any) -> None:
        keep_recording(module)

    def changes(self) -> list[str]:
        return []


class LongerMemory(Part):
    """Tells the decoder behind an encoder that what it reads is P positions longer than the mask says."""

    kind = "virtual memory"
    unmergeable: ClassVar[str | None] = VIRTUAL_UNMERGEABLE

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(called(module, args, kwargs))
        mask = given.get("encoder_attention_mask")
        if mask is not None:
            given["encoder_attention_mask"] = torch.nn.functional.pad(mask, (only(parts).length, 0), value=1)
        return base(**given)

    def on_attach(self, module: Any) -> None:
        keep_recording(module)

    def changes(self) -> list[str]:
        return []


def resolve(model: Any, config: PromptConfig, saved: dict[str, nn.Module]) -> Resolved:
    """The owner on the decoder (its self-attentions take the keys), or on the encoder.

    Raises  TargetError for a model that takes no embeddings, or whose decoder's attention cannot be given more keys
    """
    start, about = _start(model, config), _about(model)
    pair = model.config.is_encoder_decoder
    if not pair and not is_encoder(model):
        return Resolved(seam(find_decoder(model, "prompt"), Prompt(start, about)))
    encoder = model.get_encoder() if pair else model.base_model
    paths = {id(module): path for path, module in named_base_modules(model)}
    if not paths[id(encoder)]:
        raise TargetError(f"prompt tuning needs a model with a head, but {type(model).__name__} has none")
    # a classifier reads the first position, which PEFT leaves to the prompt
    strips = not pair and config.task_type != "SEQ_CLS"
    owner = JoinedPrompt(start, about, strips=strips)
    parts: dict[str, Part] = {paths[id(encoder)]: owner}
    if pair:
        parts[paths[id(model.get_decoder())]] = LongerMemory(owner.length)
    return Resolved(parts)


def _about(model: Any) -> dict[str, int]:
    """Layers and heads, which PEFT's config repeats."""
    config = model.config.get_text_config()
    return {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}


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
