"""The run folder: what is in it, and what may be done with one that is already there.

    recipe.yaml  chosen.json  metrics.jsonl  result.json (written last)  adapter/ or model/  checkpoints/checkpoint-N/

A folder with a finished run, or one with a complete checkpoint, is never started over by accident: that needs another
output, or `--resume`. A run that died before its first checkpoint has nothing to lose and starts over, which is said.
Resuming is refused when it would not be the same run: another recipe (any key but `output` and `train.report_to`; more
epochs too, because the schedule of the learning rate would be another), other data, another base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi.errors import RecipeError
from lofi.files.atomic import disk_errors, write_json, write_text
from lofi.recipe import Recipe
from lofi.train.checkpoint import last_checkpoint, step_of
from lofi.train.settings import Chosen

_MAY_DIFFER = {"output", "train.report_to"}


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.chosen = self.path / "chosen.json"
        self.journal = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"


@dataclass(frozen=True)
class Start:
    """How a run begins: `record` is what an earlier begin stored, `checkpoint` where it goes on, `note` is said."""

    finished: bool = False
    checkpoint: Path | None = None
    record: dict[str, Any] | None = None
    note: str | None = None


def begin(folder: RunFolder, recipe: Recipe, *, resume: bool) -> Start:
    """Look at the output folder and say how to begin; nothing is written.

    Raises  RecipeError: the folder holds something else, or a run that `resume` was not asked for, or another run
    """
    if folder.path.is_file():
        raise RecipeError(f"output {folder.path} is a file, expected a folder; choose another output")
    if not folder.path.is_dir() or not any(folder.path.iterdir()):
        return Start(note=f"nothing to resume in {folder.path}: starting from the beginning" if resume else None)
    if not folder.chosen.is_file():
        raise RecipeError(f"output {folder.path} holds files that are no run of lofi; choose another output")
    record = _read(folder.chosen)
    if not resume:
        return _begin_again(folder)
    _refuse_differences(folder, recipe, record)
    if folder.result.is_file():
        return Start(finished=True, record=record, note=f"{folder.path} is finished already: nothing to do")
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return Start(note=f"{folder.path} holds no complete checkpoint: starting from the beginning")
    return Start(checkpoint=checkpoint, record=record, note=f"resuming at step {step_of(checkpoint)}")


def _begin_again(folder: RunFolder) -> Start:
    checkpoint = last_checkpoint(folder.checkpoints)
    if folder.result.is_file():
        raise RecipeError(f"output {folder.path} holds a finished run; choose another output or remove that folder")
    if checkpoint is not None:
        raise RecipeError(
            f"output {folder.path} holds a run that stopped after step {step_of(checkpoint)}; "
            "add --resume to go on with it, or choose another output"
        )
    return Start(note=f"{folder.path} holds a run that never reached a checkpoint: starting from the beginning")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RecipeError(f"{path} is broken, so this run cannot be resumed; choose another output") from None


def _refuse_differences(folder: RunFolder, recipe: Recipe, record: Mapping[str, Any]) -> None:
    before, now = flat(record["recipe"]), flat(recipe.values())
    keys = sorted(k for k in before.keys() | now.keys() if k not in _MAY_DIFFER and before.get(k) != now.get(k))
    if keys:
        told = "; ".join(f"{k} was {before.get(k)!r}, is now {now.get(k)!r}" for k in keys[:5])
        raise RecipeError(
            f"the recipe is not the one that {folder.path} was started with ({told}); "
            "resume with the same recipe, or start a new run in another output"
        )


def refuse_other_inputs(folder: RunFolder, record: Mapping[str, Any], data: Mapping[str, str], base: list[str]) -> None:
    """Refuse to resume on other data (by SHA-256) or another base (`base` lists how it differs).

    Raises  RecipeError naming the file or the difference
    """
    changed = sorted(name for name in record["data"].keys() | data.keys() if record["data"].get(name) != data.get(name))
    if changed:
        raise RecipeError(
            f"{', '.join(changed)} changed since {folder.path} was started; "
            "bring the old file back to resume, or start a new run in another output"
        )
    if base:
        raise RecipeError(
            f"the base model is not the one that {folder.path} was started with ({'; '.join(base[:3])}); "
            "bring it back to resume, or start a new run in another output"
        )


def open_folder(folder: RunFolder, recipe: Recipe, chosen: Chosen, *, data: Mapping[str, str], base: Any) -> None:
    """Make the folder and write what a resume needs."""
    with disk_errors(folder.path):
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(folder.recipe, recipe.resolved_yaml())
    record = {"format": 1, "recipe": recipe.values(), "choices": chosen.to_dict()}
    write_json(folder.chosen, record | {"data": dict(data), "base": base})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; {"train": {"epochs": 3}} -> {"train.epochs": 3}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
