"""Every exception that lofi raises on purpose, and the exit code the command line gives it.

    LofiError                     the root: `except lofi.LofiError` catches all of them        exit 1
    ├── RequestError              what was asked for cannot be done as asked                   exit 2
    │   ├── RecipeError           a recipe, a study or a flag: unknown key, value out of range
    │   ├── TargetError           no such module, parameter or adapter name in this model
    │   ├── DataError             a data file: missing, empty, broken line, unknown columns
    │   └── ModelError            a model folder or hub id: missing, unreadable, unsupported
    ├── AdapterFileError          an adapter folder: missing, truncated, contradicting itself  exit 1
    ├── ProofError                a proof failed: a dead adapter, a wrong base, a lossy merge  exit 1
    │   └── NonFiniteError        the first non-finite loss or gradient, with tensor and batch
    └── Interrupted               Ctrl-C: the run stopped, its checkpoint is safe              exit 130

    LofiWarning                   (a UserWarning) not proved, not known to be wrong

Each message is one sentence a user can act on: what was given, what was expected, what to do.
Several faults of one kind are reported at once. This module imports nothing, so every room may use it.
"""

from __future__ import annotations


class LofiError(Exception):
    """The root of lofi's exceptions; `exit_code` is what the command line returns for it."""

    exit_code = 1


class RequestError(LofiError):
    """The request was wrong; nothing was started."""

    exit_code = 2


class RecipeError(RequestError):
    """A recipe, study or flag holds an unknown key or an impossible value."""


class TargetError(RequestError):
    """A module, parameter, pattern or adapter name does not exist in this model."""


class DataError(RequestError):
    """A data file is missing, empty, broken, or its columns are not understood."""


class ModelError(RequestError):
    """A model is missing, unreadable, or of a kind that the request does not fit."""


class AdapterFileError(LofiError):
    """An adapter folder is missing, truncated, or contradicts itself or the model."""


class ProofError(LofiError):
    """A proof failed: the work ran, but its result is not what was asked for."""


class NonFiniteError(ProofError):
    """A loss or gradient stopped being a finite number."""


class Interrupted(LofiError):
    """The user stopped the run; its checkpoint is safe and the message says how to go on."""

    exit_code = 130


class LofiWarning(UserWarning):
    """Something the result depends on could not be proved, but nothing is known to be wrong."""
