"""OpenAI's request bodies as far as lofi answers them, with the extensions that vLLM's clients send.

A field that would change the answer and is not supported is refused by name, with its neutral values let through (many
clients send `"tools": null`); a field that changes nothing is taken and ignored; any other is taken for a misspelling.
Knows names, types and ranges; not the model, so nothing here depends on a vocabulary or a context. Rejected: the
openai package's own types (a client's needs: nothing is checked, everything is optional) and ignoring what is unknown,
as servers do: a misspelt `max_tokens` is then an answer of another length.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lofi.errors import RequestError
from lofi.serve.limits import MOST_LOGPROBS

HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prediction", "parallel_tool_calls", "request_id", "priority"}
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "reasoning_effort": (), "verbosity": (), "best_of": (1,), "echo": (False,), "suffix": ("",), "min_p": (0,),
    "min_tokens": (0,), "length_penalty": (1,), "use_beam_search": (False,), "prompt_logprobs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "chat_template": (), "chat_template_kwargs": ({},), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "documents": ([],), "bad_words": ([],), "truncate_prompt_tokens": (),
}  # fmt: skip

Token = Annotated[int, Field(ge=0, le=2**31)]
Texts = str | list[str]


class Body(BaseModel):
    """What every body here has in common: no coercion, finite numbers, and the extra fields kept for judging."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """OpenAI's stream_options."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(Body):
    """The fields that both endpoints share."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Texts | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class Part(Body):
    """One part of a message's content; only text is read."""

    type: str
    text: str | None = None


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = None


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = None


class LoadBody(Body):
    """POST /v1/load_lora_adapter, as vLLM names it."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool | None = None


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_int_id: int | None = None


def refuse_extras(body: Body) -> None:
    """RequestError naming the fields that would change the answer and are not supported, or that nobody knows."""
    faults = [fault for name, value in (body.model_extra or {}).items() if (fault := _fault(body, name, value))]
    if faults:
        raise RequestError("; ".join(faults[:5]))


def _fault(body: Body, name: str, value: Any) -> str | None:
    if name in HARMLESS:
        return None
    if name in NEUTRAL:
        neutral = value is None or value in NEUTRAL[name]
        return None if neutral else f"{name} is not supported by this server: leave it out"
    known = [*type(body).model_fields, *NEUTRAL]
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name[:80]!r} is no field of this request: " + (f"did you mean {close[0]}?" if close else "leave it out")


def sentence_of(errors: list[Any]) -> tuple[str, str | None]:
    """pydantic's errors as one sentence, and the field of the first."""
    told: dict[str, str] = {}
    for error in errors:
        place = [str(part) for part in error["loc"]]
        # a union reports every member that did not fit: the first says enough
        told.setdefault(".".join(place[:1]) if place[:1] == ["prompt"] else ".".join(place), _reason(place, error))
    first = next(iter(told), "")
    sentence = "; ".join(f"{name[:120]}: {reason}" if name else reason for name, reason in list(told.items())[:3])
    return sentence, first.partition(".")[0] or None


def _reason(place: list[str], error: Any) -> str:
    if place[:1] == ["prompt"]:
        return "expected a text, a list of texts, token ids, or lists of token ids"
    if error["type"] == "missing":
        return "this field is missing: give it"
    message = str(error["msg"])
    return message[:1].lower() + message[1:]
