"""A chat template as Ollama's: worked out from what it writes around the words of each role, and proved on probes.

    [system? before S + S + after S : before U] U  after U  A  after A  U  ...  ask

Most templates are of this form, the system message inside the first user's turn (Llama 2, Gemma 3) included. What is
found is rendered as Ollama would (go_template.py) and compared with the tokenizer's own rendering over conversations of
several lengths; a template that writes anything else is refused, not approximated. Knows not  tokens.
Rejected: a table of known templates by name, which says nothing about the one that a tokenizer really has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lofi.data.chat import Message
from lofi.errors import DataError, RequestError
from lofi.export.go_template import literal, render

Render = Callable[[Sequence[Message]], str]
"""A conversation, with the line that asks for the answer, as text."""
_S, _U, _A, _V = (f"Zq7{word}Zq7" for word in ("system", "first", "answer", "second"))


@dataclass(frozen=True)
class GoTemplate:
    """A template for Ollama, and the conversations that it renders unlike the tokenizer's own."""

    text: str
    takes_system: bool
    notes: tuple[str, ...] = ()


def turn(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


_WORDS = (
    "What is 2 + 2?",
    "Tôi yêu tiếng Việt.\nHai dòng: {{ .System }} \"và\" '%s'",
    "x",
    "Again, please:\n\n- one\n- two",
)


def probes(takes_system: bool) -> dict[str, list[Message]]:
    """Conversations that every template must render alike, by what is special about them."""
    one, two, three, four = _WORDS
    found = {
        "a question": [turn("user", one)],
        "a question of two lines": [turn("user", two)],
        "a second question": [turn("user", one), turn("assistant", three), turn("user", two)],
        "a third question": [
            *(turn("user", four), turn("assistant", two), turn("user", three)),
            *(turn("assistant", one), turn("user", two)),
        ],
    }
    with_system = {f"{what} after a system message": [turn("system", four), *said] for what, said in found.items()}
    return found | (with_system if takes_system else {})


_UNUSUAL: dict[str, list[Message]] = {
    "messages that begin or end with blanks": [turn("user", "  a b \n")],
    "a system message after the first question": [
        *(turn("user", "a"), turn("assistant", "b"), turn("system", "c"), turn("user", "d")),
    ],
    "two questions in a row": [turn("user", "a"), turn("user", "b")],
}


def derived(own: Render) -> GoTemplate:
    """The template for Ollama that writes what `own` writes.

    Raises  RequestError where it cannot be expressed, with the first conversation that would differ
    """
    try:
        text, takes_system = _worked_out(own)
    except (DataError, ValueError) as error:
        raise RequestError(_refused(str(error))) from error
    return proved(text, own, takes_system)


def proved(text: str, own: Render, takes_system: bool) -> GoTemplate:
    """The template with what was found about it.

    Raises  RequestError where it renders one of the usual conversations unlike `own`
    """
    for what, messages in probes(takes_system).items():
        wanted, found = own(messages), render(text, messages)
        if wanted != found:
            raise RequestError(_refused(f"for {what} it would write {found!r}, the tokenizer writes {wanted!r}"))
    return GoTemplate(text, takes_system, tuple(_notes(text, own, takes_system)))


def takes_system(own: Render) -> bool:
    """Whether a template takes a system message and writes its words."""
    try:
        return _S in own([turn("system", _S), turn("user", _U)])
    except DataError:
        return False


def _refused(why: str) -> str:
    return (
        f"this chat template cannot be written as Ollama's ({why}); give one of your own with --template FILE, or use "
        '/api/generate with "raw": true and prompts in the template\'s format'
    )


def _notes(text: str, own: Render, with_system: bool) -> list[str]:
    notes = [] if with_system else ["the chat template takes no system message, and Ollama drops one silently"]
    unlike = [what for what, messages in _UNUSUAL.items() if _differs(text, own, messages)]
    if unlike:
        notes.append(f"Ollama writes these unlike the tokenizer's template: {'; '.join(unlike)}")
    return notes


def _differs(text: str, own: Render, messages: list[Message]) -> bool:
    try:
        return own(messages) != render(text, messages)
    except DataError:
        return False  # the tokenizer's template refuses these: there is nothing that Ollama should say


def _worked_out(own: Render) -> tuple[str, bool]:
    before, ask = _between(own([turn("user", _U)]), _U)
    long = own([turn("user", _U), turn("assistant", _A), turn("user", _V)])
    again, after_user, after_answer, ask_again = _between(long, _U, _A, _V)
    if (again, ask_again) != (before, ask):
        raise DataError("a second question changes how the first is written")
    with_system = takes_system(own)
    head = literal(before)
    if with_system:
        opened, closed, _ = _between(own([turn("system", _S), turn("user", _U)]), _S, _U)
        asked = literal(opened) + "{{ .System }}" + literal(closed)
        head = "{{ if .System }}" + asked + "{{ else }}" + head + "{{ end }}"
    return head + _body(literal(after_user), literal(after_answer), literal(ask)), with_system


def _body(after_user: str, after_answer: str, ask: str) -> str:
    """The loop over the turns; what asks is told from what merely follows a question where the two differ."""
    asked = after_user
    if ask != after_user:
        asked = f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{ask}{{{{ else }}}}{after_user}{{{{ end }}}}"
    return (
        '{{ range $i, $turn := .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        + asked
        + '{{ else if eq .Role "assistant" }}{{ .Content }}'
        + after_answer
        + "{{ end }}{{ end }}"
    )


def _between(text: str, *marks: str) -> list[str]:
    """The texts before, between and after the marks.

    Raises  DataError where a mark is missing, out of order or written twice
    """
    found = []
    for mark in marks:
        before, seen, text = text.partition(mark)
        if not seen or mark in text:
            raise DataError("it leaves out or repeats the words of a message")
        found.append(before)
    return [*found, text]


def plain(separator: str, eos: str) -> str:
    """The template of the plain format: one question is the prompt itself, several turns are lines by role.

    Source  data/format.py, "plain"; `eos` is the text of the token that ends an answer
    """
    asked = "{{ .Content }}" + literal(separator)
    return (
        "{{ if eq (len .Messages) 1 }}{{ range .Messages }}" + asked + "{{ end }}{{ else }}{{ range .Messages }}"
        '{{ if eq .Role "assistant" }}Assistant:\n{{ .Content }}' + literal(eos) + "{{ else }}"
        '{{ if eq .Role "system" }}System:\n{{ else }}User:\n{{ end }}'
        + asked
        + "{{ end }}{{ end }}Assistant:\n{{ end }}"
    )
