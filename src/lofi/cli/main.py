"""`lofi VERB ...`: the verbs, and the one place where an exception becomes a sentence and an exit code.

Exit codes: 0 worked; 1 a proof or check failed; 2 the request was wrong; 130 interrupted.
Knows not  what a verb does: each is a file beside this one and loads torch only when it runs.
Rejected  typer's error boxes (several lines where one sentence will do, and nothing under --json) and its rich help (it
    triples the time of `lofi --help`).
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from lofi.cli import (
    chat,
    combine,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    quantize,
    resize,
    serve,
    train,
    verify,
)
from lofi.cli.output import print_json
from lofi.errors import LofiError, LofiWarning, RequestError

VERBS: dict[str, Any] = {
    "demo": demo.demo,
    "doctor": doctor.doctor,
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "generate": generate.generate,
    "chat": chat.chat,
    "inspect": inspect.inspect,
    "merge": merge.merge,
    "quantize": quantize.quantize,
    "compare": compare.compare,
    "resize": resize.resize,
    "combine": combine.combine,
    "verify": verify.verify,
    "serve": serve.serve,
    "export": export.export,
}
LATER_VERBS = ("plan",)
UsageFault: Any = typer.BadParameter.__mro__[2]  # click's ClickException, wherever typer keeps its click
INTERRUPTED = 130


class Verbs(TyperGroup):
    """The group of verbs; an unknown one is answered with the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise RequestError(unknown_verb(args[0]))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="lofi",
    cls=Verbs,
    help="Low-rank fine-tuning, high fidelity: train, evaluate, merge and verify adapters, with every step proved.",
    epilog="Begin with `lofi demo`; `lofi VERB --help` shows an example of each verb.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)


@app.callback(invoke_without_command=True)
def _lofi(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print lofi's version and exit.")
) -> None:
    if version:
        from lofi import __version__

        print(f"lofi {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def run() -> None:
    """The console script: run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # figures and Vietnamese on any terminal
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        code = code or 1
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code, after one sentence on stderr where it is not 0."""
    with warnings.catch_warnings():
        warnings.showwarning = _warner(warnings.showwarning)
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = typer.main.get_command(app)(list(arguments), prog_name="lofi", standalone_mode=False)
        return _stopped(arguments) if code == INTERRUPTED else int(code or 0)
    except BrokenPipeError:  # `lofi ... | head`: nobody listens, and not everything was said
        _forget_stdout()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(arguments)
    except Exception as error:
        if os.environ.get("LOFI_DEBUG"):
            import traceback

            traceback.print_exc()
        sentence, code = in_words(error)
        return report(sentence, code, as_json="--json" in arguments)


def in_words(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for an exception."""
    if isinstance(error, LofiError):
        return str(error), error.exit_code
    if isinstance(error, UsageFault):
        return usage_sentence(error), 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space or choose another --output", 1
    if isinstance(error, MemoryError):
        return "memory ran out; use fewer tokens at once (train.micro_batch_size=1) or a smaller model", 1
    detail = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return f"unexpected {detail} (this is lofi's fault; run it again with LOFI_DEBUG=1 to see where)", 1


def report(sentence: str, code: int, *, as_json: bool) -> int:
    """Say what went wrong on stderr, under --json as an object on stdout too, and give the exit code back."""
    print(f"lofi: {sentence}", file=sys.stderr)
    if as_json:
        print_json({"error": sentence, "exit_code": code})
    return code


def unknown_verb(name: str) -> str:
    """One sentence for a verb that does not exist, or not yet."""
    if name in LATER_VERBS:
        return f"{name} is known to lofi but not in this version; the verbs here are {', '.join(VERBS)}"
    close = difflib.get_close_matches(name, VERBS, n=1)
    return f"there is no verb {name}; " + (f"did you mean {close[0]}?" if close else f"use one of {', '.join(VERBS)}")


def usage_sentence(error: Any) -> str:
    """One sentence for a flag or argument that click refused."""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else "lofi"
    option = getattr(error, "option_name", None)
    if option and "possibilities" in vars(error):
        known = [name for item in context.command.params for name in item.opts] if context else []
        close = difflib.get_close_matches(option, known, n=1)
        return f"{verb} has no flag {option}; " + (f"did you mean {close[0]}?" if close else f"see {verb} --help")
    text = error.format_message().rstrip(".")
    return f"{verb}: {text[:1].lower()}{text[1:]}; see {verb} --help"


def _warner(otherwise: Any) -> Any:
    """Shows lofi's own warnings as one sentence on stderr, others as they are shown anyway."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, LofiWarning):
            print(f"lofi: warning: {message}", file=sys.stderr)
        else:
            otherwise(message, category, *place, **more)

    return show


def _stopped(arguments: Sequence[str]) -> int:
    return report("interrupted", INTERRUPTED, as_json="--json" in arguments)


def _forget_stdout() -> None:
    """The reader went away: let nothing be written at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
