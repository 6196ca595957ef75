"""The study: a recipe and what varies in it, checked before anything starts.

Knows  the keys of a study file, which of them are a recipe's, and the line of each. `seed` is train.seed; nested and
       dotted keys mean the same; a key=value word without `base.` or `grid.` in front belongs to the base.
Knows not  which runs follow (`grid`), or whether files and models are there (`check`). Imports no torch.
Rejected  a list of whole recipes (nothing would say what varies), and an `output` in the file (the same study is run
          again in another place).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from lofi.errors import RecipeError
from lofi.recipe import Recipe, make_recipe
from lofi.recipe.build import one_message
from lofi.recipe.sections import Count, Section, known_keys
from lofi.recipe.source import flatten, parse_override, parse_yaml
from lofi.recipe.words import nearest, nearest_key, unknown_key, value_fault
from lofi.study.latency import LatencySpec

SECTIONS = tuple(
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)
ALIASES = {"seed": "train.seed"}
PLACEHOLDER = "runs/one"  # a recipe has an output; a study's runs get theirs when they run


class Arm(Section):
    """A named combination of recipe keys, for what is not a full product (which matrices under one budget)."""

    name: Annotated[str, Field(min_length=1)]
    overrides: dict[str, Any] = Field(default_factory=dict)


class EvaluateSection(Section):
    """How every run is judged, the base too: greedily, on the same rows."""

    rows: Count | None = None  # of data.test (else data.validation), and of the general text; None: all of them
    max_new_tokens: Count = 128  # longest answer, tokens


class Study(Section):
    """What is compared: recipe keys by their dotted names in `base`, `grid` and `arms`."""

    kind: Literal["quality", "latency"] = "quality"
    base: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    arms: list[Arm] = Field(default_factory=list)
    metrics: list[str] | None = None  # None: what `lofi evaluate` measures on such rows
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    general: str | None = None  # held-out general text (.txt, or rows as `lofi evaluate` reads them): forgetting
    keep: Literal["adapters", "all"] = "adapters"  # all: full models and checkpoints stay too
    latency: LatencySpec = Field(default_factory=LatencySpec)


READ_BY = {
    "quality": ("kind", "base", "grid", "arms", "metrics", "evaluate", "general", "keep"),
    "latency": ("kind", "latency"),
}


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """The study in a YAML file, with "key=value" words applied ("train.epochs=1", "grid.lora.r=[4]", "metrics=[bleu]").

    Raises  RecipeError listing every fault with its line: unknown keys with the nearest known one, lists that are
            empty or no lists, arms that clash, a base that is no recipe
    """
    values, lines, faults = _read(path)
    _apply(values, overrides, lines)
    places = {key: f"line {line}: " for key, line in lines.items()}
    faults = faults + [places.get(key, "") + _unknown(key) for key in values if key not in Study.model_fields]
    known = {key: value for key, value in values.items() if key in Study.model_fields}
    found = _Reading(places)
    for name in ("base", "grid", "arms"):
        if name in known:
            known[name] = getattr(found, name)(known[name])
    faults += found.faults
    study, more = _validate(known, places) if not found.faults else (None, [])
    faults += more
    if study is None or faults:
        raise RecipeError(one_message(str(path), faults))
    _refuse_whole(study, set(known), str(path), lines)
    return study


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no study {path}; give a YAML file with base, grid and metrics") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text ({error}); give the path of a YAML file") from None
    return parse_yaml(text, str(path), what="study", keys="base, grid and metrics")


def _apply(values: dict[str, Any], overrides: Iterable[str], lines: dict[str, int]) -> None:
    """Lay key=value words over the file's values; a word for a recipe's key goes to the base."""
    for key, value in map(parse_override, overrides):
        head, _, rest = key.partition(".")
        if head not in Study.model_fields and (head in Recipe.model_fields or key in ALIASES):
            head, rest = "base", key
        if not rest:
            values[head] = value
        elif isinstance(held := values.setdefault(head, {}), dict):
            flat = flatten(held, SECTIONS) if head in ("base", "grid") else held
            values[head] = flat | {rest: value}
            if head == "base" and any(_dotted(k) == _dotted(rest) for k in _keys_of(values.get("grid"))):
                raise RecipeError(f"{rest} is varied by the grid; write grid.{rest}=[...] to choose other values")
        else:
            values[head] = {rest: value}
        lines.pop(f"{head}.{rest}" if rest else head, None)


def _keys_of(grid: Any) -> Iterable[str]:
    return flatten(grid, SECTIONS) if isinstance(grid, dict) else ()


def _unknown(key: str) -> str:
    """One sentence for a key that no study has."""
    if key in Recipe.model_fields:
        return f"{key} is a recipe's key; put it under base, or under grid with a list"
    close = nearest_key(key, [*_study_keys(), *known_keys()])
    hint = f"did you mean {close}?" if close else f"a study has {', '.join(Study.model_fields)}"
    return f"unknown key {key}; {hint}"


def _study_keys() -> list[str]:
    return [*Study.model_fields, *(f"evaluate.{key}" for key in EvaluateSection.model_fields)] + [
        f"latency.{key}" for key in LatencySpec.model_fields
    ]


def _dotted(key: str) -> str:
    return ALIASES.get(key, key)


class _Reading:
    """Reads the parts of a study that hold recipe keys, and gathers what is wrong with them."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = places
        self.faults: list[str] = []
        self.known = [key for key in known_keys() if key not in SECTIONS]
        self.varied: set[str] = set()

    def base(self, value: Any) -> Any:
        """The base as dotted keys."""
        return self._keys("base", value) if self._mapping("base", value) else value

    def grid(self, value: Any) -> Any:
        """The grid as dotted keys with their lists."""
        if not self._mapping("grid", value):
            return value
        found = self._keys("grid", value)
        for key, values in found.items():
            fault = _list_fault(values)
            if fault:
                self.faults.append(f"{self.places.get(f'grid.{key}', '')}grid.{key} is {fault}")
        self.varied = set(found)
        return found

    def arms(self, value: Any) -> Any:
        """The arms as [{name, overrides}]."""
        place = self.places.get("arms", "")
        if not isinstance(value, list) or not all(isinstance(arm, dict) for arm in value):
            self.faults.append(f"{place}arms is {value!r}, expected a list such as [{{name: q, lora.r: 4}}]")
            return value
        names = [arm.get("name") for arm in value]
        for index, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                self.faults.append(f"{place}arm {index + 1} has no name; give each arm a name: text of its own")
            elif name == "base" or name in names[:index]:
                why = "the name of the untouched model" if name == "base" else "given twice"
                self.faults.append(f"{place}the arm's name {name!r} is {why}; give each arm another")
        return [self._arm(arm, place) for arm in value]

    def _arm(self, arm: dict[str, Any], place: str) -> dict[str, Any]:
        found = self._keys("arms", {key: value for key, value in arm.items() if key != "name"}, place)
        for key in found:
            if key in self.varied:
                self.faults.append(f"{place}{key} is set by the arm {arm.get('name')} and varied by the grid; keep one")
            elif key == "train.seed":
                self.faults.append(f"{place}seed belongs in the grid: an arm is compared over its seeds")
        return {"name": arm.get("name"), "overrides": found}

    def _keys(self, part: str, value: dict[str, Any], place: str | None = None) -> dict[str, Any]:
        """A part's keys under their recipe's dotted names; the unknown ones are faults."""
        found: dict[str, Any] = {}
        for key, item in flatten(value, SECTIONS).items():
            name = _dotted(key)
            where = self.places.get(f"{part}.{key}", "") if place is None else place
            if name == "output":
                self.faults.append(f"{where}{part}.output: a study's runs have no output of their own; give --output")
            elif name in SECTIONS:
                self.faults.append(f"{where}{part}.{key} is a section; name one of its keys, such as lora.r")
            elif name not in self.known:
                self.faults.append(where + unknown_key(key, self.known))
            elif name in found:
                self.faults.append(f"{where}{part}.{name} is given twice; keep one")
            found[name] = item
        return found

    def _mapping(self, part: str, value: Any) -> bool:
        if isinstance(value, dict):
            return True
        self.faults.append(f"{self.places.get(part, '')}{part} is {value!r}, expected a section (key: value pairs)")
        return False


def _list_fault(values: Any) -> str | None:
    """What is wrong with a grid's values; None where nothing is."""
    if not isinstance(values, list):
        return f"{values!r}, expected a list of values, such as [{values!r}]"
    if not values:
        return "an empty list, so there is no run; give at least one value, or leave the key out"
    twice = [value for index, value in enumerate(values) if any(_same(value, other) for other in values[:index])]
    return f"a list with {twice[0]!r} twice; keep one" if twice else None


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _validate(values: dict[str, Any], places: Mapping[str, str]) -> tuple[Study | None, list[str]]:
    try:
        return Study.model_validate(values), []
    except pydantic.ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for fault in error.errors():
            by_key.setdefault(".".join(str(part) for part in fault["loc"][:2]), []).append(fault)
        return None, [places.get(key, "") + _sentence(key, faults) for key, faults in by_key.items()]


def _sentence(key: str, faults: list[Any]) -> str:
    own = [fault["ctx"]["error"] for fault in faults if fault["type"] == "value_error"]
    if own:
        return f"{key}: {own[0]}"
    if faults[0]["type"] == "extra_forbidden":
        return unknown_key(key, _study_keys())
    return value_fault(key, faults, faults[0]["input"])


def _refuse_whole(study: Study, given: set[str], where: str, lines: dict[str, int]) -> None:
    """What only the whole study can tell: keys that its kind does not read, an empty grid, a base that is no recipe."""
    idle = sorted(given - set(READ_BY[study.kind]))
    if idle:
        raise RecipeError(f"{where}: {', '.join(idle)} is not read by a study of kind {study.kind}; leave it out")
    if study.kind == "latency":
        return
    if not study.grid and not study.arms:
        raise RecipeError(f"{where}: the grid is empty, so there is nothing to compare; add grid: {{method: [...]}}")
    _check_metrics(study, where, lines)
    check_base(study, where, {key.removeprefix("base."): n for key, n in lines.items() if key.startswith("base.")})


def check_base(study: Study, where: str, lines: dict[str, int]) -> None:
    """Refuse a base that is no recipe, whatever varies in it.

    Raises  RecipeError with the lines of its faults
    """
    varied = {key: values[0] for key, values in study.grid.items()}
    for arm in reversed(study.arms):
        varied |= arm.overrides
    needed = {key: varied[key] for key in ("model", "data.train") if key in varied}
    make_recipe(needed | study.base | {"output": PLACEHOLDER}, where=where, lines=lines)


def _check_metrics(study: Study, where: str, lines: dict[str, int]) -> None:
    from lofi.evaluate.metrics import METRICS

    if study.metrics is None:
        return
    unknown = [name for name in study.metrics if name not in METRICS]
    place = f"{where}:{lines['metrics']}" if "metrics" in lines else where
    if unknown:
        close = nearest(unknown[0], METRICS)
        hint = f"did you mean {close}?" if close else f"use any of {', '.join(METRICS)}"
        raise RecipeError(f"{place}: there is no metric {unknown[0]}; {hint}")
    if not study.metrics:
        raise RecipeError(f"{place}: metrics is an empty list; name some, such as [rouge, perplexity], or leave it out")
