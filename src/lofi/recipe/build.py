"""From a file and overrides to a checked Recipe; all faults of a recipe are reported at once.

Knows  the order of authority: default, then file, then command line. Knows not  what any key means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic

from lofi.errors import RecipeError
from lofi.recipe.sections import Origin, Recipe, Section, known_keys
from lofi.recipe.source import flatten, parse_override, read_yaml
from lofi.recipe.words import unknown_key, value_fault

RIVALS = {"train.max_steps": "train.epochs", "train.epochs": "train.max_steps"}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with "key.sub=value" overrides applied.

    Raises  RecipeError listing every fault with its line: unknown keys with the nearest known one, values out of range
    """
    values, lines, twice = read_yaml(path)
    return _build(values, overrides, where=str(path), lines=lines, faults=twice)


def make_recipe(
    values: Mapping[str, Any],
    overrides: Iterable[str] = (),
    *,
    where: str = "the request",
    lines: dict[str, int] | None = None,
) -> Recipe:
    """The recipe in a nested mapping (flags, or Python); its values count as given on the command line.

    lines   the line of each dotted key, where the values stand in the file `where` (a study's); they count as its own
    Raises  RecipeError as `load_recipe`, with `where` in place of the file
    """
    return _build(dict(values), overrides, where=where, lines=lines, faults=[])


def _build(
    values: dict[str, Any], overrides: Iterable[str], *, where: str, lines: dict[str, int] | None, faults: list[str]
) -> Recipe:
    sections = {name for name in Recipe.model_fields if _is_section(name)}
    flat = flatten(values, sections)
    origins: dict[str, Origin] = dict.fromkeys(flat, "command line" if lines is None else "file")
    _apply(flat, origins, overrides, sections)
    places = {key: f"line {line}: " for key, line in (lines or {}).items() if origins.get(key, "file") == "file"}
    known = known_keys()
    faults = faults + [places.get(key, "") + unknown_key(key, known) for key in flat if key not in known]
    nested = _nest({key: value for key, value in flat.items() if key in known}, sections)
    recipe, more = _validate(nested, places, known)
    if recipe is None or faults:
        raise RecipeError(one_message(where, faults + more))
    recipe._origins.update({key: origins.get(key, "default") for key in known if key not in sections})
    return recipe


def _apply(flat: dict[str, Any], origins: dict[str, Origin], overrides: Iterable[str], sections: set[str]) -> None:
    """Lay the overrides over the values; train.max_steps on the command line sets a file's train.epochs aside."""
    given = [parse_override(text) for text in overrides]
    for key, value in given:
        leaves = flatten({key: value}, sections)
        for leaf, inner in leaves.items():
            flat[leaf], origins[leaf] = inner, "command line"
            rival = RIVALS.get(leaf)
            if rival and inner is not None and origins.get(rival) == "file":
                flat[rival], origins[rival] = None, "command line"


def _validate(values: dict[str, Any], places: Mapping[str, str], known: list[str]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or a sentence for each fault of its values."""
    try:
        return Recipe.model_validate(values), []
    except pydantic.ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for fault in error.errors():
            by_key.setdefault(_key_of(fault["loc"], known), []).append(fault)
        return None, [places.get(key, "") + _sentence(key, faults, values) for key, faults in by_key.items()]


def _sentence(key: str, faults: list[Any], values: Mapping[str, Any]) -> str:
    own = [fault["ctx"]["error"] for fault in faults if fault["type"] == "value_error"]
    if own:
        return str(own[0])
    section, dot, leaf = key.partition(".")
    held = values.get(section)
    return value_fault(key, faults, held.get(leaf) if dot and isinstance(held, Mapping) else held)


def _key_of(loc: tuple[Any, ...], known: list[str]) -> str:
    """The recipe's key in a pydantic location, without the union members and list indices behind it.

    Faults of the whole recipe have no location: they are about what method goes with what.
    """
    if not loc:
        return "method"
    dotted = ".".join(str(part) for part in loc[:2])
    return dotted if dotted in known else str(loc[0])


def _nest(flat: dict[str, Any], sections: set[str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, leaf = key.partition(".")
        if dot and section in sections:
            inner = nested.setdefault(section, {})
            if isinstance(inner, dict):
                inner[leaf] = value
        elif value is not None or key not in sections:
            nested[key] = value
    return nested


def one_message(where: str, faults: list[str]) -> str:
    """All faults of a file as one message: a sentence with its line, or a list of them."""
    if len(faults) == 1:
        first = faults[0]
        line, colon, rest = first.removeprefix("line ").partition(": ")
        return f"{where}:{line}: {rest}" if first.startswith("line ") and colon else f"{where}: {first}"
    return f"{where} has {len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults)


def _is_section(name: str) -> bool:
    kind = Recipe.model_fields[name].annotation
    return isinstance(kind, type) and issubclass(kind, Section)
