"""The project files agree with each other."""

from __future__ import annotations

import re
import tomllib

from conftest import REPOSITORY


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def test_every_direct_dependency_is_pinned_once_and_nothing_else_is():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {name_of(item) for item in project["dependencies"]}
    wanted |= {name_of(item) for extra in project["optional-dependencies"].values() for item in extra}
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert sorted(map(name_of, pins)) == sorted(wanted - {"lofi"})
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)  # no urls, no paths, no local builds


def test_the_version_is_written_alike_everywhere():
    import lofi

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == lofi.__version__
