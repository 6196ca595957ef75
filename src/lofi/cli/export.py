"""`lofi export`: an adapter for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import ProofError, RecipeError


def export(
    adapter: Annotated[str, typer.Option("--adapter", help="Adapter folder.", metavar="PATH", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="merged, vllm, gguf (llama.cpp) or ollama.", show_default=False)],
    output: Annotated[
        str | None, typer.Option("--output", help="Folder for what is handed over.", metavar="FOLDER")
    ] = None,
    model: flags.MaybeModel = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="gguf and ollama: f16 (unless given), q8_0, bf16 or f32.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="gguf and ollama: model (merged) or adapter (alone).")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", help="vllm: the --max-lora-rank of a server that runs already.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="ollama: a file with a template of your own.", metavar="FILE")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what the engine would refuse; write nothing.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Hand an adapter over to another engine: as a merged model, for vLLM, for llama.cpp or for Ollama.

    What the engine would refuse is an error that names every fault and what to do; what is converted is told, and what
    is written is proved before it takes its place. The folder's README.md has the engine's commands. Without --model
    the base that lofi.json names is used. With --check the exit code is 1 where the engine would refuse.

    \b
    Examples:
      lofi export --adapter runs/first --to vllm --output handed/vllm
      lofi export --adapter runs/first --to ollama --dtype q8_0 --output handed/ollama
      lofi export --adapter runs/first --to vllm --check
    """
    with speaking(as_json) as out:
        from lofi.export import handover

        text = read_template(template)
        order = handover.Order(to=to, dtype=dtype, only=only, max_rank=max_rank, template=text)
        folder = flags.adapter_folder(adapter)
        if check:
            found = handover.check(folder, order, model=model)
            if found.refusals:
                raise ProofError(f"{found.lines()[0]}: {'; '.join(found.refusals)}")
        elif output is None:
            raise RecipeError("--output is missing; give a new folder, or --check to write nothing")
        else:
            found = handover.export(folder, output, order, model=model)
        out.answer(found.to_dict())
        out.show(*found.lines())


def read_template(path: str | None) -> str | None:
    """A template file's text; None where none is given.

    Raises  RecipeError where it cannot be read
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--template {path} cannot be read ({error}); give a text file in UTF-8") from None
