"""`lofi merge`: an adapter into its base, shard by shard, and the proof that the result says the same."""

from __future__ import annotations

from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError


def merge(
    model: flags.Model,
    adapter: Annotated[str, typer.Option("--adapter", help="Adapter folder.", metavar="PATH", show_default=False)],
    output: Annotated[str, typer.Option("--output", help="Folder for the merged model.", metavar="FOLDER")],
    into: Annotated[str, typer.Option("--into", help="dense (nf4 and int8: not in this version).")] = "dense",
    data: flags.Data = None,
    columns: flags.Columns = None,
    min_kept: Annotated[
        float | None, typer.Option("--min-kept", help="Refuse below this share of the adapter's gain (needs --data).")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Merge an adapter into its base: a plain model folder that needs no lofi.

    Both models are opened one after the other and compared: logit error, KL, top-1 agreement, and on --data the share
    of the adapter's gain that the merged model keeps. The base on disk is never changed.

    \b
    Example:
      lofi merge --model ./Qwen3-0.6B --adapter runs/first --output merged --data validation.jsonl --min-kept 0.95
    """
    check_request(into, data, min_kept)
    with speaking(as_json) as out:
        from lofi.merge.disk import merge_folder

        report = merge_folder(
            model,
            flags.adapter_folder(adapter),
            output,
            data=data,
            columns=flags.column_map(columns),
            min_kept=min_kept,
        )
        out.answer({"output": output} | report.to_dict())
        out.show(*report.lines())


def check_request(into: str, data: str | None, min_kept: float | None) -> None:
    """Raise RecipeError for a target of a later version, or a threshold that nothing can be measured for."""
    if into in ("nf4", "int8"):
        raise RecipeError(f"--into {into} is known to lofi but not in this version; use --into dense")
    if into != "dense":
        raise RecipeError(f"--into is {into!r}, expected dense (nf4 and int8 in a later version)")
    if min_kept is not None and data is None:
        raise RecipeError("--min-kept needs --data: the gain is measured on rows; give a validation file")
    if min_kept is not None and not 0 < min_kept <= 1:
        raise RecipeError(f"--min-kept is {min_kept}, expected a share above 0 and at most 1, such as 0.95")
