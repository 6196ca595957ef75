"""`lofi verify`: does this adapter still say what it said when it was saved?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import AdapterFileError, ProofError, RequestError


def verify(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or the run folder around it.")],
    model: flags.MaybeModel = None,
    dtype: flags.Dtype = "auto",
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="nf4, int8 or none (dense); else as the adapter was trained."),
    ] = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Replay the golden prompts stored with an adapter: token ids, greedy answers and logits must be the same.

    Without --model the base that lofi.json names is used, in the quantization it was trained on. Exit code 1 where
    anything differs.

    \b
    Example:
      lofi verify runs/first
    """
    folder = flags.adapter_folder(adapter)
    with speaking(as_json) as out:
        import torch

        from lofi.adapters.switch import using
        from lofi.files.adapter_folder import load_adapter, read_folder
        from lofi.files.golden import replay
        from lofi.models.load import load_model, load_tokenizer

        read = read_folder(folder)
        golden = read.record.get("golden")
        if not golden:
            raise AdapterFileError(f"{folder} holds no golden prompts, so nothing can be replayed; train it with lofi")
        torch.manual_seed(0)
        labels = [str(label) for label in read.record.get("labels") or ()] or None
        task = read.config.task_type
        base = model or base_of(folder, read.record)
        tokenizer = load_tokenizer(base) if any("text" in prompt for prompt in golden["prompts"]) else None
        opened = load_model(
            base,
            quantization=replayed_on(quantization, read.record, base),
            dtype=recorded_in(golden) if dtype == "auto" else dtype,
            device=device,
            task=task,
            labels=labels if task in ("SEQ_CLS", "TOKEN_CLS") else None,
        )
        load_adapter(opened, folder, "verified")
        with using(opened, "verified"):
            differences = [str(difference) for difference in replay(opened, golden, tokenizer=tokenizer)]
        if differences:
            raise ProofError(failure(folder, differences, read.record, opened))
        prompts = len(golden["prompts"])
        out.answer({"adapter": str(folder), "same": True, "prompts": prompts})
        out.show(f"{folder}: {prompts} golden prompts give the same tokens and logits as when it was saved")


def replayed_on(asked: str | None, record: dict[str, Any], base: str) -> str | None:
    """What load_model is asked for: what the flag says, else the quantization on record.

    A folder that is quantized already is loaded as it is, unless the flag says otherwise.
    """
    from transformers import AutoConfig

    from lofi.files.quantized import held_quantization
    from lofi.models.folder import local_folder

    if asked is not None:
        return None if asked == "none" else asked
    trained_on = (record.get("base") or {}).get("quantization")
    folder = local_folder(base) if trained_on else None
    if folder is not None and held_quantization(AutoConfig.from_pretrained(folder), base) is not None:
        return None
    return trained_on


def recorded_in(golden: dict[str, Any]) -> str:
    """The dtype that golden prompts were recorded in: in another, the base alone may differ by more than they allow."""
    return str(golden.get("dtype") or "auto")


def failure(folder: Path, differences: list[str], record: dict[str, Any], opened: Any) -> str:
    """One sentence for a replay that differs, with the quantizations where they are not the same."""
    from lofi.files.quantized import in_words, quantization_of

    then, now = (record.get("base") or {}).get("quantization"), quantization_of(opened)
    bases = f" (recorded on {in_words(then)}, replayed on {in_words(now)})" if then != now else ""
    return f"{folder} does not say what it said when it was saved{bases}: {'; '.join(differences[:5])}"


def base_of(folder: Path, record: dict[str, Any]) -> str:
    """The base that lofi.json names.

    Raises  RequestError where it names none, or one that is not here
    """
    path = (record.get("base") or {}).get("path")
    if not path:
        raise RequestError(f"{folder} does not say where its base is; give it with --model")
    return str(path)
