"""Handing an adapter over to another engine: a merged folder, an adapter for vLLM, GGUF files, or an Ollama model.

Each is one folder that takes its place when all of it is written and proved, with a README.md of the commands that use
it. What the engine would refuse is an error that names every fault and what to do; what is converted is told. The base
and the adapter given are never changed. Knows the order of things; the formats stand in the files beside this one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lofi.data.format import TextFormat
from lofi.errors import LofiError, RequestError
from lofi.export import instructions
from lofi.export.merged import (
    GENERATION,
    TEMPLATE,
    Merged,
    generation_config,
    held_template,
    merge_into,
    refuse_speechless,
    refuse_unmergeable,
)
from lofi.files.adapter_folder import AdapterFolder, read_folder
from lofi.files.atomic import atomic_folder, refuse_foreign, write_json, write_text
from lofi.merge.report import FILE

TARGETS = ("merged", "vllm", "gguf", "ollama")
PARTS = ("model", "adapter")
DTYPES = ("f16", "bf16", "q8_0", "f32")
MADE_BY = "lofi_export.json"
"""Beside what was handed over: what it is and what it was made of; such a folder may be written anew."""
_MODEL, _BASE, _ADAPTER = "model.gguf", "base.gguf", "adapter.gguf"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be handed over.

    Raises  RequestError for a target or part that does not exist, or a choice that the target does not read
    """

    to: str
    dtype: str | None = None
    """gguf and ollama: f16 (where None), q8_0, bf16 or f32."""
    only: str | None = None
    """gguf and ollama: "model" (merged) or "adapter" (alone; for Ollama beside the GGUF of its base)."""
    max_rank: int | None = None
    """vllm: the --max-lora-rank of a server that runs already."""
    template: str | None = None
    """ollama: a template in Go, in place of the one worked out from the tokenizer's."""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise RequestError(f"--to is {self.to}, expected one of {', '.join(TARGETS)}")
        for flag, given, known in (("only", self.only, PARTS), ("dtype", self.dtype, DTYPES)):
            if given is not None and given not in known:
                raise RequestError(f"--{flag} is {given}, expected one of {', '.join(known)}")
        read_by = {"dtype": ("gguf", "ollama"), "only": ("gguf", "ollama"), "max_rank": ("vllm",)}
        for key, targets in (read_by | {"template": ("ollama",)}).items():
            if getattr(self, key) is not None and self.to not in targets:
                flag = f"--{key.replace('_', '-')}"
                raise RequestError(f"{flag} is of --to {' and '.join(targets)}; leave it out with --to {self.to}")


@dataclass(frozen=True)
class Handover:
    """What was handed over, or (where nothing was written) what would be."""

    to: str
    output: str | None
    adapter: str
    base: str | None
    refusals: Sequence[str] = ()
    """What the engine would refuse, each with what to do; () in whatever was written."""
    conversions: Sequence[str] = ()
    notes: Sequence[str] = ()
    proofs: Sequence[str] = ()
    files: Sequence[str] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in words."""
        if self.output is None:
            verdict = "would not take" if self.refusals else "takes"
            engine = {"merged": "a merge", "vllm": "vLLM", "gguf": "llama.cpp", "ollama": "Ollama"}[self.to]
            head = [f"{engine} {verdict} {self.adapter}", *self.refusals]
        else:
            head = [f"handed {self.adapter} over to {self.to}"]
        tail = (
            [f"written to {self.output}: {', '.join(self.files)}; README.md says how it is used"] if self.output else []
        )
        return [*head, *(f"converted: {one}" for one in self.conversions), *self.notes, *self.proofs, *tail]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        lists = ("refusals", "conversions", "notes", "proofs", "files")
        return {
            **{key: getattr(self, key) for key in ("to", "output", "adapter", "base")},
            **{key: list(getattr(self, key)) for key in lists},
            **self.details,
        }


def export(adapter: str | Path, output: str | Path, order: Order, *, model: str | Path | None = None) -> Handover:
    """Hand an adapter over into the folder `output`; without `model` the base is the one that lofi.json names.

    Raises  RequestError for what the engine would refuse (all of it) or a base that is not named; ModelError,
            AdapterFileError; ProofError where what was written is not what was given; LofiError when the disk refuses.
            What was at `output` is then unchanged
    """
    read = read_folder(adapter)
    base = base_of(read, model)
    _refuse_place(output, read, base)
    if order.to in ("gguf", "ollama") and (reason := refuse_speechless(read)):
        raise RequestError(f"{read.path} cannot be handed over to {order.to}: {reason}")
    write = {"merged": _merged, "vllm": _vllm, "gguf": _gguf, "ollama": _ollama}[order.to]
    with atomic_folder(output) as aside:
        done = write(_Work(read, base, Path(output), order, aside))
        files = sorted(p.name for p in aside.iterdir() if not p.name.startswith("."))
        files = [name for name in files if name not in (MADE_BY, "README.md")]
        report = replace(done, files=files)
        write_json(aside / MADE_BY, report.to_dict() | {"format": 1})
    return report


def check(adapter: str | Path, order: Order, *, model: str | Path | None = None) -> Handover:
    """What the engine would refuse, and what would be converted; nothing stays on the disk.

    Raises  AdapterFileError for a broken folder; ModelError for a base that is given and not there
    """
    read = read_folder(adapter)
    base = None if model is None and not _named(read) else base_of(read, model)
    here = None if base is None else _folder_of(base, given=model is not None)
    refusals: list[str] = []
    if order.to == "vllm":
        from lofi.export.vllm import fitness

        fit = fitness(read, None if here is None else _config(here), max_rank=order.max_rank)
        return Handover(
            "vllm", None, str(read.path), base, fit.refusals, fit.conversions, fit.notes, details=_rank(fit)
        )
    if order.only != "adapter" and (reason := refuse_unmergeable(read)):
        refusals.append(reason)
    notes = [] if here is not None else ["the base was not at hand, so its family and template were not checked"]
    if order.to in ("gguf", "ollama") and (reason := refuse_speechless(read)):
        return Handover(order.to, None, str(read.path), base, [*refusals, reason])
    if here is not None and order.to in ("gguf", "ollama"):
        refusals += _gguf_refusals(read, here, order)
    if here is not None and order.to == "ollama":
        refusals += _sentence_of(lambda: _modelfile(read, here, order, adds_bos=False))
    return Handover(order.to, None, str(read.path), base, refusals, (), notes)


# -- each target -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """One hand-over under way: what is given, and the folder to write into."""

    read: AdapterFolder
    base: str
    output: Path
    order: Order
    aside: Path

    @property
    def name(self) -> str:
        """What the adapter is called in commands."""
        folder = self.read.path.resolve()
        return folder.parent.name if folder.name == "adapter" else folder.name

    def done(self, **more: Any) -> Handover:
        """The report of this hand-over."""
        return Handover(self.order.to, str(self.output), str(self.read.path), self.base, **more)

    def write_readme(self, text: str) -> None:
        """The README.md of the folder."""
        write_text(self.aside / "README.md", text)


def _merged(work: _Work) -> Handover:
    merged = _merge(work, work.aside / "merged")
    for file in sorted((work.aside / "merged").iterdir()):
        file.rename(work.aside / file.name)
    (work.aside / "merged").rmdir()
    work.write_readme(instructions.merged(work.name, str(work.read.path)))
    report = merged.report
    return work.done(conversions=merged.notes, proofs=report.lines()[1:-1], details={"merge": report.to_dict()})


def _merge(work: _Work, folder: Path) -> Merged:
    if reason := refuse_unmergeable(work.read):
        raise RequestError(reason)
    return merge_into(work.read, work.base, folder, work.output)


def _vllm(work: _Work) -> Handover:
    from lofi.export import vllm
    from lofi.export.vllm_proof import proved_same

    folder = _folder_of(work.base, given=True)
    assert folder is not None
    fit = vllm.fitness(work.read, _config(folder), max_rank=work.order.max_rank)
    vllm.refuse(work.read, fit)
    (work.aside / "adapter").mkdir()
    vllm.write_adapter(work.read, fit, work.aside / "adapter")
    proof = proved_same(work.read, folder, work.aside / "adapter")
    rule = work.read.record.get("text_format") or {}
    generation, missing = generation_config(folder, rule)
    write_json(work.aside / GENERATION, generation)
    template = rule.get("template") or held_template(folder)
    if template:
        write_text(work.aside / TEMPLATE, template)
    start = instructions.vllm_command(work.name, work.base, work.order.max_rank or fit.max_lora_rank, bool(template))
    write_text(work.aside / "serve.sh", instructions.script(start))
    work.write_readme(instructions.vllm(work.name, work.base, start, fit.max_lora_rank))
    ends = [f"{GENERATION} ends answers at {generation['eos_token_id']}, as training did"] if missing else []
    return work.done(conversions=[*fit.conversions, *ends], notes=fit.notes, proofs=[proof], details=_rank(fit))


def _gguf(work: _Work) -> Handover:
    only, proofs, notes, details = work.order.only, [], list[str](), dict[str, Any]()
    conversions: list[str] = []
    if only != "adapter":
        merged, report = _merged_gguf(work)
        conversions += merged.notes
        proofs += [*merged.report.lines()[1:-1], *report.lines()[:-1]]
        details["model"] = report.to_dict()
    try:
        alone = _adapter_gguf(work) if only != "model" else None
    except RequestError as error:
        if only == "adapter":
            raise
        alone = None
        notes.append(f"no GGUF of the adapter alone: {error}")
    if alone is not None:
        proofs += alone.lines()[:-1]
        details["adapter_alone"] = alone.to_dict()
    work.write_readme(instructions.gguf(work.name, str(work.read.path), only != "adapter", alone is not None))
    return work.done(conversions=conversions, notes=notes, proofs=proofs, details=details)


def _ollama(work: _Work) -> Handover:
    from lofi.export.ollama import bos_of

    folder = _folder_of(work.base, given=True)
    assert folder is not None
    files: tuple[str, str | None] = (_MODEL, None)
    if work.order.only == "adapter":
        files, conversions = (_BASE, _ADAPTER), list[str]()
        report = _model_gguf(folder, work, _BASE)
        proofs = [*report.lines()[:-1], *_adapter_gguf(work).lines()[:-1]]
    else:
        merged, report = _merged_gguf(work)
        proofs, conversions = [*merged.report.lines()[1:-1], *report.lines()[:-1]], merged.notes
    written = _modelfile(work.read, folder, work.order, adds_bos=bos_of(work.aside / files[0]), files=files)
    write_text(work.aside / "Modelfile", written.text)
    work.write_readme(instructions.ollama(work.name, str(work.read.path), written.notes))
    return work.done(conversions=conversions, notes=written.notes, proofs=proofs, details={"model": report.to_dict()})


def _merged_gguf(work: _Work) -> tuple[Merged, Any]:
    """The GGUF of the merged model; the merged folder itself goes again."""
    room = work.aside / "merged"
    merged = _merge(work, room)
    report = _model_gguf(room, work, _MODEL)
    shutil.rmtree(room)
    return merged, report


def _model_gguf(folder: Path, work: _Work, name: str) -> Any:
    from lofi.export.gguf_model import write_model_gguf

    report = write_model_gguf(folder, work.aside / name, dtype=work.order.dtype or "f16", name=work.name)
    source = str(work.base) if name == _BASE else f"{work.base} with {work.read.path}"
    return replace(report, output=str(work.output / name), source=source)


def _adapter_gguf(work: _Work) -> Any:
    from lofi.export.gguf_adapter import write_adapter_gguf

    dtype = "f16" if work.order.dtype in (None, "q8_0") else work.order.dtype  # factors are small: 8 bits save nothing
    report = write_adapter_gguf(work.read.path, work.base, work.aside / _ADAPTER, dtype=str(dtype))
    return replace(report, output=str(work.output / _ADAPTER))


def _modelfile(
    read: AdapterFolder,
    folder: Path,
    order: Order,
    *,
    adds_bos: bool,
    files: tuple[str, str | None] = (_MODEL, None),
) -> Any:
    from lofi.export.ollama import modelfile
    from lofi.models.load import load_tokenizer

    tokenizer, stored = load_tokenizer(folder), read.record.get("text_format")
    rule = TextFormat.from_dict(stored, tokenizer) if stored else TextFormat.for_tokenizer(tokenizer)
    generation, _ = generation_config(folder, stored)
    config = _config(folder)
    context = (config.get("text_config") or config).get("max_position_embeddings") or config.get("n_positions")
    return modelfile(
        rule,
        generation,
        model=files[0],
        adapter=files[1],
        adds_bos=adds_bos,
        context=context,
        template=order.template,
    )


# -- what is given -----------------------------------------------------------------------------------------------------


def base_of(read: AdapterFolder, model: str | Path | None) -> str:
    """The base of an adapter: the one given, else the one that lofi.json names.

    Raises  RequestError where none is named
    """
    if model is not None:
        return str(model)
    if not _named(read):
        raise RequestError(f"{read.path} does not say where its base is; give it with --model")
    return str(read.record["base"]["path"])


def _named(read: AdapterFolder) -> bool:
    return bool((read.record.get("base") or {}).get("path"))


def _folder_of(base: str, *, given: bool) -> Path | None:
    """The base's folder; None where it is only named and not here."""
    from lofi.merge.source import base_folder

    try:
        return base_folder(base)
    except LofiError:
        if given:
            raise
        return None


def _config(folder: Path) -> dict[str, Any]:
    from lofi.models.folder import read_config

    return read_config(folder)


def _rank(fit: Any) -> dict[str, Any]:
    return {"rank": fit.rank, "max_lora_rank": fit.max_lora_rank}


def _refuse_place(output: str | Path, read: AdapterFolder, base: str) -> None:
    """Raise RequestError for an output in what is given, LofiError for a folder of something else."""
    target = Path(output).resolve()
    for what, given in (("base", Path(base)), ("adapter", read.path)):
        source = given.resolve()
        if given.exists() and (target == source or source in target.parents or target in source.parents):
            raise RequestError(f"output {output} is, holds or lies in the {what}'s folder {given}; choose another")
    names = {p.name for p in Path(output).glob("*")}
    if not names & {MADE_BY, FILE}:
        refuse_foreign(output, (), f"a hand-over (it has no {MADE_BY})")


def _gguf_refusals(read: AdapterFolder, base: Path, order: Order) -> list[str]:
    """Why llama.cpp would not take the base's family, or the adapter alone where that is asked for."""
    from lofi.export.gguf_adapter import write_adapter_gguf
    from lofi.export.gguf_model import open_folder

    quantized = bool(_config(base).get("quantization_config"))
    found = [] if quantized and order.only != "adapter" else _sentence_of(lambda: open_folder(base))
    if order.only != "adapter" or found:
        return found
    with tempfile.TemporaryDirectory() as room:
        return _sentence_of(lambda: write_adapter_gguf(read.path, base, Path(room) / _ADAPTER, dtype="f32"))


def _sentence_of(attempt: Any) -> list[str]:
    try:
        attempt()
    except LofiError as error:
        return [str(error)]
    return []
