"""`lofi train`: from a recipe, or from three flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import DataError, RecipeError

SPLITS = ("train", "validation", "test")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="A recipe, and values that replace its own."),
    ] = None,
    model: flags.MaybeModel = None,
    data: flags.Data = None,
    output: flags.Output = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="lora (default), qlora, int8-lora, full, houlsby, adapter-lin, prefix, prompt, bitfit, "
            "last-layers, lora+prefix or lora+prompt.",
            metavar="NAME",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, bf16, fp16 or fp32.")] = None,
    quantization: flags.Quantization = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything drawn at random.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint, exactly.")] = False,
    as_json: flags.Json = False,
) -> None:
    """Fine-tune a model: LoRA by default, qlora or int8-lora over a quantized base, full for all weights.

    key=value replaces any key of the recipe; an unknown key is an error. The run folder receives the resolved recipe
    with the origin of every value, the adapter, checkpoints, metrics.jsonl and report.html.

    \b
    Examples:
      lofi train first.yaml train.epochs=1
      lofi train --model ./Qwen3-0.6B --data ./my-data --output runs/first lora.r=8
      lofi train --model ./Llama-7B --data ./my-data --output runs/small --method qlora
      lofi train first.yaml --resume
    """
    given = {"model": model, "output": output, "method": method, "quantization": quantization}
    flagged = {key: value for key, value in given.items() if value is not None}
    flagged |= {f"train.{key}": value for key, value in (("dtype", dtype), ("seed", seed)) if value is not None}
    recipe = recipe_from(words or [], flagged, data)
    with speaking(as_json) as out:
        from lofi.report.run import report_run
        from lofi.train.run import train as run_training

        result = run_training(recipe, resume=resume)
        page = report_run(recipe, result)
        out.answer(result.to_dict() | {"report": str(page)})
        out.show(*closing_lines(recipe, result, page))


def closing_lines(recipe: Any, result: Any, page: Path) -> list[str]:
    """Where the report is (the run itself said where the adapter or model is), and what to do next."""
    data = recipe.data.test or recipe.data.validation or "DATA"
    if result.adapter is None:
        return [f"report: {page}", f"next: lofi evaluate --model {result.model} --data {data}"]
    asked = f"--model {recipe.model} --adapter {result.output}"
    same = f" --quantization {recipe.quantization}" if recipe.quantization else ""
    lines = [f"report: {page}", f"next: lofi evaluate {asked} --data {data}{same}"]
    if recipe.adapter_config().why_unmergeable() is None:
        lines.append(f"      lofi merge {asked} --output {result.output}/merged")
    return lines


def recipe_from(words: list[str], flagged: dict[str, Any], data: str | None) -> Any:
    """The recipe that the words and flags ask for; a flag replaces the recipe's value.

    Raises  RecipeError where a word is neither a recipe nor key=value
    """
    from lofi.recipe import load_recipe, make_recipe

    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise RecipeError(f"{files[1]!r} is a second recipe or no key=value; give one recipe, then key=value")
    overrides = [f"{key}={_yaml(value)}" for key, value in flagged.items()]
    overrides += [f"data.{split}={_yaml(path)}" for split, path in (splits_of(data) if data else {}).items()]
    overrides += [word for word in words if word not in files]
    if files:
        return load_recipe(files[0], overrides)
    if not overrides:
        raise RecipeError("there is nothing to train; give a recipe, or --model, --data and --output")
    return make_recipe({}, overrides)


def splits_of(data: str) -> dict[str, str]:
    """The files behind --data: a folder's train, validation and test files; anything else is the training rows.

    Raises  DataError where a folder holds no training file
    """
    folder = Path(data)
    if not folder.is_dir():
        return {"train": data}
    found = {}
    for split in SPLITS:
        files = [folder / f"{split}{ending}" for ending in FORMATS if (folder / f"{split}{ending}").is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} holds both {files[0].name} and {files[1].name}; remove one or write a recipe")
        if files:
            found[split] = str(files[0])
    if "train" not in found:
        wanted = ", ".join(f"train{ending}" for ending in FORMATS)
        raise DataError(f"{folder} holds no training file (one of {wanted}); name one so, or give the file itself")
    return found


def _yaml(value: Any) -> str:
    return json.dumps(value)  # JSON is YAML
