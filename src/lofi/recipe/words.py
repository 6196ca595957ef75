"""The sentences for what is wrong with a recipe: the nearest known name, and pydantic's faults in plain words.

Knows  spelling and error kinds. Knows not  which keys a recipe has: they are passed in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "is_instance_of": "a list",
    "sequence_str": "a list",
    "sequence_type": "a list",
    "model_type": "a section (key: value pairs)",
    "model_attributes_type": "a section (key: value pairs)",
    "string_too_short": "some text",
    "string_type": "text",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name` by difflib's ratio, None where nothing is close; case is ignored."""
    lower = {item.lower(): item for item in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=cutoff)
    return lower[found[0]] if found else None


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The dotted key closest to `key`: first by the whole path, then by its last part in any section."""
    section, _, leaf = key.rpartition(".")
    if section:
        known = [item for item in known if "." in item]
    same_leaf = [item for item in known if item.rpartition(".")[2] == leaf]
    if same_leaf:
        return same_leaf[0]
    by_path = nearest(key, known, cutoff=0.75)
    if by_path:
        return by_path
    leaves = {item.rpartition(".")[2]: item for item in known}
    close = nearest(leaf, leaves)
    return leaves[close] if close else None


def unknown_key(key: str, known: Sequence[str]) -> str:
    """One sentence for a key that no recipe has."""
    close = nearest_key(key, known)
    if close:
        return f"unknown key {key}; did you mean {close}?"
    section = key.rpartition(".")[0]
    here = [item.rpartition(".")[2] for item in known if item.rpartition(".")[0] == section]
    return f"unknown key {key}; {section or 'a recipe'} has {', '.join(here)}"


def no_such(key: str, value: str, known: Sequence[str]) -> str:
    """One sentence for a value outside a fixed list."""
    close = nearest(value, known)
    hint = f"; did you mean {close}?" if close else ""
    return f"{key} is {value!r}, expected one of {', '.join(known)}{hint}"


def known_but_later(key: str, value: str, now: Sequence[str]) -> str:
    """One sentence for a value that lofi means to have and this version does not."""
    remedy = f"use {' or '.join(now)}" if now else "leave it out"
    return f"{key}: {value} is known to lofi but not in this version; {remedy}"


def value_fault(key: str, faults: Sequence[Any], value: Any) -> str:
    """One sentence for pydantic's faults at one key (a union reports one a member); `value` is what the key holds."""
    if faults[0]["type"] == "missing":
        return f"{key} is missing; add {key}: {MISSING.get(key, '...')}"
    for fault in faults:
        if fault["type"] == "literal_error":
            names = [name.strip().strip("'") for name in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
            return no_such(key, str(fault["input"]), names)
    expected = " or ".join(dict.fromkeys(_expected(fault) for fault in faults))
    return f"{key} is {_shown(value)}, expected {expected}"


def _shown(value: Any) -> str:
    return "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


MISSING = {
    "model": "a folder or a hub id",
    "data": "{train: train.jsonl}",
    "data.train": "a file of training rows",
    "output": "the folder for this run, such as runs/first",
}


def _expected(fault: dict[str, Any]) -> str:
    kind = fault["type"]
    if kind in BOUNDS:
        word, bound = BOUNDS[kind]
        return f"a number {word} {fault['ctx'][bound]:g}"
    return EXPECTED.get(kind, fault["msg"])
