"""`lofi verify`: does this adapter still say what it said when it was saved, here or behind a server?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import AdapterFileError, ProofError, RecipeError, RequestError


def verify(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder, or the run folder around it.")],
    model: flags.MaybeModel = None,
    dtype: flags.Dtype = "auto",
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="nf4, int8 or none (dense); else as the adapter was trained."),
    ] = None,
    device: flags.Device = "auto",
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="Ask an OpenAI-compatible server at this address instead.", metavar="URL"),
    ] = None,
    endpoint_model: Annotated[
        str | None,
        typer.Option("--endpoint-model", help="The adapter's name there, if not the folder's.", metavar="NAME"),
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="The server's bearer token.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Replay the golden prompts stored with an adapter: token ids, greedy answers and logits must be the same.

    Without --model the base that lofi.json names is used, in the quantization it was trained on. Exit code 1 where
    anything differs.

    With --endpoint a server is asked (lofi serve, vLLM, llama.cpp, Ollama ...): tokens, differences of logits and stops
    must be the same, and what its chat template makes of a question. --dtype is then what the server computes in, and
    only the tokenizer is taken from the base.

    \b
    Examples:
      lofi verify runs/first
      lofi verify runs/first --endpoint http://127.0.0.1:8000 --endpoint-model first
    """
    folder = flags.adapter_folder(adapter)
    if endpoint is not None:
        refuse_unread({"--quantization": quantization is not None, "--device": device != "auto"}, "--endpoint")
        ask = Served(endpoint, endpoint_model, api_key)
        verify_served(folder, ask, model, None if dtype == "auto" else dtype, as_json)
        return
    refuse_unread({"--endpoint-model": endpoint_model is not None, "--api-key": api_key is not None})
    with speaking(as_json) as out:
        import torch

        from lofi.adapters.switch import using
        from lofi.files.adapter_folder import load_adapter, read_folder
        from lofi.files.golden import replay
        from lofi.models.load import load_model, load_tokenizer

        read = read_folder(folder)
        golden = golden_of(folder, read.record)
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


class Served(NamedTuple):
    """A server by its address, the model's name there, and what it wants to see before it answers."""

    url: str
    model: str | None
    api_key: str | None


def refuse_unread(given: dict[str, bool], beside: str | None = None) -> None:
    """Raise RecipeError for flags that this way of verifying does not read."""
    unread = [flag for flag, is_given in given.items() if is_given]
    if unread:
        why = f"says nothing beside {beside}: the server decides" if beside else "needs --endpoint"
        raise RecipeError(f"{unread[0]} {why}; leave it out" if beside else f"{unread[0]} {why}; give the address")


def verify_served(folder: Path, ask: Served, base: str | None, dtype: str | None, as_json: bool) -> None:
    """Replay the golden prompts on a server and say what differs."""
    with speaking(as_json) as out:
        from lofi.export.connection import Connection
        from lofi.export.endpoint import Vocabulary, replay_endpoint
        from lofi.export.served import Served as Model
        from lofi.files.adapter_folder import read_folder
        from lofi.models.load import load_tokenizer

        record = read_folder(folder).record
        golden = golden_of(folder, record)
        served = Model.open(Connection(ask.url, ask.api_key), ask.model, flags.own_name(folder))
        vocabulary = Vocabulary(lambda: load_tokenizer(base or base_of(folder, record)))
        rule = record.get("text_format")
        if rule is not None and rule.get("kind") == "chat" and (why := missing(vocabulary)):
            served.notes.append(f"the chat template was not checked, for there is no tokenizer: {why}")
            rule = None
        report = replay_endpoint(served, golden, vocabulary, text_format=rule, dtype=dtype)
        if report.differences:
            raise ProofError(report.failure())
        out.answer({"adapter": str(folder)} | report.to_dict())
        out.show(*report.lines())


def missing(vocabulary: Any) -> str | None:
    """Why there is no tokenizer; None where there is one."""
    try:
        vocabulary.tokenizer  # noqa: B018
    except RequestError as error:
        return str(error)
    return None


def golden_of(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The golden prompts of an adapter.

    Raises  AdapterFileError where it has none
    """
    if not record.get("golden"):
        raise AdapterFileError(f"{folder} holds no golden prompts, so nothing can be replayed; train it with lofi")
    return record["golden"]


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
