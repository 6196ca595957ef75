"""`lofi inspect PATH`: an adapter, a data file as a model sees it, or what could be adapted in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Adapter folder, data file or folder, or model folder.")],
    model: flags.MaybeModel = None,
    rows: Annotated[int, typer.Option("--rows", help="Data rows to show.", min=1)] = 3,
    split: Annotated[str, typer.Option("--split", help="Which part of a data folder or hub id.")] = "train",
    columns: flags.Columns = None,
    task: Annotated[str | None, typer.Option("--task", help="How to read the data; inferred from its columns.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens a row may have.", min=2)] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="What of a model nf4 or int8 would pack, at how many bits.")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Every module of an adapter, not one line a kind.")] = False,
    against: Annotated[
        str | None, typer.Option("--against", help="Another adapter: how alike are their subspaces?", metavar="ADAPTER")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Draw an adapter: page.html or picture.png.", metavar="FILE")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Look inside: an adapter, a data file under a model, or a model.

    An adapter: targets, ranks, scale, figures, base, and of each update its norm, spectrum, effective rank and dead
    directions; beside the base (--model, else the one that lofi.json names) the amplification factor as well; with
    --against the subspaces of two adapters beside what chance gives. A data file with --model: rows with the trained,
    context, padding and cut tokens in colours, and what will become of the file. A model: what could be adapted, and
    what is quantized.

    \b
    Examples:
      lofi inspect runs/first
      lofi inspect runs/first --against runs/second --output alike.html
      lofi inspect train.jsonl --model ./Qwen3-0.6B
      lofi inspect ./Qwen3-0.6B --quantization nf4
    """
    with speaking(as_json) as out:
        from lofi.cli import inspecting, inspecting_adapter
        from lofi.data.records import load_records

        kind = kind_of(path, model)
        if quantization is not None and kind != "model":
            raise RecipeError(f"--quantization shows how a model would be packed, but {path} is {kind}; leave it out")
        if kind != "adapter" and (against or output):
            flag = "--against" if against else "--output"
            raise RecipeError(f"{flag} is for adapters, but {path} is {kind}; leave it out, or give an adapter folder")
        if kind == "adapter":
            other = None if against is None else flags.adapter_folder(against)
            found, shown = inspecting_adapter.adapter(
                flags.adapter_folder(path), inspecting_adapter.Asked(whole, model, other, output)
            )
        elif kind == "data":
            assert model is not None
            records = load_records(path, columns=flags.column_map(columns), split=split)
            found, shown = inspecting.data(records, model, rows=rows, task=task, max_length=max_length)
        else:
            found, shown = inspecting.model(str(flags.model_folder(path)), quantization)
        out.answer({"kind": kind, "path": path} | found)
        out.show(*shown)


def kind_of(path: str, model: str | None) -> str:
    """What stands at a path: "adapter", "model" or "data" (which needs a model to be seen through).

    Raises  RecipeError for data without a model, or a model seen through another
    """
    if (flags.adapter_folder(path) / "adapter_config.json").exists():
        return "adapter"
    if (flags.model_folder(path) / "config.json").exists():
        if model is not None:
            raise RecipeError(f"{path} is a model, so --model {model} says nothing; leave --model out")
        return "model"
    if model is not None:
        return "data"
    if not Path(path).exists():
        raise RecipeError(f"there is no {path}; give an adapter folder, a model folder, or data together with --model")
    raise RecipeError(f"{path} is neither an adapter nor a model; if it is data, say which model reads it with --model")
