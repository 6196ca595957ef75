"""The part of Go's text/template that chat templates for Ollama are written in, rendered here so that it can be proved.

Knows text, fields, `range`, `if`/`else if`/`else`, variables, trim markers and the functions below, with Go's notion of
empty. Everything else is refused by name, never guessed. Does not know what a template should say.
Source: the documentation of Go's packages text/template and strings; Ollama gives a template `.System` (the system
messages joined by a blank line) and `.Messages` (consecutive ones of a role joined likewise).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lofi.data.chat import Message
from lofi.errors import DataError

_ACTION = re.compile(r"\{\{(-\s)?(?P<body>.*?)(\s-)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|`[^`]*`)|(?P<punct>:=|[(),|])|(?P<word>[^\s(),|:]+))')
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\", "r": "\r"}


def collated(messages: Sequence[Message]) -> dict[str, Any]:
    """What Ollama gives a template for a conversation."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": joined, "Response": "", "Tools": [], "Think": False, "IsThinkSet": False}


def render(template: str, messages: Sequence[Message]) -> str:
    """The text that Ollama makes of a conversation with this template.

    Raises  DataError naming the first thing in the template that is not known here
    """
    values = collated(messages)
    return "".join(_written(_parse(template), values, {"$": values}))


def literal(text: str) -> str:
    """Text as it stands in a template: what opens an action is written as one that says so."""
    return text.replace("{{", '{{ "{{" }}')


# -- parsing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """An `if` (several conditions, each with its body) or a `range` (one)."""

    kind: str
    branches: list[tuple[list[Any] | None, list[Any]]] = field(default_factory=list)
    names: tuple[str, ...] = ()


def _parse(template: str) -> list[Any]:
    pieces = _pieces(template)
    nodes, end = _nodes(pieces)
    if end is not None:
        raise DataError(f"the template has a {{{{ {' '.join(map(str, end))} }}}} that belongs to nothing; remove it")
    return nodes


def _pieces(template: str) -> Iterator[str | list[Any]]:
    """Texts and actions in turn, with the blanks that trim markers take already gone."""
    place, trim = 0, False
    for match in _ACTION.finditer(template):
        before = template[place : match.start()]
        before = before.lstrip() if trim else before
        yield before.rstrip() if match[1] else before
        place, trim = match.end(), match[3] is not None
        body = match["body"].strip()
        if not body.startswith("/*"):
            yield _tokens(body)
    rest = template[place:]
    yield rest.lstrip() if trim else rest


def _tokens(body: str) -> list[Any]:
    found: list[Any] = []
    place = 0
    while body[place:].strip():
        match = _TOKEN.match(body, place)
        if match is None:
            raise DataError(f"the template's {{{{ {body} }}}} cannot be read; use a plainer one")
        place = match.end()
        found.append(("text", _unquoted(match["text"])) if match["text"] else match["punct"] or match["word"])
    return found


def _unquoted(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1]
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1]) or _unknown(f"the escape \\{m[1]}"), text[1:-1])


def _unknown(what: str) -> Any:
    raise DataError(f"the template uses {what}, which is not known here, so it cannot be proved; use a plainer one")


def _nodes(pieces: Iterator[str | list[Any]]) -> tuple[list[Any], list[Any] | None]:
    """Nodes up to the action that ends them (`else ...` or `end`), and that action; None at the end of the text."""
    nodes: list[Any] = []
    for piece in pieces:
        if isinstance(piece, str):
            nodes.append(piece)
        elif piece and piece[0] in ("else", "end"):
            return nodes, piece
        elif piece and piece[0] in ("if", "range"):
            nodes.append(_block(piece, pieces))
        elif piece and piece[0] in ("with", "template", "define", "block", "break", "continue"):
            _unknown(str(piece[0]))
        else:
            nodes.append(("print", piece))
    return nodes, None


def _block(head: list[Any], pieces: Iterator[str | list[Any]]) -> _Block:
    kind, condition = head[0], head[1:]
    names: tuple[str, ...] = ()
    if ":=" in condition:
        at = condition.index(":=")
        names = tuple(name for name in condition[:at] if name != ",")
        condition = condition[at + 1 :]
    block = _Block(kind, names=names)
    wanted: list[Any] | None = condition
    while True:
        body, end = _nodes(pieces)
        block.branches.append((wanted, body))
        if end is None:
            raise DataError(f"the template's {{{{ {kind} }}}} has no {{{{ end }}}}; add it")
        if end[0] == "end":
            return block
        wanted = end[2:] if end[1:2] == ["if"] else None


# -- rendering ---------------------------------------------------------------------------------------------------------


def _written(nodes: list[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Block):
            yield from (_ranged if node.kind == "range" else _chosen)(node, dot, names)
        elif ":=" in node[1]:
            names[node[1][0]] = _value(node[1][2:], dot, names)
        else:
            yield _printed(_value(node[1], dot, names))


def _chosen(block: _Block, dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for condition, body in block.branches:
        if condition is None or _value(condition, dot, names):
            yield from _written(body, dot, dict(names))
            return


def _ranged(block: _Block, dot: Any, names: dict[str, Any]) -> Iterator[str]:
    condition, body = block.branches[0]
    assert condition is not None
    items = _value(condition, dot, names)
    for index, item in enumerate(items):
        bound = (index, item) if len(block.names) == 2 else (item,)
        yield from _written(body, item, {**names, **dict(zip(block.names, bound, strict=False))})
    if not items and len(block.branches) > 1:
        yield from _written(block.branches[1][1], dot, dict(names))


def _printed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _value(tokens: list[Any], dot: Any, names: Mapping[str, Any]) -> Any:
    if "|" in tokens:
        _unknown("a pipe")
    value, rest = _call(tokens, dot, names)
    if rest:
        _unknown(f"{rest[0]!r} here")
    return value


def _call(tokens: list[Any], dot: Any, names: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    if not tokens:
        _unknown("an empty action")
    head = tokens[0]
    if not isinstance(head, str) or head not in _FUNCTIONS:
        return _operand(tokens, dot, names)
    arguments, rest = [], tokens[1:]
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, names)
        arguments.append(value)
    return _FUNCTIONS[head](*arguments), rest


def _operand(tokens: list[Any], dot: Any, names: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    head, rest = tokens[0], tokens[1:]
    if isinstance(head, tuple):
        return head[1], rest
    if head == "(":
        value, rest = _call(rest, dot, names)
        if rest[:1] != [")"]:
            _unknown("an open bracket")
        return value, rest[1:]
    if head in ("true", "false"):
        return head == "true", rest
    if re.fullmatch(r"-?\d+", head):
        return int(head), rest
    variable, *path = head.split(".")
    if variable and variable not in names:
        _unknown(head)
    value = names[variable] if variable else dot
    for name in filter(None, path):
        value = value.get(name) if isinstance(value, Mapping) else _unknown(head)
    return value, rest


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: first in others,
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: one < other,
    "le": lambda one, other: one <= other,
    "gt": lambda one, other: one > other,
    "ge": lambda one, other: one >= other,
    "not": lambda value: not value,
    "and": _and,
    "or": _or,
    "len": len,
    "index": lambda items, place: items[place],
    "slice": lambda items, start=0, stop=None: items[start:stop],
}
