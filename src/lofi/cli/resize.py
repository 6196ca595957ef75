"""`lofi resize`: an adapter with fewer ranks, and what was lost on the way."""

from __future__ import annotations

from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking


def resize(
    adapter: Annotated[str, typer.Option("--adapter", help="Adapter folder.", metavar="PATH", show_default=False)],
    output: Annotated[str, typer.Option("--output", help="Folder for the smaller adapter.", metavar="FOLDER")],
    rank: Annotated[int | None, typer.Option("--rank", help="The rank of every update, at most.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="The share of each update's squared norm to keep, such as 0.99.")
    ] = None,
    min_kept: Annotated[
        float | None,
        typer.Option("--min-kept", help="The share of the adapter's gain to keep (needs --model and --data)."),
    ] = None,
    model: flags.MaybeModel = None,
    data: flags.Data = None,
    columns: flags.Columns = None,
    same_rank: Annotated[
        bool, typer.Option("--same-rank", help="Fill every update up to one rank, for servers that know only one.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Cut an adapter to fewer ranks by SVD: to --rank, to --energy, or to the smallest rank that keeps --min-kept.

    Each update is replaced by its best approximation. The error is predicted from the singular values that are dropped
    and measured on the file that was written; with --model the smaller adapter is put on the base and compared as
    well. The output is an ordinary adapter folder.

    \b
    Examples:
      lofi resize --adapter runs/first --rank 8 --output small
      lofi resize --adapter runs/first --min-kept 0.95 --model ./Qwen3-0.6B --data validation.jsonl --output small
    """
    with speaking(as_json) as out:
        from lofi.merge.resize import Goal, resize_folder

        goal = Goal(rank=rank, energy=energy, min_kept=min_kept, same_rank=same_rank)
        where = flags.adapter_folder(adapter)
        report = resize_folder(where, output, goal, model=model, data=data, columns=flags.column_map(columns))
        out.answer(report.to_dict())
        out.show(*report.lines())
