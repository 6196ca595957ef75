"""Folders and small files that are either the old ones or the new ones, whenever the writer is killed.

A new folder is written aside in the same parent (`.NAME.lofi-new-XXXX`), synced, and renamed into place; an existing
one is first renamed aside (`.NAME.lofi-old-XXXX`) and removed last. Killed between the two renames, the old one is
complete under its aside name: `readable(path)` finds it, `recover(path)` and the next write put it back.
A writer holds flock on its aside folders, which the kernel releases when it dies: that is how leftovers are told from
work in progress. Rejected: process ids in the name (reused, and meaningless on another host of a shared disk).
This module does not know what is inside the folders.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lofi.errors import LofiError

try:
    import fcntl
except ImportError:  # no flock on this system: every aside folder then counts as left over
    fcntl = None  # type: ignore[assignment]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DO = {
    errno.EACCES: "choose a place you may write to",
    errno.EPERM: "choose a place you may write to",
    errno.EROFS: "choose a place that is not read-only",
    errno.ENOENT: "check that the folder above it exists",
    errno.ENOTDIR: "choose a path whose parent is a folder",
}


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into one LofiError sentence."""
    try:
        yield
    except OSError as error:
        raise LofiError(_sentence(path, error)) from error
    except SafetensorError as error:  # save_pretrained's writer tells the system's error only in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise LofiError(_sentence(path, OSError(code, os.strerror(code)))) from error


def _sentence(path: str | Path, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"the disk is full: {path} could not be written ({os.strerror(error.errno)}); "
            "what was there before is unchanged, free some space and run it again"
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    todo = _DO.get(error.errno or 0, "fix that and run it again")
    return f"{path} could not be written ({reason}); what was there before is unchanged, {todo}"


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder to write into, which takes the place of `path` when the block ends without an exception.

    Raises  LofiError when the disk is full or refuses; what was at `path` is then unchanged
    Exact   at any moment (kill -9, power cut) `readable(path)` is the whole old folder or the whole new one
    """
    target = Path(os.path.abspath(path))
    with contextlib.ExitStack() as locks:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            recover(target)
            aside = _make_aside(target)
            locks.callback(os.close, _lock(aside))
        try:
            with disk_errors(target):
                yield aside
                _sync_tree(aside)
                _into_place(aside, target, locks)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def refuse_foreign(folder: str | Path, known: Iterable[str], what: str) -> None:
    """Raise LofiError if replacing `folder` would destroy anything but the `known` names (`*` matches any text)."""
    target, patterns = Path(folder), tuple(known)
    if not target.is_dir():
        return
    foreign = sorted(p.name for p in target.iterdir() if not any(fnmatch.fnmatch(p.name, k) for k in patterns))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise LofiError(f"{target} holds {foreign[0]}{more}, which is no part of {what}; choose a new or empty folder")


def _make_aside(target: Path) -> Path:
    aside = target.parent / f".{target.name}.lofi-new-{secrets.token_hex(4)}"
    aside.mkdir()
    return aside


def _into_place(aside: Path, target: Path, locks: contextlib.ExitStack) -> None:
    old = None
    if target.is_symlink() or target.exists():
        if not target.is_dir() or target.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(target))
        locks.callback(os.close, _lock(target))
        old = target.parent / f".{target.name}.lofi-old-{secrets.token_hex(4)}"
        os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int:
    """A descriptor of the folder that holds its lock; closing it, or dying, lets go."""
    descriptor = os.open(folder, os.O_RDONLY)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: leftovers are then cleaned by name alone
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _alive(folder: Path) -> bool:
    """Whether a living process is still working on this aside folder."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False  # it went away meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _asides(target: Path, kind: str) -> list[Path]:
    prefix = f".{target.name}.lofi-{kind}-"
    if not target.parent.is_dir():
        return []
    return sorted(p for p in target.parent.iterdir() if p.name.startswith(prefix) and p.is_dir())


def readable(path: str | Path) -> Path:
    """The folder to read for `path`: itself, or the old copy that a killed writer stranded between two renames."""
    target = Path(path)
    if not target.exists():
        stranded = _asides(Path(os.path.abspath(path)), "old")
        if stranded and not target.exists():  # looked at twice: a living writer may just have finished
            return max(stranded, key=lambda p: p.stat().st_mtime)
    return target


def recover(path: str | Path) -> Path:
    """Put a stranded old folder back under its name, remove what dead writers left, and return `path`."""
    target = Path(os.path.abspath(path))
    dead = [p for p in _asides(target, "old") if not _alive(p)]
    if dead and not target.exists():
        back = max(dead, key=lambda p: p.stat().st_mtime)
        os.rename(back, target)
        dead.remove(back)
    for leftover in dead + [p for p in _asides(target, "new") if not _alive(p)]:
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) so that the old or the new one is there at any moment.

    Raises  LofiError when the disk is full or refuses
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.lofi-new-{secrets.token_hex(4)}")
    with disk_errors(target):
        try:
            with open(aside, "w", encoding="utf-8", newline="") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(aside, target)
            _sync(target.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically.

    Raises  LofiError when the disk is full or refuses, ValueError for NaN or infinity (they are not JSON)
    """
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Everything to the disk; files as readable as their folder (safetensors makes its own for the owner alone)."""
    readable = os.stat(folder).st_mode & 0o666
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.chmod(Path(where) / name, readable)
            _sync(Path(where) / name)
        _sync(Path(where))
