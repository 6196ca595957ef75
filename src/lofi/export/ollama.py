"""A Modelfile for Ollama: which GGUF files, the chat template in Go, the stop texts, and how to draw.

The template is worked out from the tokenizer's and proved (turns.py), and the ids that it leads to are compared with
those that training saw. What Ollama would do by default and lofi does not (temperature 0.8, a repeat penalty of 1.1) is
set to what the model's generation config says. Knows not  how GGUF files are made.
Source: Ollama's description of the Modelfile; a BOS that llama.cpp adds by itself is left out of the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.data.chat import Message
from lofi.data.format import TextFormat
from lofi.errors import DataError, RequestError
from lofi.export import turns
from lofi.export.go_template import render

_PARAMETERS = {"top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile, and what is to be known of it."""

    text: str
    notes: tuple[str, ...] = ()


def modelfile(
    rule: TextFormat,
    generation: Mapping[str, Any],
    *,
    model: str,
    adapter: str | None = None,
    adds_bos: bool = False,
    context: int | None = None,
    template: str | None = None,
) -> Modelfile:
    """The Modelfile for GGUF files that lie beside it.

    `generation` is the model's generation config, `adds_bos` what the GGUF file says of BOS, `template` one in Go that
    the user wrote, which is held against the tokenizer's as far as it can be read.
    Raises  RequestError where the chat template cannot be written in Go, or holds what a Modelfile cannot quote
    """
    go, notes = template_for(rule, adds_bos=adds_bos, template=template)
    stops = [stop for stop in dict.fromkeys(map(str, rule.tokenizer.convert_ids_to_tokens(rule.stop_ids))) if stop]
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else []), f"TEMPLATE {_quoted(go)}"]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    lines += [f"PARAMETER {key} {value}" for key, value in parameters(generation).items()]
    return Modelfile("\n".join(lines) + "\n", tuple(notes))


def parameters(generation: Mapping[str, Any]) -> dict[str, Any]:
    """How to draw, from a generation config: greedy unless it says do_sample, and no penalty unless it says so."""
    draws = bool(generation.get("do_sample"))
    found: dict[str, Any] = {"temperature": generation.get("temperature") or 1.0 if draws else 0}
    found |= {ours: generation[key] for key, ours in _PARAMETERS.items() if draws and generation.get(key) is not None}
    return found | {"repeat_penalty": generation.get("repetition_penalty") or 1.0}


def template_for(rule: TextFormat, *, adds_bos: bool, template: str | None = None) -> tuple[str, list[str]]:
    """The template in Go for a text format, and notes.

    Raises  RequestError for an encoder-decoder, or a template that cannot be expressed
    """
    if rule.kind == "seq2seq":
        raise RequestError("Ollama serves no encoder-decoder; serve this model with lofi")
    own = own_rendering(rule)
    if template is not None:
        return template, _given(template, own)
    if rule.kind == "plain":
        go, notes = turns.plain(rule.separator, _text(rule, rule.eos_id)), []
        if any(own(messages) != render(go, messages) for messages in turns.probes(True).values()):
            raise RequestError("the plain text format did not come out alike in Go; please report this")
    else:
        found = turns.derived(own)
        go, notes = found.text, list(found.notes)
    if not adds_bos:
        return go, [*notes, *_id_notes(rule, go, ())]
    bare = _without_bos(go, rule)
    if bare == go and rule.kind == "chat":
        bos = _text(rule, rule.head[0]) if rule.head else "a BOS token"
        notes.append(f"llama.cpp puts {bos} before every prompt, which this chat template does not: replay it")
        return go, notes
    return bare, [*notes, *_id_notes(rule, bare, rule.head)]


def own_rendering(rule: TextFormat) -> turns.Render:
    """A conversation as the text that training saw; in the plain format one question stands for a prompt."""

    def written(messages: Sequence[Message]) -> str:
        if rule.chat is not None:
            return rule.chat.render(messages, ask=True)
        alone = len(messages) == 1 and messages[0]["role"] == "user"
        pieces = rule.prompt_pieces(messages[0]["content"] if alone else list(messages))
        head = 1 if pieces and pieces[0].ids == rule.head and not pieces[0].text else 0
        return "".join(piece.text or "".join(_text(rule, i) for i in piece.ids) for piece in pieces[head:])

    return written


def _given(template: str, own: turns.Render) -> list[str]:
    try:
        return list(turns.proved(template, own, turns.takes_system(own)).notes)
    except (DataError, RequestError) as error:
        return [f"the template given is taken as it is, and not proved to be the tokenizer's: {error}"]


def _text(rule: TextFormat, token: int | None) -> str:
    return "" if token is None else str(rule.tokenizer.convert_ids_to_tokens(token))


def _without_bos(go: str, rule: TextFormat) -> str:
    """The template without the BOS that it begins with, in each of its beginnings."""
    if not rule.head:
        return go
    bos = _text(rule, rule.head[0])
    for opening in ("", "{{ if .System }}"):
        go = opening + go[len(opening) + len(bos) :] if go.startswith(opening + bos) else go
    return go.replace("{{ else }}" + bos, "{{ else }}", 1) if go.startswith("{{ if .System }}") else go


def _id_notes(rule: TextFormat, go: str, head: Sequence[int]) -> list[str]:
    """Conversations whose text is the same but whose tokens are not what training saw."""
    unlike = []
    for what, messages in turns.probes(False).items():
        alone = len(messages) == 1 and rule.kind == "plain"
        wanted = rule.encode_prompt(messages[0]["content"] if alone else messages)
        found = [*head, *rule.tokenizer(render(go, messages), add_special_tokens=False)["input_ids"]]
        unlike += [what] if found != wanted else []
    return [f"the same text is cut into other tokens than in training for: {'; '.join(unlike)}"] if unlike else []


def _quoted(text: str) -> str:
    """A value as a Modelfile quotes it; it knows no escapes.

    Raises  RequestError for a text that holds three quotation marks
    """
    if '"""' in text:
        raise RequestError('a template or stop text holds """, which a Modelfile cannot quote; give --template FILE')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def bos_of(gguf: Path) -> bool:
    """Whether llama.cpp puts BOS before a text, as a GGUF file says."""
    from lofi.export.gguf_file import read

    return bool(read(gguf).values.get("tokenizer.ggml.add_bos_token", False))
