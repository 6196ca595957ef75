"""What the columns of a row mean: recognising them, mapping them, and checking every value's type.

Recognised, in this order (the first that fits wins):
    messages                               chat turns, each {role, content}
    prompt + chosen + rejected             preferences
    prompt + completion (+ references)     supervised pairs
    tokens + tags                          a tag for each word
    text + label, text + labels            one class, or a list of classes (multi-label)
    text                                   plain text
A mapping {canonical: column of the file} renames first, and the kind must then use every mapped name. Rows keep their
other columns. Strings are never normalised. Not known here: tokens, files. Rejected: guessing that `output` is the
completion (a wrong guess trains the wrong thing and exits 0); the guess is offered in the error instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from lofi.data.faults import Faults, nearest
from lofi.data.readers import Raw
from lofi.errors import DataError

KINDS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (  # kind, required, optional
    ("messages", ("messages",), ()),
    ("preference", ("prompt", "chosen", "rejected"), ()),
    ("sft", ("prompt", "completion"), ("references",)),
    ("token_classification", ("tokens", "tags"), ()),
    ("classification", ("text", "label"), ()),
    ("classification", ("text", "labels"), ()),
    ("text", ("text",), ()),
)
CANONICAL = tuple(dict.fromkeys(name for _, required, optional in KINDS for name in required + optional))
KNOWN = (
    "messages · prompt+chosen+rejected · prompt+completion (+references) · tokens+tags · text+label · "
    "text+labels (lists) · text"
)
_OFTEN = {  # names other tools use, only to make the error's suggestion useful
    "prompt": ("instruction", "question", "input", "source", "dialogue", "query"),
    "completion": ("output", "response", "answer", "target", "summary"),
    "messages": ("conversations", "conversation", "chat"),
    "text": ("content", "sentence", "document", "quote", "review"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags"),
}
_PLAIN_JSON = ("messages", "references", "tokens", "tags", "labels")  # columns that a csv cell may hold as JSON


def understand(raw: Raw, source: str, columns: dict[str, str] | None) -> str:
    """Rename, recognise and check all rows of `raw` in place; the kind of the rows.

    Raises  DataError: unknown or missing columns, wrong types, empty completion or text, more tokens than tags
    """
    mapping = columns or {}
    seen = list(dict.fromkeys(name for row in raw.rows for name in row))
    _check_mapping(mapping, seen, source)
    for row in raw.rows:
        row.update({name: row[column] for name, column in mapping.items() if column in row})
    kind, required = _recognise(list(dict.fromkeys([*mapping, *seen])), set(mapping), source)
    if raw.textual:
        _type_csv(raw)
    faults = Faults(source)
    for row, place in zip(raw.rows, raw.places, strict=True):
        for text in _faults_of(row, kind, required, mapping):
            faults.add(place, text)
    faults.raise_if_any()
    return kind


def _check_mapping(mapping: dict[str, str], seen: list[str], source: str) -> None:
    for name, column in mapping.items():
        if name not in CANONICAL:
            raise DataError(
                f"data.columns maps {name!r}, which is no column lofi knows ({', '.join(CANONICAL)})"
                f"{nearest(name, CANONICAL)}"
            )
        if column not in seen:
            raise DataError(
                f"data.columns reads {name} from {column!r}, but {source} has the columns {_listed(seen)}"
                f"{nearest(column, seen)}"
            )


def _recognise(columns: list[str], mapped: set[str], source: str) -> tuple[str, tuple[str, ...]]:
    for kind, required, optional in KINDS:
        if set(required) <= set(columns) and mapped <= set(required + optional):
            return kind, required
    if mapped:
        raise DataError(
            f"data.columns maps {', '.join(sorted(mapped))}, and with the columns of {source} ({_listed(columns)}) "
            f"that makes no kind of data lofi knows: {KNOWN}"
        )
    raise DataError(
        f"{source} has the columns {_listed(columns)}; lofi knows {KNOWN}; name yours in data.columns, "
        f"for example {_guess(columns)}"
    )


def _guess(columns: list[str]) -> str:
    """A mapping worth trying for these columns, in a recipe's words."""
    found = {
        name: column for name, others in _OFTEN.items() for column in columns if column == name or column in others
    }
    for _, required, _ in KINDS:
        if set(required) <= set(found):
            return "{" + ", ".join(f"{name}: {found[name]}" for name in required) + "}"
    return "{prompt: question, completion: answer}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "(none)"


def _type_csv(raw: Raw) -> None:
    """Give csv cells their types: JSON lists in list columns, and integer labels when every label is one."""
    for row in raw.rows:
        for name in _PLAIN_JSON:
            if str(row.get(name, "")).startswith("["):
                row[name] = _json_or_text(row[name])
    for name in ("label", "labels"):
        if all(_is_integer(row.get(name)) for row in raw.rows):
            for row in raw.rows:
                row[name] = int(row[name])


def _json_or_text(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell  # the type check then names the row


def _is_integer(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lstrip("-").isdecimal()


def _faults_of(row: dict[str, Any], kind: str, required: tuple[str, ...], mapping: dict[str, str]) -> Iterator[str]:
    missing = [name for name in required if row.get(name) is None]
    for name in missing:
        called = f" (read from {mapping[name]!r})" if name in mapping else ""
        has = [column for column, value in row.items() if value is not None]
        yield f"no {name}{called}, which the other rows have; this row has {_listed(has)}"
    if not missing:
        yield from _CHECKS[kind](row)


def _check_pair(row: dict[str, Any]) -> Iterator[str]:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        yield from _check_turns(prompt, "prompt")
    else:
        yield from _check_string(row, "prompt", may_be_empty=True)
    yield from _check_string(row, "completion")
    references = row.get("references")
    if isinstance(references, str):
        row["references"] = [references]
    elif references is not None and not (_strings(references) and references):
        yield "references must be a list of strings with at least one in it; remove the column or fill it"


def _check_preference(row: dict[str, Any]) -> Iterator[str]:
    for name in ("prompt", "chosen", "rejected"):
        if isinstance(row[name], list):
            yield from _check_turns(row[name], name)
        else:
            yield from _check_string(row, name, may_be_empty=name == "prompt")


def _check_string(row: dict[str, Any], name: str, *, may_be_empty: bool = False) -> Iterator[str]:
    value = row[name]
    if not isinstance(value, str):
        yield f"{name} is {_shown(value)}; expected a string"
    elif not may_be_empty and not value.strip():
        yield f"empty {name}; there is nothing to learn from this row; fill it or remove the row"


def _check_messages(row: dict[str, Any]) -> Iterator[str]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        yield f"messages is {_shown(turns)}; expected a list of {{role, content}} objects"
        return
    wrong = list(_check_turns(turns, "messages"))
    yield from wrong
    if wrong:
        return
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        yield "no message has the role assistant, so no token would be trained; add the answer or remove the row"
    for turn in answers:
        if not turn["content"].strip():
            yield "empty completion: an assistant's message without content; fill it or remove the row"


def _check_turns(turns: list[Any], name: str) -> Iterator[str]:
    for number, turn in enumerate(turns, 1):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            yield f"{name}, item {number}, is {_shown(turn)}; expected {{role: user, content: text}}"


def _check_tokens(row: dict[str, Any]) -> Iterator[str]:
    tokens, tags = row["tokens"], row["tags"]
    if not _strings(tokens) or not tokens:
        yield f"tokens is {_shown(tokens)}; expected a list of words with at least one in it"
    elif not isinstance(tags, list) or not all(isinstance(tag, (int, str)) for tag in tags):
        yield f"tags is {_shown(tags)}; expected a list of strings or integers"
    elif len(tokens) != len(tags):
        yield f"{len(tokens)} tokens but {len(tags)} tags; expected one tag for each token"


def _check_class(row: dict[str, Any]) -> Iterator[str]:
    """`label` holds one class, `labels` a list of them; either name is accepted for either."""
    yield from _check_string(row, "text")
    value = row["labels"] if row.get("labels") is not None else row["label"]
    name, other = ("labels", "label") if isinstance(value, list) else ("label", "labels")
    row[name] = value
    row.pop(other, None)
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (int, str)) or (isinstance(item, str) and not item.strip()):
            yield f"{name} is {_shown(value)}; expected an integer, a string, or (multi-label) a list of them"
            return


def _check_text(row: dict[str, Any]) -> Iterator[str]:
    yield from _check_string(row, "text")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}… ({type(value).__name__})" if len(text) > 41 else f"{text} ({type(value).__name__})"


_CHECKS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "messages": _check_messages,
    "preference": _check_preference,
    "sft": _check_pair,
    "token_classification": _check_tokens,
    "classification": _check_class,
    "text": _check_text,
}
