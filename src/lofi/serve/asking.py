"""A request's body as what the engine is asked: names to speakers, text to ids, fields to numbers, limits kept.

Knows the formats (chat by the speaker's own, raw completions by the tokenizer's) and OpenAI's defaults. Knows neither
HTTP nor how an answer is written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from lofi.errors import RequestError
from lofi.serve.limits import Settings
from lofi.serve.openai_types import ChatBody, ChatMessage, CompletionBody, Generation
from lofi.serve.request import Asked, Drawing, check
from lofi.serve.service import Service, Speaker

LONG_TEXT = 20_000  # characters; encoding more than that holds the event loop up for milliseconds
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_APART = 0x9E3779B97F4A7C15  # spreads the seeds of one request's answers (2^64 / golden ratio)


@dataclass(frozen=True)
class Batch:
    """One HTTP request as the answers it asks for: prompt 0's n answers, then prompt 1's."""

    kind: str
    """chat or text."""
    name: str
    """The model as the request names it."""
    speaker: Speaker
    prompts: tuple[tuple[int, ...], ...]
    asked: tuple[Asked, ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    token_ids: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


async def asked_chat(service: Service, settings: Settings, body: ChatBody) -> Batch:
    """What POST /v1/chat/completions asks for.

    Raises  UnknownAdapter; RequestError and DataError for what cannot be answered as asked
    """
    speaker = service.speaker(body.model)
    if len(body.messages) > settings.messages:
        raise RequestError(f"there are {len(body.messages)} messages: send at most {settings.messages}")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is given without logprobs: set logprobs to true")
    messages = [_message(message) for message in body.messages]
    prompt = messages[0]["content"] if [one["role"] for one in messages] == ["user"] else messages
    size = sum(len(message["content"]) for message in messages)
    ids = await _apart(size, speaker.text_format.encode_prompt, prompt)
    longest = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.max_tokens is not None and body.max_tokens != longest:
        raise RequestError("max_tokens and max_completion_tokens differ: give one of them")
    if longest is None:
        longest = _room(service, len(ids), settings.chat_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _batch(service, settings, body, speaker, "chat", [ids], longest, logprobs)


async def asked_text(service: Service, settings: Settings, body: CompletionBody) -> Batch:
    """What POST /v1/completions asks for; a text is encoded as the tokenizer itself frames it.

    Raises  UnknownAdapter; RequestError for what cannot be answered as asked
    """
    speaker = service.speaker(body.model)
    prompts = _prompts(body.prompt)
    if len(prompts) > settings.answers:
        raise RequestError(f"there are {len(prompts)} prompts: send at most {settings.answers} in one request")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        framed = body.add_special_tokens is not False
        encoded = await _apart(sum(map(len, texts)), _encode, service.tokenizer, texts, framed)
    else:
        encoded = [list(prompt) for prompt in prompts]
    longest = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _batch(service, settings, body, speaker, "text", encoded, longest, body.logprobs)


def _stop_ids(service: Service, speaker: Speaker, kind: str) -> tuple[int, ...]:
    """What ends an answer: the format's stops; in raw text the model's own and those that an adapter learned."""
    if kind == "text" and speaker.adapter is None:
        return service.eos_ids
    trained = tuple(speaker.text_format.stop_ids)
    return tuple(dict.fromkeys((*service.eos_ids, *trained))) if kind == "text" else trained


def _batch(
    service: Service, settings: Settings, body: Generation, speaker: Speaker, kind: str,
    prompts: list[list[int]], longest: int, logprobs: int | None,
) -> Batch:  # fmt: skip
    n = body.n or 1
    if n * len(prompts) > settings.answers:
        raise RequestError(f"n={n} for {len(prompts)} prompts is more than {settings.answers} answers: ask for fewer")
    stop_ids = _stop_ids(service, speaker, kind)
    common = Asked(
        prompt=(),
        adapter=speaker.adapter,
        max_tokens=longest,
        drawing=_drawing(service, settings, body),
        stop_ids=(() if body.ignore_eos else stop_ids) + tuple(body.stop_token_ids or ()),
        stop=_stops(body, settings),
        logprobs=logprobs,
        timeout=settings.request_timeout,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    ids = tuple(map(tuple, prompts))
    asked = tuple(_numbered(service, common, prompt, place) for prompt in ids for place in range(n))
    vocabulary = service.engine.vocabulary
    for one in asked[::n]:
        check(one, context=service.context, vocabulary=vocabulary)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Batch(
        kind, body.model, speaker, ids, asked, n, bool(body.stream), usage, bool(body.return_token_ids)
    )  # fmt: skip


def _numbered(service: Service, common: Asked, prompt: tuple[int, ...], place: int) -> Asked:
    """The request for one answer; each of several draws with a seed of its own, the first with the one given."""
    drawing = common.drawing
    if drawing.temperature > 0:
        seed = service.next_seed() if drawing.seed is None else drawing.seed + place * _APART
        drawing = dataclasses.replace(drawing, seed=seed % 2**63)
    return dataclasses.replace(common, prompt=prompt, drawing=drawing)


def _drawing(service: Service, settings: Settings, body: Generation) -> Drawing:
    given: dict[str, Any] = {
        name: value
        for name in (
            "temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
        )
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    if given.get("top_k") == -1:  # vLLM's word for all
        given["top_k"] = 0
    if body.logit_bias:
        given["logit_bias"] = _biases(body.logit_bias, settings)
    return dataclasses.replace(service.defaults, **given)


def _biases(given: dict[str, float], settings: Settings) -> tuple[tuple[int, float], ...]:
    if len(given) > settings.biases:
        raise RequestError(f"logit_bias has {len(given)} entries: give at most {settings.biases}")
    wrong = [key for key in given if not (key.isascii() and key.isdigit() and len(key) < 12)]
    if wrong:
        raise RequestError(f"logit_bias holds {wrong[0][:40]!r}, which is no token id: give ids as decimal digits")
    far = [value for value in given.values() if not -100 <= value <= 100]
    if far:
        raise RequestError(f"logit_bias holds {far[0]}: give numbers from -100 to 100")
    return tuple((int(key), float(value)) for key, value in given.items())


def _stops(body: Generation, settings: Settings) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > settings.stops:
        raise RequestError(f"there are {len(stops)} stop texts: give at most {settings.stops}")
    if any(len(stop) > settings.stop_characters for stop in stops):
        raise RequestError(f"a stop text is longer than {settings.stop_characters} characters: shorten it")
    return stops


def _room(service: Service, prompt: int, most: int) -> int:
    room = service.context - prompt
    if room < 1:
        raise RequestError(
            f"the messages have {prompt} tokens and leave no room for an answer in the context of {service.context}: "
            "shorten them"
        )
    return min(room, most)


def _message(message: ChatMessage) -> dict[str, str]:
    """A message as the chat template takes it."""
    extra = [name for name, value in (message.model_extra or {}).items() if value not in (None, [], "")]
    if extra:
        raise RequestError(f"messages with {extra[0][:40]!r} are not supported by this server: send role and content")
    if message.content is None:
        raise RequestError(f"a message of the {message.role} has no content: give its text")
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name else {}
    return {"role": role, "content": _text(message.content), **named}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    other = [part.type for part in content if part.type not in ("text", "input_text") or part.text is None]
    if other:
        raise RequestError(f"a message holds a part of type {other[0][:40]!r}: this server reads text alone")
    return "".join(part.text for part in content)


def _prompts(prompt: Any) -> list[Any]:
    """One text, several texts, the ids of one prompt, or of several: always as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list: give a text or at least one token")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _encode(tokenizer: Any, texts: list[str], framed: bool) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=framed, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


async def _apart(size: int, work: Any, *given: Any) -> Any:
    """The work's result; in a thread where the text is long."""
    return await asyncio.to_thread(work, *given) if size > LONG_TEXT else work(*given)
