"""A model behind an OpenAI-compatible server: asked greedily, its answer read from whatever shape that server gives it.

Knows the answers of vLLM, llama.cpp, Ollama and lofi, and what to leave out when a server refuses a request; each thing
left out is told. Ollama is asked through its own /api/generate, raw: its /v1/completions puts the template around the
prompt. Knows not  what the answers should be.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.errors import LofiError, RequestError
from lofi.export.connection import Connection, Refused

Token = int | str
"""A token by its id, or by its text where the server tells no ids."""
UNANSWERABLE = (400, 422)
"""Statuses by which a server says that it cannot answer what was asked; asked for less, it may."""
_ID = "token_id:"
_AS_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}
_OWNERS = {"vllm": "vllm", "llamacpp": "llamacpp", "library": "ollama"}


@dataclass(frozen=True)
class Reply:
    """What a server answered to one prompt."""

    text: str
    finish: str | None
    tokens: Sequence[Token] | None = None
    """None where the server tells only the text."""
    tops: Sequence[Mapping[Token, float]] = ()
    """For every step the log probabilities of the likeliest tokens."""
    prompt_ids: Sequence[int] | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class _Way:
    """One way to ask; the next one asks for less."""

    ids: bool
    logprobs: bool
    extras: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_WAYS = (
    _Way(True, True, _AS_IDS),
    _Way(True, True, {"return_token_ids": True}),
    _Way(True, True),
    _Way(False, True, _AS_IDS, "the server takes no token ids as a prompt, so their text was sent"),
    _Way(False, True, {}, "the server takes no token ids as a prompt, so their text was sent"),
    _Way(True, False, {}, "the server gives no log probabilities, so only tokens and stops were compared"),
    _Way(
        *(False, False, {}),
        "the server takes no token ids as a prompt and gives no log probabilities, so the text was sent and compared",
    ),
)


@dataclass
class Served:
    """One model of one server."""

    connection: Connection
    model: str
    kind: str
    """vllm, llamacpp, ollama or other."""
    notes: list[str] = field(default_factory=list)
    _way: int = 0

    @classmethod
    def open(cls, connection: Connection, asked: str | None, usual: str) -> Served:
        """Ask the server which models it has, and choose one: `asked`, else `usual`.

        Raises  RequestError naming the server's models where it has none of that name; what Connection.get raises
        """
        listed = _listed(connection)
        kind = next((_OWNERS[owner] for owner in listed.values() if owner in _OWNERS), "other")
        names = list(listed)
        wanted = asked or usual
        if wanted not in listed and f"{wanted}:latest" in listed:
            wanted = f"{wanted}:latest"
        if wanted in listed:
            return cls(connection, wanted, kind)
        if asked is None and kind == "llamacpp" and len(names) == 1:  # it serves one model, whatever it is called
            return cls(connection, names[0], kind, [f"llama.cpp serves one model, {names[0]}: that one was asked"])
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RequestError(
            f"{connection.root} serves no model {wanted!r}, but {', '.join(names[:8]) or 'none'}; {hint}"
            "give its name with --endpoint-model"
        )

    @property
    def takes_ids(self) -> bool:
        """Whether prompts go out as ids, as far as is known; as text otherwise."""
        return self.kind != "ollama" and _WAYS[self._way].ids

    def complete(self, ids: Sequence[int], text: str | None, steps: int, top: int) -> Reply:
        """The greedy continuation of a prompt given as ids (its `text` is for servers that take no ids).

        Raises  RequestError where the server refuses every way of asking, with what it said to the first
        """
        if self.kind == "ollama":
            return self._generate(text, steps, top)
        refused: Refused | None = None
        for place in range(self._way, len(_WAYS)):
            way = _WAYS[place]
            if not way.ids and text is None:
                continue
            try:
                answer = self.connection.post("/v1/completions", self._body(way, ids, text, steps, top))
            except Refused as error:
                if error.status not in UNANSWERABLE:
                    raise
                refused = refused or error
                continue
            if place != self._way and way.note:
                self.notes.append(way.note)
            self._way = place
            return read_completion(answer)
        assert refused is not None
        raise refused

    def _body(self, way: _Way, ids: Sequence[int], text: str | None, steps: int, top: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids) if way.ids else text}
        body |= {"max_tokens": steps, "temperature": 0}
        if way.logprobs:
            body |= {"logprobs": top} | ({"n_probs": top} if self.kind == "llamacpp" else {})
        return body | dict(way.extras)

    def _generate(self, text: str | None, steps: int, top: int) -> Reply:
        options = {"temperature": 0, "num_predict": steps, "repeat_penalty": 1.0, "seed": 0}
        body = {"model": self.model, "prompt": text, "raw": True, "stream": False, "options": options}
        answer = self.connection.post("/api/generate", body | {"logprobs": True, "top_logprobs": top})
        return read_generated(answer)

    def chat(self, question: str, steps: int, top: int) -> Reply:
        """The greedy answer to one question of the user, in the server's own chat template."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        body |= {"max_tokens": steps, "temperature": 0}
        if self.kind == "ollama":
            return read_completion(self.connection.post("/v1/chat/completions", body | {"seed": 0}))
        more = {"logprobs": True, "top_logprobs": top}
        try:
            return read_completion(self.connection.post("/v1/chat/completions", body | more | _AS_IDS))
        except Refused as error:
            if error.status not in UNANSWERABLE:
                raise
        return read_completion(self.connection.post("/v1/chat/completions", body | more))


def _listed(connection: Connection) -> dict[str, str]:
    """The server's models and who owns them."""
    answer = connection.get("/v1/models")
    try:
        return {str(entry["id"]): str(entry.get("owned_by")) for entry in answer["data"]}
    except (TypeError, KeyError, AttributeError):
        raise LofiError(
            f"{connection.root}/v1/models lists no models; give the address of an OpenAI-compatible server"
        ) from None


# -- reading -----------------------------------------------------------------------------------------------------------


def read_completion(answer: Any) -> Reply:
    """A Reply from what /v1/completions or /v1/chat/completions answered.

    Raises  LofiError where the answer has not OpenAI's shape
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens, tops = _read_logprobs(choice.get("logprobs"))
        return Reply(
            text=text or "",
            finish=choice.get("finish_reason"),
            tokens=choice.get("token_ids") or tokens,
            tops=tops,
            prompt_ids=choice.get("prompt_token_ids") or answer.get("prompt_token_ids"),
            prompt_tokens=(answer.get("usage") or {}).get("prompt_tokens"),
        )
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise LofiError(
            f"the server's answer has not OpenAI's shape ({type(error).__name__}: {error}); "
            "give the address of an OpenAI-compatible server"
        ) from None


def read_generated(answer: Any) -> Reply:
    """A Reply from what Ollama's /api/generate answered; its token counts leave out what it had cached."""
    if not isinstance(answer, dict) or "response" not in answer:
        raise LofiError("Ollama's answer has no response; give the address of an Ollama server")
    tokens, tops = _read_logprobs(answer.get("logprobs"))
    return Reply(str(answer["response"]), answer.get("done_reason"), tokens, tops)


def _read_logprobs(given: Any) -> tuple[list[Token] | None, list[dict[Token, float]]]:
    """Tokens and tops of OpenAI's old shape (lists side by side) or new one (a list of tokens, under "content")."""
    if not given:
        return None, []
    if isinstance(given, dict) and "content" not in given:
        tops = [{_token(key): value for key, value in (step or {}).items()} for step in given.get("top_logprobs") or []]
        tokens = [_token(token) for token in given.get("tokens") or []]
        return tokens or None, tops
    steps = given["content"] if isinstance(given, dict) else given
    if not steps:
        return None, []
    return [_entry(step) for step in steps], [
        {_entry(one): one["logprob"] for one in [step, *(step.get("top_logprobs") or ())]} for step in steps
    ]


def _entry(one: Mapping[str, Any]) -> Token:
    return int(one["id"]) if "id" in one else _token(one["token"])


def _token(key: str) -> Token:
    return int(key.removeprefix(_ID)) if key.startswith(_ID) and key.removeprefix(_ID).isdigit() else key
