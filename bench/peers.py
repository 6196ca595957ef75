"""What is common to all that peers' libraries print and say of themselves."""

from __future__ import annotations

import importlib.metadata
import logging
import warnings

NAMES = ("peft", "bitsandbytes")


def silence() -> None:
    """No warnings, progress bars or load reports from the libraries that are measured."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in (*NAMES, "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def versions() -> str:
    """The peers' versions, in one line."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NAMES)
