"""`lofi merge`: an adapter into its base, dense or quantized, and the proof that the result says the same."""

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
    into: Annotated[str, typer.Option("--into", help="dense, nf4 (4 bits) or int8 (8 bits).")] = "dense",
    data: flags.Data = None,
    columns: flags.Columns = None,
    min_kept: Annotated[
        float | None, typer.Option("--min-kept", help="Refuse below this share of the adapter's gain (needs --data).")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            help="nf4 and int8: nearest, compensated (for the layers' outputs), stochastic, or auto: the better of the "
            "first two, measured.",
        ),
    ] = "auto",
    onto: Annotated[
        str,
        typer.Option(
            "--onto",
            help="The weights to add to: original, dequantized (of an adapter trained on a quantized base), or auto: "
            "the base as given.",
        ),
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure every form in memory as well, and recommend one.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Merge an adapter into its base: a model folder that needs no lofi.

    Both models are opened one after the other and compared: logit error, KL, top-1 agreement, and on --data the share
    of the adapter's gain that the merged model keeps. Into nf4 or int8, weight and update are rounded together, so that
    the layers' outputs change least on --data (every fourth row is set apart for that) or on text that the model
    writes. The base on disk is never changed.

    \b
    Examples:
      lofi merge --model ./Qwen3-0.6B --adapter runs/first --output merged --data validation.jsonl --min-kept 0.95
      lofi merge --model ./Qwen3-0.6B --adapter runs/first --output small --into nf4 --data validation.jsonl --compare
    """
    check_request(data, min_kept)
    with speaking(as_json) as out:
        from lofi.merge.disk import merge_folder
        from lofi.merge.form import Form

        report = merge_folder(
            model,
            flags.adapter_folder(adapter),
            output,
            form=Form(into, rounding, onto),
            data=data,
            columns=flags.column_map(columns),
            min_kept=min_kept,
            compare=compare,
        )
        out.answer({"output": output} | report.to_dict())
        out.show(*report.lines())


def check_request(data: str | None, min_kept: float | None) -> None:
    """Raise RecipeError for a threshold that nothing can be measured for."""
    if min_kept is not None and data is None:
        raise RecipeError("--min-kept needs --data: the gain is measured on rows; give a validation file")
    if min_kept is not None and not 0 < min_kept <= 1:
        raise RecipeError(f"--min-kept is {min_kept}, expected a share above 0 and at most 1, such as 0.95")
