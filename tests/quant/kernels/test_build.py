"""How the native library comes to be at install, and that lofi does without it where it cannot be built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling, the build backend, is not installed")

REPOSITORY = Path(__file__).resolve().parents[3]
KERNELS = "lofi/quant/kernels"
NEEDED = ("hatch_build.py", "pyproject.toml", "README.md", "LICENSE")
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
compiles = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a wheel is made of, with the kernels left out of native/ so that it compiles at once."""
    root = tmp_path / "checkout"
    shutil.copytree(
        REPOSITORY / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "_native*", "*.safetensors")
    )
    for name in NEEDED:
        shutil.copy(REPOSITORY / name, root / name)
    (root / "native").mkdir()
    for name in ("abi.h", "cpu.h", "cpu.cpp", "threads.h", "threads.cpp"):
        shutil.copy(REPOSITORY / "native" / name, root / "native" / name)
    return root


def wheel_of(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the wheel into root/out as pip does, offline."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "LOFI_CXXFLAGS")}
    return subprocess.run(
        [*command, "-w", str(root / "out"), str(root)],
        env={**clean, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def installed(root: Path) -> tuple[Path, Path]:
    """(the wheel in root/out, the folder it is unpacked into)."""
    (wheel,) = (root / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(root / "site")
    return wheel, root / "site"


def run_there(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOFI_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site,
        env={**environment, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@compiles
def test_a_wheel_carries_the_library_and_the_platform_it_was_compiled_for(checkout):
    built = wheel_of(checkout, LOFI_REQUIRE_NATIVE="1")
    assert built.returncode == 0, built.stderr
    wheel, site = installed(checkout)
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("-any.whl")
    assert (site / KERNELS / "_native.so").is_file() and not (site / KERNELS / "_native.absent").exists()
    check = "from lofi.quant.kernels.library import Library; library = Library(); print(library.name, library.isa)"
    there = run_there(site, "-c", check)
    assert there.returncode == 0, there.stderr


def test_without_a_compiler_lofi_is_installed_and_doctor_says_what_is_lost(checkout):
    stale = checkout / "src" / KERNELS / "_native.so"
    stale.write_bytes(b"from an earlier build")
    built = wheel_of(checkout, CXX="/nonexistent/c++")
    assert built.returncode == 0, built.stderr
    said = "native kernels not built (CXX names '/nonexistent/c++', which is not there); lofi will work in plain torch"
    assert said in " ".join((built.stdout + built.stderr).split())
    wheel, site = installed(checkout)
    assert wheel.name.endswith("-py3-none-any.whl") and not stale.exists()
    assert not (site / KERNELS / "_native.so").exists()
    doctor = run_there(site, "-m", "lofi", "doctor", "--device", "cpu", "--json")
    assert doctor.returncode == 0, doctor.stderr
    own = json.loads(doctor.stdout)["kernels"]["lofi's own"]
    assert own == (
        "plain torch, because the native library was not built when lofi was installed: CXX names '/nonexistent/c++', "
        "which is not there; quantized models work, but much slower"
    )


def test_without_a_compiler_quantized_linears_work(checkout):
    """The library is looked for beside the package, so a package without one is one where it was not built."""
    there = run_there(checkout / "src", "-c", QUANTIZED)
    assert there.returncode == 0, there.stderr
    assert there.stdout.split() == ["plain", "torch", "3", "5"]


QUANTIZED = """
import torch
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.linear import quantize_4bit
from lofi.quant.products import nf4_forward
print(kernels_for(torch.device("cpu")).name)
print(*nf4_forward(torch.ones(3, 64), None, quantize_4bit(torch.randn(5, 64)), torch.bfloat16).shape)
"""


def test_a_library_that_is_required_and_cannot_be_built_is_an_error(checkout):
    built = wheel_of(checkout, CXX="/nonexistent/c++", LOFI_REQUIRE_NATIVE="1")
    assert built.returncode != 0
    assert "LOFI_REQUIRE_NATIVE=1, and the native library was not built: CXX names" in built.stdout + built.stderr


@compiles
def test_source_that_does_not_compile_names_the_compilers_error_and_leaves_no_library(hook, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "wrong.cpp").write_text("int f() { return nothing; }\n", encoding="utf-8")
    with pytest.raises(hook.BuildError, match=r"\+\+ failed: .*wrong\.cpp.* error: .*nothing"):
        hook.build(tmp_path, tmp_path / "_native.so")
    assert list(tmp_path.iterdir()) == [tmp_path / "native"]


def test_each_architecture_compiles_its_own_paths(hook):
    for machine, has, has_not in (
        ("x86_64", "_avx512", "_neon"),
        ("arm64", "_neon", "_avx"),
        ("riscv64", "cpu", "_neon"),
    ):
        names = [path.stem for path in hook.sources_for(REPOSITORY / "native", machine)]
        assert any(has in name for name in names) and not any(has_not in name for name in names)
        assert {"cpu", "threads", "nf4", "nf4_plain"} <= set(names)


def test_only_files_named_after_a_path_get_its_instructions(hook):
    assert hook.flags_for(Path("nf4_plain.cpp")) == ()
    assert "-mavx512bf16" in hook.flags_for(Path("nf4_rows_avx512bf16.cpp"))
    assert "-mavx512bf16" not in hook.flags_for(Path("nf4_avx512.cpp"))
    assert not any("avx512" in flag for flag in hook.flags_for(Path("nf4_avx2.cpp")))


@compiles
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists symbols, is not installed")
def test_files_with_instructions_of_their_own_share_no_code_with_the_others(hook, tmp_path):
    """A weak (inline, template) function compiled for AVX-512 could be the one that the linker keeps for every CPU."""
    sources = [path for path in hook.sources_for(REPOSITORY / "native", hook.architecture()) if hook.flags_for(path)]
    if not sources:
        pytest.skip("no file of this architecture has instructions of its own")
    running = []
    for source in sources:
        result = tmp_path / f"{source.stem}.o"
        command = [COMPILER, *hook.FLAGS, *hook.flags_for(source), "-w", "-c", str(source), "-o", str(result)]
        running.append((result, subprocess.Popen(command)))
    for result, compiler in running:
        assert compiler.wait() == 0
        symbols = subprocess.run(["nm", "-C", str(result)], capture_output=True, text=True, check=True).stdout
        lines = [line.split(maxsplit=2) for line in symbols.splitlines()]
        shared = [line[2] for line in lines if len(line) == 3 and line[1] in "WVu" and "DW.ref" not in line[2]]
        assert not shared, f"{result.stem}: {shared}"
