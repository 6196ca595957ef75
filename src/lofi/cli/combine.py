"""`lofi combine`: several LoRA adapters of one base as one."""

from __future__ import annotations

from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError


def combine(
    adapter: flags.Adapters,
    output: Annotated[str, typer.Option("--output", help="Folder for the combined adapter.", metavar="FOLDER")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="One number for each adapter, in their order; 1 each if left out.", metavar="W,W"
        ),
    ] = None,
    how: Annotated[
        str,
        typer.Option(
            "--how", help="concat: exact; linear: the sum cut to the largest rank of its parts; svd: to --rank."
        ),
    ] = "concat",
    rank: Annotated[int | None, typer.Option("--rank", help="With svd: the rank of every update.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Add LoRA adapters of one base up: the weighted sum of what each adds to the weights.

    The sum has no cross terms: it is of the products B A, never of B and A apart, which is what "linear" means in PEFT.
    concat is exact, with the sum of the ranks; linear and svd cut that exact sum, and say how far they are from it.
    Targets, ranks, alphas and rsLoRA may differ; base and task must be the same, and so must heads.

    \b
    Examples:
      lofi combine --adapter runs/style --adapter runs/facts --output both
      lofi combine --adapter a=runs/style --adapter b=runs/facts --weights 0.7,0.3 --how svd --rank 16 --output both
    """
    with speaking(as_json) as out:
        from lofi.merge.combine import Mix, combine_folders

        mix = Mix(how=how, weights=numbers(weights), rank=rank)
        report = combine_folders(flags.named_adapters(adapter), output, mix)
        out.answer(report.to_dict())
        out.show(*report.lines())


def numbers(text: str | None) -> list[float] | None:
    """[0.7, 0.3] from "0.7,0.3"; None where nothing was given.

    Raises  RecipeError where a piece is no number
    """
    if text is None:
        return None
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {text!r}, expected a number for each adapter, such as 0.7,0.3") from None
