"""Fixtures that every room's tests share: the optional real inputs, and the model that ships with lofi."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread costs more than it does

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data that LOFI_SHARED names (default ../shared); skips where there is none."""
    folder = Path(os.environ.get("LOFI_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"no models and data at {folder}; set LOFI_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def lofi_tiny() -> Path:
    """The 6.5M-parameter model that ships in the package (read-only)."""
    return REPOSITORY / "src" / "lofi" / "assets" / "lofi-tiny"
