"""What the linears of a model are given: H = X^T X of their inputs, gathered a few layers at a time.

From rows of data that are not judged on, or from texts that the model writes itself. Linears with one input (q, k, v)
share one H. The forward stops behind the last layer that is looked at. Rejected: running each block alone on stored
hidden states, which costs one forward in all instead of half a one a block, but must know what every architecture hands
from block to block (masks, positions, caches, biases).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.linear import product_of
from lofi.quant.requantize import Gram

MOST_BYTES = 1 << 30
"""Of the matrices H that are gathered together; one layer's H is as large as it is."""
_WRITTEN = 64  # texts
_WRITTEN_TOKENS = 96
_BLOCK = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class Calibration:
    """Rows to run a model on (keyword arguments of its forward), and where they are from."""

    rows: Sequence[dict[str, Tensor]]
    source: str

    @property
    def tokens(self) -> int:
        """How many tokens all rows have, those that a decoder reads beside an encoder's included."""
        return sum(ids.numel() for row in self.rows for ids in row.values())

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens of {self.source}"


def from_examples(model: Any, examples: Sequence[Any], source: str) -> Calibration:
    """Calibrate on prepared examples."""
    return Calibration([_row(model, example.input_ids, example.labels) for example in examples], source)


@torch.no_grad()
def written(model: Any, prompts: Sequence[Sequence[int]]) -> Calibration:
    """Calibrate on texts that the model writes, half of them after `prompts`, half after single random tokens.

    Seeded; an encoder-decoder answers the prompts alone; models that do not write get random tokens.
    """
    from lofi.models.probe import random_ids, undisturbed

    if prompts and getattr(model.config, "is_encoder_decoder", False):
        return _answered(model, prompts)
    if not _writes(model):
        random = random_ids(model, rows=_WRITTEN, length=_WRITTEN_TOKENS, seed=0)
        return Calibration([_row(model, ids.tolist(), ids.tolist()) for ids in random], "random ids")
    each = _WRITTEN // 2 // len(prompts) if prompts else 0
    given = [torch.tensor([list(prompt)] * each, device=model.device) for prompt in prompts if each]
    starts = [*given, random_ids(model, rows=_WRITTEN - each * len(given), length=1, seed=0)]
    with undisturbed(model):
        torch.manual_seed(0)
        texts = [text for start in starts for text in _continued(model, start)]
    return Calibration([_row(model, text, text) for text in texts], "text that the model wrote itself")


def _answered(model: Any, prompts: Sequence[Sequence[int]]) -> Calibration:
    """Rows of a prompt for the encoder and a drawn answer of the model for the decoder."""
    from lofi.models.probe import undisturbed

    each = max(1, _WRITTEN // len(prompts))
    with undisturbed(model):
        torch.manual_seed(0)
        starts = [torch.tensor([list(prompt)] * each, device=model.device) for prompt in prompts]
        pairs = [(start[0].tolist(), text) for start in starts for text in _continued(model, start)]
    return Calibration([_row(model, *pair) for pair in pairs], "answers that the model wrote itself")


def _writes(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not getattr(model.config, "is_encoder_decoder", False)


def _continued(model: Any, starts: Tensor) -> list[list[int]]:
    """Each row (N, T) with what the model draws after it, up to its first end of text.

    Of an encoder-decoder the answer alone, without the token that its decoder starts from.
    """
    from transformers import GenerationConfig

    pair = getattr(model.config, "is_encoder_decoder", False)
    length = 0 if pair else starts.shape[1]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length + _WRITTEN_TOKENS
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    told: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    new = max(min(_WRITTEN_TOKENS, room - length), 1)
    config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, **told)
    config.use_cache = True  # the model's config says False after training
    rows = model.generate(starts, attention_mask=torch.ones_like(starts), generation_config=config)
    rows = rows[:, 1 if pair else 0 :].tolist()
    return [row[: next((i + 1 for i in range(length, len(row)) if row[i] in ends), len(row))] for row in rows]


def _row(model: Any, ids: Sequence[int], labels: Sequence[int]) -> dict[str, Tensor]:
    row = {"input_ids": torch.tensor([list(ids)], device=model.device)}
    if getattr(model.config, "is_encoder_decoder", False):
        told = torch.tensor([list(labels)], device=model.device)
        row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=told)
    return row


Stage = list[list[str]]
"""Module paths in the order they are called; those in one inner list have one input."""


def stages(model: nn.Module, paths: Iterable[str], calibration: Calibration) -> list[Stage]:
    """The linears at `paths` in the order that a forward calls them, by block and by MOST_BYTES of H.

    A path that the first row does not reach is in no stage.
    """
    made: list[Stage] = []
    size, block = 0, None
    for group in _called(model, set(paths), calibration.rows[0]):
        width = _width(model, group[0])
        found = _BLOCK.match(group[0])
        here = found.group(1) if found else group[0]
        if not made or here != block or size + 4 * width**2 > MOST_BYTES:
            made.append([])
            size, block = 0, here
        made[-1].append(group)
        size += 4 * width**2
    return made


def grams(model: nn.Module, stage: Stage, calibration: Calibration) -> dict[str, Tensor]:
    """H (I, I) of every linear of a stage, by path, as the model now is."""
    leaders = {group[0]: Gram(_width(model, group[0])) for group in stage}
    last = stage[-1][0]

    def look(path: str, x: Tensor) -> None:
        leaders[path].add(x)
        if path == last:
            raise _Enough

    for row in calibration.rows:
        _run(model, leaders, row, look)
    return {path: leaders[group[0]].matrix() for group in stage for path in group if leaders[group[0]].rows}


def _width(model: nn.Module, path: str) -> int:
    module = model.get_submodule(path)
    product = product_of(module)
    assert product is not None
    return product.shape(module)[1]


class _Enough(Exception):
    """Everything that was to be seen has been seen."""


def _called(model: nn.Module, paths: set[str], row: dict[str, Tensor]) -> list[list[str]]:
    groups: list[list[str]] = []
    held: list[Tensor] = []
    seen: set[str] = set()

    def look(path: str, x: Tensor) -> None:
        if path in seen:
            return
        seen.add(path)
        if held and held[0] is x:
            groups[-1].append(path)
        else:
            groups.append([path])
            held[:] = [x]

    _run(model, paths, row, look)
    return groups


@torch.no_grad()
def _run(model: Any, paths: Iterable[str], row: dict[str, Tensor], look: Any) -> None:
    """One forward in which look(path, input) is called before each of `paths`, until it raises _Enough."""
    from lofi.models.probe import undisturbed

    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with undisturbed(model), _looking(model, paths, look), suppress(_Enough):
        model(**row, **options)


@contextmanager
def _looking(model: nn.Module, paths: Iterable[str], look: Any) -> Iterator[None]:
    handles = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(_hook(path, look), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(path: str, look: Any) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(path, args[0] if args else next(iter(kwargs.values())))

    return before
