"""Writing: prompts in, texts out, many at a time, each as if it were alone.

Knows a transformers model and a text format (which ids a prompt has, which ids end an answer). Knows neither metrics
nor adapters: which adapter speaks is the caller's `using`. Prompts of a decoder are padded on the left with positions
counted from each prompt's first token; prompts of an encoder on the right. The model's own `generate` does the
decoding, so caches of every family work; its generation config, mode and random state are left as they were.
Rejected: a decoding loop of our own (each family's cache and position rules again), padding on the right, one at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lofi.adapters.registry import virtual_positions
from lofi.errors import RequestError
from lofi.evaluate.batching import fill_token, grouped, is_pair_model, padded
from lofi.evaluate.sampling import Dice, Sampling

Prompt = str | list[Any]  # text, chat messages, or token ids

# what a model's own generation config may ask for, set back to plain greedy decoding
_GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "early_stopping": False,
    "length_penalty": 1.0, "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


class Generated(NamedTuple):
    """One answer: its text, its token ids without the stop token, and whether it ended by itself."""

    text: str
    ids: list[int]
    stopped: bool


def generate(
    model: Any,
    tokenizer: Any,
    text_format: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_tokens: int = 8192,
    sampling: Sampling | str | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Answer every prompt, in the order given.

    A prompt is text or chat messages (encoded by `text_format`) or a list of token ids. Decoding is greedy, without the
    penalties that the model's generation config may hold; a Sampling draws instead, and "model" follows the model's own
    generation config (on torch's random stream, so there a batch is not N singles). Tokens that the model forces or
    forbids stay so. An answer ends at the first of text_format.stop_ids, which is not part of it.
    on_done(n) is called after each batch with the number of prompts answered so far.
    Raises  RequestError for no stop token, an empty prompt, or a prompt that leaves no room in the model's context
    Exact   in float32 a batch of N gives the ids of N singles; with a Sampling the draws of prompt i depend on the seed
            and on i, not on the batch
    """
    from lofi.models.probe import undisturbed

    _check(text_format, max_new_tokens, sampling)
    rows = [encode(text_format, prompt) for prompt in prompts]
    check_room(model, [len(row) for row in rows], max_new_tokens)
    answers: list[Generated | None] = [None] * len(rows)
    done = 0
    with torch.no_grad(), undisturbed(model):
        for group in grouped([len(row) for row in rows], batch_tokens=batch_tokens, extra=max_new_tokens):
            written = _write(model, tokenizer, text_format, {i: rows[i] for i in group}, max_new_tokens, sampling)
            for index, ids in zip(group, written.tolist(), strict=True):
                answers[index] = _answer(ids, text_format)
            done += len(group)
            if on_done is not None:
                on_done(done)
    return [answer for answer in answers if answer is not None]


def encode(text_format: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt; ids pass through as they are."""
    if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
        return list(prompt)
    return list(text_format.encode_prompt(prompt))


def context_length(model: Any) -> int | None:
    """How many positions a decoder has for prompt and answer together; None if it states none or has an encoder.

    The virtual tokens of the active adapters take theirs first.
    """
    if is_pair_model(model):
        return None
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if stated is None else stated - virtual_positions(model)


def side_length(model: Any) -> int | None:
    """How many positions each side of an encoder-decoder has; None for decoders and where it is not limited (T5)."""
    stated = getattr(model.config, "max_position_embeddings", None) if is_pair_model(model) else None
    return None if stated is None else stated - virtual_positions(model)


def check_room(model: Any, lengths: Sequence[int], max_new_tokens: int) -> None:
    """RequestError if a prompt is empty, or does not fit the model's context together with its answer."""
    if 0 in lengths:
        raise RequestError(f"prompt {lengths.index(0)} has no token: give a prompt of at least one.")
    _check_sides(side_length(model), lengths, max_new_tokens)
    room = context_length(model)
    over = [i for i, length in enumerate(lengths) if room is not None and length + max_new_tokens > room]
    if over:
        raise RequestError(
            f"{len(over)} of {len(lengths)} prompts are too long (prompt {over[0]} has {lengths[over[0]]} tokens) for "
            f"the model's context of {room} with {max_new_tokens} new tokens: shorten them or lower max_new_tokens."
        )


def _check_sides(room: int | None, lengths: Sequence[int], max_new_tokens: int) -> None:
    """The same for an encoder-decoder, whose sides have their positions apart."""
    if room is not None and max(lengths, default=0) > room:
        longest = max(lengths)
        raise RequestError(
            f"prompt {list(lengths).index(longest)} has {longest} tokens but the model's encoder reads {room}: "
            "shorten it."
        )
    if room is not None and max_new_tokens > room:
        raise RequestError(f"max_new_tokens is {max_new_tokens}, more than the decoder's {room} positions: lower it.")


def _check(text_format: Any, max_new_tokens: int, sampling: Sampling | str | None) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens}: an answer needs room for at least 1 token.")
    if not text_format.stop_ids:
        raise RequestError("the text format has no stop token, so answers cannot end: set the tokenizer's eos_token.")
    if isinstance(sampling, str) and sampling != "model":
        raise RequestError(f"sampling is {sampling!r}: give a Sampling, 'model', or None for greedy decoding.")


def _write(
    model: Any, tokenizer: Any, text_format: Any, rows: dict[int, list[int]], room: int, sampling: Sampling | str | None
) -> Tensor:
    """New ids of one batch, padded behind its stop tokens: (N, up to room)."""
    pair = is_pair_model(model)
    fill = fill_token(model, tokenizer)
    ids, mask = (part.to(model.device) for part in padded(list(rows.values()), fill=fill, left=not pair))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if isinstance(sampling, Sampling):
        given["logits_processor"] = [Dice(sampling, list(rows))]
    written = model.generate(**given, generation_config=_settings(text_format, fill, room, sampling))
    return written[:, 1 if pair else ids.shape[1] :]


def _settings(text_format: Any, fill: int, room: int, sampling: Sampling | str | None) -> Any:
    from transformers import GenerationConfig

    chosen = {} if sampling == "model" else _GREEDY
    settings = GenerationConfig(eos_token_id=list(text_format.stop_ids), pad_token_id=fill, max_new_tokens=room)
    for name, value in chosen.items():  # set afterwards: the constructor warns of sampling values in a greedy config
        setattr(settings, name, value)
    settings.use_cache = True  # the model's config says False after training; generating without is quadratic
    return settings


def _answer(ids: list[int], text_format: Any) -> Generated:
    stops = set(text_format.stop_ids)
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    return Generated(text_format.decode(kept), kept, end is not None)
