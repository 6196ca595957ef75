"""Finished answers as OpenAI's response bodies: chat.completion and text_completion, log probabilities, usage.

Knows the shapes; the streamed ones are in streaming.py. `system_fingerprint` says which weights answered: the hash of
the adapter's tensors, so a client can tell that it was not answered by another adapter, nor by a new version of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lofi.serve.asking import Batch
from lofi.serve.delivery import Answers, Choice
from lofi.serve.faults import ended
from lofi.serve.request import TokenLogprob
from lofi.serve.spelling import Spelling

FINISHED = ("stop", "length")


def body_of_answers(batch: Batch, answers: Answers, spelling: Spelling) -> dict[str, Any]:
    """The whole response.

    Raises  Refused 500, 503 or 504 where an answer did not come to its end
    """
    for choice in answers.choices:
        if choice.finish not in FINISHED:
            raise ended(choice.finish, choice.error)
    write = _chat_choice if batch.kind == "chat" else _text_choice
    found = {
        **frame(batch, "chat.completion" if batch.kind == "chat" else "text_completion"),
        "choices": [write(batch, choice, spelling) for choice in answers.choices],
        "usage": usage(batch, answers),
    }
    if batch.token_ids and batch.kind == "chat":
        found["prompt_token_ids"] = list(batch.prompts[0])
    return found


def frame(batch: Batch, kind: str) -> dict[str, Any]:
    """What every response and every chunk of it begins with."""
    prefix = "chatcmpl-" if batch.kind == "chat" else "cmpl-"
    return {
        "id": prefix + batch.id,
        "object": kind,
        "created": batch.created,
        "model": batch.name,
        "system_fingerprint": fingerprint(batch),
    }


def fingerprint(batch: Batch) -> str | None:
    """Which adapter's tensors answer; None for the base."""
    return f"lofi-{batch.speaker.key[:16]}" if batch.speaker.key else None


def usage(batch: Batch, answers: Answers) -> dict[str, Any]:
    """OpenAI's usage; a prompt counts once however many answers it has."""
    prompt = sum(map(len, batch.prompts))
    written = sum(len(choice.tokens) for choice in answers.choices)
    cached = sum(choice.cached for choice in answers.choices[:: batch.n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _chat_choice(batch: Batch, choice: Choice, spelling: Spelling) -> dict[str, Any]:
    wanted = choice.asked.logprobs is not None
    found: dict[str, Any] = {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(choice.logprobs, spelling) if wanted else None,
        "finish_reason": choice.finish,
    }
    return found | ({"token_ids": list(choice.tokens)} if batch.token_ids else {})


def _text_choice(batch: Batch, choice: Choice, spelling: Spelling) -> dict[str, Any]:
    wanted = choice.asked.logprobs is not None
    found: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "logprobs": text_logprobs(choice.logprobs, spelling, 0)[0] if wanted else None,
        "finish_reason": choice.finish,
    }
    if batch.token_ids:
        found |= {"token_ids": list(choice.tokens), "prompt_token_ids": list(choice.asked.prompt)}
    return found


def chat_logprobs(found: Sequence[TokenLogprob], spelling: Spelling) -> dict[str, Any]:
    """The chat shape: every token with its bytes and the likeliest ones beside it."""
    content = [
        _spelt(one.token, one.logprob, spelling)
        | {"top_logprobs": [_spelt(token, logprob, spelling) for token, logprob in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def _spelt(token: int, logprob: float, spelling: Spelling) -> dict[str, Any]:
    return {"token": spelling.text(token), "logprob": finite(logprob), "bytes": list(spelling.raw(token))}


def text_logprobs(found: Sequence[TokenLogprob], spelling: Spelling, offset: int) -> tuple[dict[str, Any], int]:
    """The completions shape, and where the next token's text begins."""
    told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in found:
        text = spelling.text(one.token)
        told["tokens"].append(text)
        told["token_logprobs"].append(finite(one.logprob))
        told["top_logprobs"].append({spelling.text(token): finite(value) for token, value in one.top})
        told["text_offset"].append(offset)
        offset += len(text)
    return told, offset


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999.0 for it."""
    return max(float(logprob), -9999.0)
