"""A study's output folder: whose it is, and whether a study may go on in it.

    study.json  results.jsonl  results.csv  report.html
    runs/NAME/  record.json  measures.safetensors  log.txt  trained.json  training/ (the run folder of `lofi train`)

`study.json` holds the study, its runs in order, and a digest of each run's recipe and of each data file. The same study
goes on; a larger grid goes on with the finished runs; anything else is refused.
Knows not  what a run does. Rejected  one digest of the whole study (adding a seed would then be another study).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.errors import LofiError, RecipeError
from lofi.files.atomic import disk_errors, write_json
from lofi.study.grid import Planned
from lofi.study.spec import Study

try:
    import fcntl
except ImportError:  # no flock on this system: two studies in one folder are then not told apart
    fcntl = None  # type: ignore[assignment]

STUDY = "study.json"
FORMAT = 1
PROTOCOL = ("kind", "metrics", "evaluate", "general")


def refuse_foreign_study(output: Path, study: Study, planned: Sequence[Planned], files: Mapping[str, str]) -> None:
    """Refuse an output that holds something else, or a study of which this one is no continuation.

    Raises  RecipeError naming the first difference; LofiError for a study.json that cannot be read
    """
    if output.is_file():
        raise RecipeError(f"--output {output} is a file, expected a folder; choose another")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / STUDY).is_file():
        raise RecipeError(f"--output {output} holds files that are no study of lofi; choose another or an empty folder")
    try:
        stored = json.loads((output / STUDY).read_text(encoding="utf-8"))
        told = _difference(stored, describe(study, planned, files))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LofiError(f"{output / STUDY} cannot be read; choose another --output, or remove that folder") from None
    if told:
        raise RecipeError(f"--output {output} holds another study ({told}); choose another folder for this one")


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which a stored study is not part of this one."""
    for key in PROTOCOL:
        if stored["study"][key] != now["study"][key]:
            return f"{key} was {stored['study'][key]}, is now {now['study'][key]}"
    for name, digest in stored["recipes"].items():
        if name not in now["recipes"]:
            return f"it has the run {name}, which this one has not"
        if now["recipes"][name] != digest:
            return f"the recipe of {name} was another"
    changed = sorted(path for path, digest in stored["files"].items() if now["files"].get(path, digest) != digest)
    return f"{changed[0]} has changed since" if changed else None


def describe(study: Study, planned: Sequence[Planned], files: Mapping[str, str]) -> dict[str, Any]:
    """What study.json says: the study, its runs in order with a digest of each recipe, its data files with theirs."""
    recipes = {run.name: _digest(_values(run)) for run in planned}
    known = {"format": FORMAT, "study": study.model_dump(mode="json"), "files": dict(files)}
    return known | {"runs": [run.name for run in planned], "recipes": recipes}


def write_study(output: Path, study: Study, planned: Sequence[Planned], files: Mapping[str, str]) -> None:
    """Write study.json, which makes the folder this study's.

    Raises  LofiError when the disk is full or refuses
    """
    write_json(output / STUDY, describe(study, planned, files))


def _values(run: Planned) -> Any:
    if run.recipe is None:
        return run.overrides
    return {key: value for key, value in run.recipe.values().items() if key != "output"}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Make the folder and hold it while a study runs in it; the system lets go of it when this process dies.

    Raises  RecipeError where another process holds it; LofiError where it cannot be made
    """
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"another lofi compare is at work in {output}; wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
