"""Exit codes, sentences and --json: what every verb owes whoever calls it, a person or a program."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from lofi import __version__
from lofi.cli import main as main_module
from lofi.cli.main import VERBS, main, report
from lofi.errors import AdapterFileError, ProofError, RecipeError


def raising(error: BaseException):
    def verb() -> None:
        raise error

    return verb


@pytest.fixture
def verb_that(monkeypatch):
    """Put a failing verb behind `lofi doctor`, where main() builds its commands."""

    def put(error: BaseException) -> None:
        import typer

        app = typer.Typer(cls=main_module.Verbs, add_completion=False, rich_markup_mode=None)
        app.callback()(lambda: None)
        app.command("doctor")(raising(error))
        monkeypatch.setattr(main_module, "app", app)

    return put


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_json(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"lofi {verb}" in text.partition("Example")[2]
    assert "--json" in text


def test_help_lists_every_verb_and_is_what_a_bare_lofi_prints(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lofi {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "there is no verb trian; did you mean train?"),
        (["xyzzy"], "use one of demo, doctor, train"),
        (["plan"], "plan is known to lofi but not in this version"),
        (["train", "--modle", "m"], "lofi train has no flag --modle; did you mean --model?"),
        (["train", "--zzzzzz"], "see lofi train --help"),
        (["generate", "--model", "m"], "--prompt"),
        (["generate", "--model", "m", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["demo", "extra"], "extra"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("lofi: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("a"), 2), (AdapterFileError("b"), 1), (ProofError("c"), 1)],
)
def test_an_exception_of_lofis_gives_its_sentence_and_its_exit_code(verb_that, error, code, capsys):
    verb_that(error)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"lofi: {error}\n"


def test_ctrl_c_exits_130(verb_that, capsys):
    verb_that(KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "lofi: interrupted\n"


def test_a_full_disk_is_a_sentence(verb_that, capsys):
    verb_that(OSError(errno.ENOSPC, "No space left on device", "runs/x/file"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "lofi: the disk is full while writing runs/x/file; free some space or choose another --output\n"
    )


def test_an_unexpected_error_is_one_line_with_the_way_to_see_more(verb_that, monkeypatch, capsys):
    monkeypatch.delenv("LOFI_DEBUG", raising=False)
    verb_that(ValueError("odd\nthing"))
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert (
        err == "lofi: unexpected ValueError: odd (this is lofi's fault; run it again with LOFI_DEBUG=1 to see where)\n"
    )
    monkeypatch.setenv("LOFI_DEBUG", "1")
    assert main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_under_json_an_error_is_an_object_too(capsys):
    assert main(["train", "none.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said == {"error": err.removeprefix("lofi: ").strip(), "exit_code": 2}


def test_a_warning_of_lofis_is_one_sentence_and_the_work_goes_on(monkeypatch, capsys):
    import warnings

    from lofi.errors import LofiWarning

    def found(device):
        warnings.warn("nothing known to be wrong", LofiWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("lofi.cli.doctor.examine", found)
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("{}\n", "lofi: warning: nothing known to be wrong\n")


def test_report_gives_back_the_code(capsys):
    assert report("no", 7, as_json=True) == 7
    assert json.loads(capsys.readouterr().out)["exit_code"] == 7


def test_help_loads_no_torch_and_a_closed_pipe_is_silent():
    code = (
        "import sys, lofi.cli.main as m\n"
        "assert m.main(['train', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'rich', 'numpy', 'datasets'} & set(sys.modules), sorted(sys.modules)\n"
        "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "sys.argv = ['lofi', '--help']; m.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")  # not everything was said, but nobody listens
