"""The flags that verbs share, so that one word means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lofi.errors import RecipeError


def _shipped(given: str | None) -> str | None:
    """--model demo:model is the model in the package; anything else stands as it is."""
    if given is None or not given.startswith("demo:"):
        return given
    from lofi.demo.shipped import shipped_model

    return shipped_model(given)


_MODEL: Any = typer.Option(
    "--model",
    help="Model folder or hub id; demo:model is the one that ships with lofi.",
    metavar="PATH",
    show_default=False,
    callback=_shipped,
)
Model = Annotated[str, _MODEL]
MaybeModel = Annotated[str | None, _MODEL]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="Adapter folder, or name=folder; may be repeated.", metavar="[NAME=]PATH"),
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Data file, hub id, or folder with train, validation and test files.", metavar="PATH"),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="lofi's column names = the file's: prompt=dialogue,completion=summary.",
        metavar="NAME=NAME,...",
    ),
]
Output = Annotated[str | None, typer.Option("--output", help="Folder to write into.", metavar="FOLDER")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32.")]
Quantization = Annotated[
    str | None, typer.Option("--quantization", help="Load the base's linear layers in 4 or 8 bits: nf4 or int8.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Stop after this many tokens.", min=1)]


def named_adapters(given: list[str] | None) -> dict[str, Path]:
    """Name -> folder for each --adapter: `name=PATH`, or PATH under the folder's own name.

    A run folder stands for the adapter inside it, and gives it its name.
    Raises  RecipeError where two adapters have one name, or a name cannot be one
    """
    found: dict[str, Path] = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "", text
        folder = adapter_folder(path)
        name = name or own_name(folder)
        if name in found:
            raise RecipeError(f"two adapters are called {name} ({found[name]} and {folder}); give one as name={folder}")
        if name == "base" or "." in name:
            raise RecipeError(f"an adapter cannot be called {name}; give it as name={folder} with a name without dots")
        found[name] = folder
    return found


def column_map(text: str | None) -> dict[str, str] | None:
    """{lofi's column name: the file's} from `prompt=dialogue,completion=summary`; None where nothing was given.

    Raises  RecipeError where a piece is not name=name
    """
    if text is None:
        return None
    pieces = [piece.partition("=") for piece in text.split(",")]
    wrong = [name for name, _, theirs in pieces if not (name.strip() and theirs.strip())]
    if wrong:
        raise RecipeError(f"--columns is {text!r}, expected name=name,... such as prompt=dialogue,completion=summary")
    return {name.strip(): theirs.strip() for name, _, theirs in pieces}


def adapter_folder(path: str) -> Path:
    """The adapter folder at `path`, or inside it where `path` is a run folder."""
    folder = Path(path)
    inside = folder / "adapter"
    return inside if (inside / "adapter_config.json").exists() else folder


def model_folder(path: str) -> Path:
    """The model folder at `path`, or inside it where `path` is a run folder of full fine-tuning."""
    folder = Path(path)
    inside = folder / "model"
    return inside if (inside / "config.json").exists() and not (folder / "config.json").exists() else folder


def own_name(folder: Path) -> str:
    """The folder's own name; for `runs/first/adapter` that is `first`. Dots become underscores."""
    folder = folder.resolve()
    return (folder.parent.name if folder.name == "adapter" else folder.name).replace(".", "_")
