"""From YAML text and key=value overrides to plain values, each with its place.

Knows  YAML: the line of every key, keys given twice, numbers such as 2e-4 (which YAML 1.1 reads as text).
Knows not  which keys exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lofi.errors import RecipeError


class Loader(yaml.SafeLoader):
    """YAML 1.1 without the surprise that 2e-4 is text."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads: the text "2e-4" is quoted."""


for _side in (Loader, Dumper):
    _side.yaml_implicit_resolvers = {key: list(rules) for key, rules in _side.yaml_implicit_resolvers.items()}
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """The mapping in a YAML file, the line of each dotted key, and a sentence for each key given twice.

    Raises  RecipeError where the file is missing, is no YAML, or holds no mapping
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}; give a YAML file, or use --model, --data and --output") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text ({error}); give the path of a YAML file") from None
    return parse_yaml(text, str(path))


def parse_yaml(
    text: str, where: str, *, what: str = "recipe", keys: str = "model, data and output"
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """As `read_yaml`, from text; `where` names it in errors, `what` it should be, and some of its `keys`."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise RecipeError(f"{_place(where, error)}: this is no YAML ({_problem(error)}); correct the line") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{where} holds no {what}; expected keys such as {keys}")
    lines: dict[str, int] = {}
    twice: list[str] = []
    _walk(node, "", lines, twice)
    return values, lines, twice


def parse_override(text: str) -> tuple[str, Any]:
    """("train.epochs", 2) from "train.epochs=2"; the value is read as YAML.

    Raises  RecipeError where there is no '=' or the value is no YAML
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key.strip()):
        raise RecipeError(f"{text!r} is no override; write key.sub=value, such as train.epochs=1")
    try:
        return key.strip(), yaml.load(value, Loader=Loader) if value.strip() else None  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {key}={value} is no YAML ({_problem(error)}); quote it") from None


def flatten(values: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Dotted key -> value, one level deep for the given sections; a section that is no mapping stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _walk(node: yaml.Node | None, prefix: str, lines: dict[str, int], twice: list[str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            twice.append(f"line {line}: {key} is given twice (first on line {lines[key]}); keep one")
        lines.setdefault(key, line)
        _walk(value_node, f"{key}.", lines, twice)


def _place(where: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{where}:{mark.line + 1}" if mark is not None else where


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)
