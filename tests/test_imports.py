"""The one-way rule between rooms, what importing lofi may cost, and the public names, all read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lofi

SOURCE = Path(lofi.__file__).parent
ROOMS = (  # a room imports only from rooms before it
    *("errors", "adapters", "quant", "models", "data", "files", "evaluate", "merge", "export", "recipe"),
    *("train", "report", "study", "demo", "serve", "cli", "__main__"),
)
PEERS = {"peft", "bitsandbytes", "trl", "rouge_score"}  # compared with in tests, never a run-time need
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, at the top or inside functions, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["lofi", *path.relative_to(SOURCE).parts[: -node.level]]) if node.level else ""
            whole = ".".join(part for part in (package, node.module or "") if part)
            found += [(node.lineno, f"{whole}.{alias.name}") for alias in node.names]
    return found


def wrong_way(room: str, target: str) -> bool:
    """Whether importing `target` from `room` goes against the flow."""
    parts = target.split(".")
    if parts[0] != "lofi" or len(parts) < 2 or parts[1] not in ROOMS:
        return False
    return ROOMS.index(parts[1]) > ROOMS.index(room)


def test_every_module_stands_in_a_known_room():
    strangers = [str(path.relative_to(SOURCE)) for path in modules() if room_of(path) not in (*ROOMS, "__init__")]
    assert not strangers, f"new rooms belong in ROOMS and in CONTRIBUTING's map: {strangers}"


def test_a_room_imports_only_from_rooms_before_it():
    faults = [
        f"{path.relative_to(SOURCE)}:{line} imports {target}"
        for path in modules()
        if room_of(path) in ROOMS
        for line, target in imported(path)
        if wrong_way(room_of(path), target)
    ]
    assert not faults, "\n".join(faults)


def test_the_rule_sees_an_import_that_goes_the_wrong_way():
    assert wrong_way("adapters", "lofi.models.load")
    assert wrong_way("data", "lofi.cli")
    assert not wrong_way("cli", "lofi.adapters.attach")
    assert not wrong_way("adapters", "lofi.errors.RecipeError")
    assert not wrong_way("adapters", "torch.nn")


def test_peers_and_pickles_are_never_imported():
    faults = [
        f"{path.relative_to(SOURCE)}:{line} imports {target}"
        for path in modules()
        for line, target in imported(path)
        if target.split(".")[0] in PEERS | PICKLES
    ]
    assert not faults, "\n".join(faults)


def test_files_and_functions_stay_small_enough_to_read():
    faults = []
    for path in modules():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            faults.append(f"{path.relative_to(SOURCE)} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    faults.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name} has {length} lines")
    assert not faults, "\n".join(faults)


def test_no_module_has_a_name_that_says_nothing():
    empty = {"utils", "common", "helpers", "misc", "base", "manager"}
    assert not [path for path in modules() if path.stem in empty or path.parent.name in empty]


@pytest.mark.parametrize("module", ["lofi", "lofi.errors", "lofi.cli.main", "lofi.recipe", "lofi.report.page"])
def test_importing_loads_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print(*({{'torch', 'transformers', 'numpy', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", lofi.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(lofi, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        lofi.LoraConfg  # noqa: B018
