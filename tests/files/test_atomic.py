"""Folders are old or new, never half: whoever writes them, and whenever it is killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lofi.errors import LofiError
from lofi.files.atomic import atomic_folder, readable, recover, write_json, write_text

WRITER = """
import sys
from lofi.files.atomic import atomic_folder
target, start = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for i in range(start, 10**9):
    with atomic_folder(target) as f:
        for part in "abc":
            (f / part).write_text(str(i) * 50)
"""


def put(folder: Path, text: str) -> None:
    with atomic_folder(folder) as aside:
        (aside / "a").write_text(text)
        (aside / "sub").mkdir()
        (aside / "sub" / "b").write_text(text)


def leftovers(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if ".lofi-" in p.name]


def test_a_new_folder_appears_whole_and_nothing_stays_beside_it(tmp_path):
    put(tmp_path / "x" / "out", "one")
    assert (tmp_path / "x" / "out" / "sub" / "b").read_text() == "one"
    assert leftovers(tmp_path / "x") == []


def test_an_existing_folder_is_replaced_not_mixed(tmp_path):
    put(tmp_path / "out", "one")
    with atomic_folder(tmp_path / "out") as aside:
        (aside / "c").write_text("two")
        assert (tmp_path / "out" / "a").read_text() == "one"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["c"]
    assert leftovers(tmp_path) == []


def test_an_exception_inside_leaves_the_old_folder_and_no_litter(tmp_path):
    put(tmp_path / "out", "one")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("two")
        raise KeyError("mine")
    assert (tmp_path / "out" / "a").read_text() == "one"
    assert leftovers(tmp_path) == []


def test_a_relative_path_and_a_trailing_slash_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder("out/") as aside:
        (aside / "a").write_text("x")
    assert Path("out/a").read_text() == "x"


def test_a_file_in_the_way_is_one_sentence_and_stays(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LofiError, match="could not be written"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "mine"


def test_the_old_folder_stranded_between_two_renames_is_readable_and_put_back(tmp_path):
    put(tmp_path / "out", "one")
    os.rename(tmp_path / "out", tmp_path / ".out.lofi-old-12345678")
    (tmp_path / ".out.lofi-new-12345678").mkdir()
    assert (readable(tmp_path / "out") / "a").read_text() == "one"
    assert not (tmp_path / "out").exists()  # reading changes nothing
    recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "one"
    assert leftovers(tmp_path) == []


def test_what_a_dead_writer_left_is_cleaned_and_what_a_living_one_holds_is_not(tmp_path):
    (tmp_path / ".out.lofi-new-dead").mkdir()
    with atomic_folder(tmp_path / "out") as living:
        put(tmp_path / "out", "other")
        assert living.is_dir()
        (living / "a").write_text("mine")
    assert (tmp_path / "out" / "a").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_a_neighbour_with_a_longer_name_is_left_alone(tmp_path):
    (tmp_path / ".out2.lofi-new-dead").mkdir()
    put(tmp_path / "out", "one")
    assert leftovers(tmp_path) == [".out2.lofi-new-dead"]


def numbers(folder: Path) -> set[str]:
    return {(folder / part).read_text() for part in "abc"}


def test_killed_at_random_moments_the_folder_is_always_whole(tmp_path):
    target, draw = tmp_path / "out", random.Random(3)
    put_whole = {"a": "0", "b": "0", "c": "0"}
    with atomic_folder(target) as aside:
        for name, text in put_whole.items():
            (aside / name).write_text(text)
    for attempt in range(12):
        command = [sys.executable, "-c", WRITER, str(target), str(1000 * (attempt + 1))]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=source_env())
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(draw.random() * 0.03)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(numbers(readable(target))) == 1
    recover(target)
    assert len(numbers(target)) == 1 and leftovers(tmp_path) == []


def source_env() -> dict[str, str]:
    source = Path(__file__).resolve().parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(source)}


def test_a_full_disk_is_one_sentence_and_the_old_folder_stays(tmp_path):
    put(tmp_path / "out", "one")
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from lofi.errors import LofiError\n"
        "from lofi.files.atomic import atomic_folder\n"
        "try:\n"
        "    with atomic_folder(sys.argv[1]) as f:\n"
        "        (f / 'a').write_bytes(bytes(5000))\n"
        "except LofiError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, env=source_env(), check=True).stdout
    assert said.startswith("the disk is full: ") and said.count("\n") == 1
    assert (tmp_path / "out" / "a").read_text() == "one"
    assert leftovers(tmp_path) == []


def test_a_file_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "f.txt", "old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LofiError, match="the disk is full"):
        write_text(tmp_path / "f.txt", "new")
    assert (tmp_path / "f.txt").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_json_is_sorted_and_refuses_what_is_not_json(tmp_path):
    write_json(tmp_path / "f.json", {"b": 1, "a": "ệ"})
    assert (tmp_path / "f.json").read_text(encoding="utf-8") == '{\n  "a": "ệ",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json(tmp_path / "f.json", {"a": float("nan")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_one_may_not_write_to_is_one_sentence(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(LofiError, match="may write to"), atomic_folder(tmp_path / "locked" / "out"):
        pass


def test_a_file_that_its_writer_made_for_the_owner_alone_is_as_readable_as_its_folder(tmp_path):
    with atomic_folder(tmp_path / "out") as aside:
        (aside / "weights").write_text("w")
        (aside / "weights").chmod(0o600)  # as safetensors does
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666
