"""Compiles native/*.cpp into src/lofi/quant/kernels/_native.so when lofi is installed (wheel and editable alike).

Knows the compiler and the flags of each file; knows no kernel and imports nothing of lofi. A file's suffix says which
instruction set it is compiled for (`_avx512.cpp`); everything else is compiled for any CPU of the architecture, so the
library loads everywhere and chooses at run time. No OpenMP flag (threads.h finds torch's), no torch, no Python headers.

No compiler, or one that fails, is survivable: one line says so, `_native.absent` keeps that line for `lofi doctor`, and
lofi works in plain torch. LOFI_REQUIRE_NATIVE=1 makes it an error. $CXX names the compiler, $LOFI_CXXFLAGS adds flags.

Rejected: scikit-build-core and nanobind (CMake and Python headers for eight C functions; a build that must not fail
could not survive their absence), a fat set of libraries (one a path) for what function pointers do.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = Path("src/lofi/quant/kernels/_native.so")
ABSENT = LIBRARY.with_name("_native.absent")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
PATHS = {  # suffix: the architecture it exists on, the flags it needs
    "_avx2": ("x86_64", AVX2),
    "_avx512": ("x86_64", AVX512),
    "_avx512vnni": ("x86_64", (*AVX512, "-mavx512vnni")),
    "_avx512bf16": ("x86_64", (*AVX512, "-mavx512vnni", "-mavx512bf16")),
    "_neon": ("arm64", ()),
}
ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}


class BuildError(Exception):
    """Why there is no native library, in one line."""


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        try:
            build(root, root / LIBRARY)
        except BuildError as reason:
            self._absent(root, str(reason))
            build_data["artifacts"].append(f"/{ABSENT.as_posix()}")
            return
        (root / ABSENT).unlink(missing_ok=True)
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"

    def _absent(self, root: Path, reason: str) -> None:
        if os.environ.get("LOFI_REQUIRE_NATIVE") == "1":
            raise RuntimeError(f"LOFI_REQUIRE_NATIVE=1, and the native library was not built: {reason}")
        (root / LIBRARY).unlink(missing_ok=True)  # a library from before would not be of these sources
        (root / ABSENT).write_text(reason + "\n", encoding="utf-8")
        self.app.display_warning(f"lofi: native kernels not built ({reason}); lofi will work in plain torch, slower")


def build(root: Path, library: Path, *, extra: tuple[str, ...] = ()) -> None:
    """Compile native/*.cpp and link them as `library`, which is replaced at once when all is done.

    Raises BuildError: no compiler, or it failed.
    """
    compiler = find_compiler()
    sources = sources_for(root / "native", architecture())
    extra = (*extra, *shlex.split(os.environ.get("LOFI_CXXFLAGS", "")))
    with tempfile.TemporaryDirectory(prefix="lofi-native-") as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
            compiled = [
                pool.submit(_run, [*compiler, *FLAGS, *flags_for(source), *extra, "-c", str(source), "-o", str(result)])
                for source, result in zip(sources, objects, strict=True)
            ]
            for one in compiled:
                one.result()
        linked = library.with_name(f".{library.name}.{os.getpid()}")
        try:
            _run([*compiler, "-shared", "-pthread", *extra, *map(str, objects), *_libraries(), "-o", str(linked)])
            os.replace(linked, library)  # a process that has the old one open keeps it
        finally:
            linked.unlink(missing_ok=True)


def find_compiler() -> list[str]:
    """$CXX (it may carry arguments), else c++, g++ or clang++ of the PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX names {named[0]!r}, which is not there")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler (c++, g++, clang++) was found; install one, or set CXX")


def sources_for(folder: Path, machine: str) -> list[Path]:
    """The files that exist for this architecture: other architectures' paths are left out."""
    return [path for path in sorted(folder.glob("*.cpp")) if _path_of(path) in (None, machine)]


def flags_for(source: Path) -> tuple[str, ...]:
    return next((flags for suffix, (_, flags) in PATHS.items() if source.stem.endswith(suffix)), ())


def architecture() -> str:
    machine = platform.machine().lower()
    return ARCHITECTURES.get(machine, machine)


def platform_tag() -> str:
    """The platform half of the wheel's tag: what was compiled here runs on this system's kind."""
    if sys.platform == "darwin":
        from packaging import tags  # hatchling's own dependency

        return next(iter(tags.mac_platforms()))
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _path_of(source: Path) -> str | None:
    return next((machine for suffix, (machine, _) in PATHS.items() if source.stem.endswith(suffix)), None)


def _libraries() -> list[str]:
    return ["-ldl"] if sys.platform == "linux" else []


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no word"]
        raise BuildError(f"{command[0]} failed: {said[0].strip()}")
