"""The tiny random models that the tests of this room share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/models/tiny.py: `tiny.model(family)` and `tiny.config(family)`."""
    return sys.modules["lofi_tests_tiny"]


def _load() -> None:
    spec = importlib.util.spec_from_file_location("lofi_tests_tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lofi_tests_tiny"] = module
    spec.loader.exec_module(module)


_load()
