"""`lofi quantize`: a dense model folder into a pre-quantized one, with what that costs."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError

KINDS = ("nf4", "int8")


def quantize(
    model: flags.Model,
    to: Annotated[str, typer.Option("--to", help="nf4 (4 bits) or int8 (8 bits).", show_default=False)],
    output: Annotated[str, typer.Option("--output", help="Folder for the quantized model.", metavar="FOLDER")],
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="nf4: block scales in 8 bits too (yes by default)."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="int8: activations from this magnitude on stay in 16 bits (6; 0: none)."),
    ] = None,
    skip: Annotated[
        str | None,
        typer.Option("--skip", help="Linear layers that stay dense, by name, beside the heads.", metavar="NAME,..."),
    ] = None,
    data: flags.Data = None,
    columns: flags.Columns = None,
    as_json: flags.Json = False,
) -> None:
    """Write a model with its linear layers in 4 or 8 bits, in the format that transformers and bitsandbytes read.

    The folder is read again and compared tensor by tensor, then both models answer the same probes: logit error, KL,
    top-1 agreement, and with --data the loss of both. The model given is never changed.

    \b
    Examples:
      lofi quantize --model ./Qwen3-0.6B --to nf4 --output qwen-nf4
      lofi quantize --model ./Qwen3-0.6B --to int8 --output qwen-int8 --data validation.jsonl
    """
    check_request(to, double_quant, threshold)
    with speaking(as_json) as out:
        from lofi.merge.quantize_folder import quantize_folder

        config = config_of(to, double_quant, threshold, skip)
        report = quantize_folder(model, output, config, data=data, columns=flags.column_map(columns))
        out.answer(report.to_dict())
        out.show(*report.lines())


def check_request(to: str, double_quant: bool | None, threshold: float | None) -> None:
    """Raise RecipeError for a kind that is not there, or a flag that this kind does not read."""
    if to not in KINDS:
        close = get_close_matches(to, KINDS, n=1)
        raise RecipeError(f"--to is {to!r}, expected nf4 or int8" + (f"; did you mean {close[0]}?" if close else ""))
    if to == "int8" and double_quant is not None:
        raise RecipeError("--double-quant is about nf4's block scales, but --to is int8; leave it out")
    if to == "nf4" and threshold is not None:
        raise RecipeError("--threshold is about int8's activations, but --to is nf4; leave it out")


def config_of(to: str, double_quant: bool | None, threshold: float | None, skip: str | None) -> Any:
    """The quantization config that the flags ask for; what was not said is the config's own default."""
    from lofi.models.quantization import Int8Config, NF4Config

    given: dict[str, Any] = {"double_quant": double_quant, "threshold": threshold}
    given["skip_modules"] = [name.strip() for name in skip.split(",") if name.strip()] if skip is not None else None
    told = {key: value for key, value in given.items() if value is not None}
    return NF4Config(**told) if to == "nf4" else Int8Config(**told)
