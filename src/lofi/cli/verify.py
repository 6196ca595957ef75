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
    quantization: flags.Quantization = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Replay the golden prompts stored with an adapter: token ids, greedy answers and logits must be the same.

    Without --model the base that lofi.json names is used. Exit code 1 where anything differs.

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
            quantization=quantization,
            dtype=dtype,
            device=device,
            task=task,
            labels=labels if task in ("SEQ_CLS", "TOKEN_CLS") else None,
        )
        load_adapter(opened, folder, "verified")
        with using(opened, "verified"):
            differences = [str(difference) for difference in replay(opened, golden, tokenizer=tokenizer)]
        if differences:
            raise ProofError(f"{folder} does not say what it said when it was saved: {'; '.join(differences[:5])}")
        prompts = len(golden["prompts"])
        out.answer({"adapter": str(folder), "same": True, "prompts": prompts})
        out.show(f"{folder}: {prompts} golden prompts give the same tokens and logits as when it was saved")


def base_of(folder: Path, record: dict[str, Any]) -> str:
    """The base that lofi.json names.

    Raises  RequestError where it names none, or one that is not here
    """
    path = (record.get("base") or {}).get("path")
    if not path:
        raise RequestError(f"{folder} does not say where its base is; give it with --model")
    return str(path)
