"""`lofi demo`: the whole road on what ships in the package."""

from __future__ import annotations

from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking


def demo(
    output: Annotated[str, typer.Option("--output", help="Folder to write into.", metavar="FOLDER")] = "demo-run",
    seed: flags.Seed = 0,
    as_json: flags.Json = False,
) -> None:
    """Train, evaluate before and after, merge, verify, ask three questions, report: offline, in about two minutes.

    A tiny model that ships in the package learns to answer questions in English and Vietnamese with SQL; its answers
    are executed. The demo may be run again; with another --output and --seed it trains another adapter.

    \b
    Examples:
      lofi demo
      lofi demo --output two --seed 1
    """
    with speaking(as_json) as out:
        from lofi.demo.run import run

        out.answer(run(output=output, seed=seed, out=out))
