"""From a study to its runs: the product of the grid and the arms, each run once, under a name that a folder can have.

Knows  which keys a method reads, how runs are called, and what makes two of them the same. The seed varies slowest, so
       that a study that is stopped early has seen every arm.
Knows not  whether a run can be done (`check`).
Rejected  numbering the runs (a larger grid would number them anew, and finished ones could not be found again).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lofi.errors import RecipeError
from lofi.recipe import Recipe, make_recipe
from lofi.recipe.sections import SECTIONS_OF, without_unread
from lofi.study.spec import PLACEHOLDER, Arm, Study

SHORT = {
    "train.learning_rate": "lr",
    "train.loraplus_lr_ratio": "lr_ratio",
    "lora.target_modules": "targets",
    "lora.lora_alpha": "alpha",
    "lora.init_lora_weights": "init",
    "data.train": "data",
}
LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a study; `fault` says why its recipe is none, and is None where it is one."""

    name: str
    arm: str
    method: str
    seed: int
    overrides: dict[str, Any]
    recipe: Recipe | None
    fault: str | None = None


def expand(study: Study) -> list[Planned]:
    """Every run of a study once, in the order of the arms and the grid for each seed.

    A key that a run's method does not read does not multiply its runs.
    Raises  RecipeError where two runs would have one name
    """
    found: dict[str, Planned] = {}
    for arm, overrides in _combinations(study):
        run = _planned(study, arm, overrides)
        before = found.setdefault(run.name.casefold(), run)
        if before.overrides != run.overrides:
            keys = [k for k in run.overrides | before.overrides if run.overrides.get(k) != before.overrides.get(k)]
            raise RecipeError(
                f"two runs would be called {run.name} (they differ in {', '.join(keys)}); give them as arms with names"
            )
    return list(found.values())


def _combinations(study: Study) -> Iterator[tuple[Arm | None, dict[str, Any]]]:
    seeds = study.grid.get("train.seed", [study.base.get("train.seed", 0)])
    keys = [key for key in study.grid if key != "train.seed"]
    arms: list[Arm | None] = [*study.arms] or [None]
    for seed, arm in itertools.product(seeds, arms):
        own = arm.overrides if arm is not None else {}
        for values in itertools.product(*(study.grid[key] for key in keys)):
            yield arm, own | dict(zip(keys, values, strict=True)) | {"train.seed": seed}


def _planned(study: Study, arm: Arm | None, overrides: dict[str, Any]) -> Planned:
    method = str(overrides.get("method", study.base.get("method", "lora")))
    read = _read_by(overrides, method)
    named = arm is not None and (not arm.overrides or any(key in read for key in arm.overrides))
    parts = _parts(study, arm if named else None, read, method)
    seed = read["train.seed"]
    name = _name([*parts, ("s", str(seed))])
    recipe, fault = _recipe(study, read, name)
    label = " ".join(f"{key}={value}" if value else key for key, value in parts)
    return Planned(name=name, arm=label, method=method, seed=seed, overrides=read, recipe=recipe, fault=fault)


def _read_by(overrides: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The keys that a method reads; LoRA+ is about factors, which only LoRA has."""
    if method not in SECTIONS_OF:
        return dict(overrides)
    read = without_unread(overrides, method)
    if "lora" not in SECTIONS_OF[method]:
        read.pop("train.loraplus_lr_ratio", None)
    return read


def _parts(study: Study, arm: Arm | None, read: Mapping[str, Any], method: str) -> list[tuple[str, str]]:
    """What a run is called, as (key, value) with an empty value for a word that stands alone."""
    parts = [(method, "")] if arm is None or "method" in study.grid else []
    parts += [(arm.name, "")] if arm is not None else []
    varied = [key for key in study.grid if key in read and key not in ("method", "train.seed")]
    leaves = [key.rpartition(".")[2] for key in varied]
    for key, leaf in zip(varied, leaves, strict=True):
        short = SHORT.get(key, leaf if leaves.count(leaf) == 1 else key)
        value = read[key]
        if value is True:
            parts.append((short.removeprefix("use_"), ""))
        elif value is not None and value is not False:
            parts.append((short, _shown(key, value)))
    return parts


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return PurePath(value).stem if key in ("model", "data.train") else str(value)


def _name(parts: list[tuple[str, str]]) -> str:
    """A folder's name: letters, digits and a few signs, at most LONGEST_NAME of them."""
    words = [key + value if value[:1].isdigit() or not value else f"{key}-{value}" for key, value in parts]
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", "-".join(words)).strip("-.")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def _recipe(study: Study, read: Mapping[str, Any], name: str) -> tuple[Recipe | None, str | None]:
    words = [f"{key}={json.dumps(value)}" for key, value in read.items()]
    try:
        return make_recipe(study.base | {"output": PLACEHOLDER}, words, where=name, lines={}), None
    except RecipeError as error:
        return None, "; ".join(line.strip() for line in str(error).splitlines())
