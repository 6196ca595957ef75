"""Merging on disk: a base folder and an adapter folder become a new model folder, proved before it takes its place.

The base is opened once (its files mapped, not copied), asked the probes with and without the adapter, and closed; the
merged model is then opened from the files just written and asked the same. Nothing given is ever changed. Where the
base's files cannot be rewritten key by key (fused experts, a new head, an adapted tied weight), the open model is
merged and saved by transformers.
"""

from __future__ import annotations

import fnmatch
import gc
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lofi.errors import LofiWarning, ModelError, RequestError
from lofi.files.adapter_folder import AdapterFolder, load_adapter, read_folder
from lofi.files.atomic import atomic_folder, refuse_foreign, write_json
from lofi.files.layout import read_header
from lofi.merge.probes import Probes, data_probes, random_probes
from lofi.merge.report import FILE, MergeReport
from lofi.merge.shards import changes, plan_shards, weight_files, write_shards
from lofi.merge.verdict import Measured, Verdict, judge, measure, refuse_below

_NAME = "merged"
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack"),
    *("*.onnx", "*.gguf", "*.ot", "README.md", ".*", "training_args.*", "lofi.json", FILE),
)


def merge_folder(
    base_path: str | Path,
    adapter_path: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    min_kept: float | None = None,
) -> MergeReport:
    """Write base + adapter as one plain model folder, then open it and compare it with what it came from.

    W = W0 + (alpha / r) B A   LoRA (arXiv 2106.09685), sec. 4.1; summed in float32, rounded once to W0's own dtype
    Tokenizer, chat template and generation config are the base's. `data` (its `columns` mapped as load_records does)
    gives held-out examples for the share of the adapter's gain kept; `min_kept` refuses below that share, and nothing
    is then written.
    Memory  while writing, one tensor and its update (the base's files are mapped)
    Raises  RequestError, ModelError, AdapterFileError; ProofError for another base, a lossy merge or NaN;
            LofiError when the disk refuses. What was at `output` is then unchanged
    """
    _check(base_path, adapter_path, output, data, min_kept)
    read = read_folder(adapter_path)
    folder = _base_folder(base_path)
    if FILE not in (p.name for p in Path(output).glob("*")):
        refuse_foreign(output, (), "a merged model (it has no " + FILE + ")")
    model = _open(folder, read)
    probes = _probes(model, folder, read, data, columns)
    with_adapter, alone = _measure_both(model, probes)
    with atomic_folder(output) as aside:
        road, changed, notes = _write(model, folder, aside)
        del model
        gc.collect()  # modules are cycles: the base's pages go before the merged model's come
        verdict = judge(alone, with_adapter, _measure_merged(aside, read, probes), probes)
        refuse_below(verdict, min_kept)
        _warn_if_lost(verdict)
        report = MergeReport(str(output), str(base_path), str(adapter_path), road, changed, verdict, notes)
        write_json(aside / FILE, report.to_dict())
    return report


def _check(base: Any, adapter: Any, output: Any, data: Any, min_kept: float | None) -> None:
    if min_kept is not None and not 0 <= min_kept <= 1:
        raise RequestError(f"min_kept is {min_kept}, expected a share from 0 to 1, such as 0.95")
    if min_kept is not None and data is None:
        raise RequestError("min_kept needs data: the share of the gain kept is measured on held-out examples")
    target = Path(output).resolve()
    for what, given in (("base", base), ("adapter", adapter)):
        source = Path(given).resolve()
        if target == source or source in target.parents or (source.exists() and target in source.parents):
            raise RequestError(
                f"output {output} is, holds or lies in the {what}'s folder {given}, which a merge never changes; "
                "choose another output"
            )


def _base_folder(base_path: str | Path) -> Path:
    from lofi.models.folder import local_folder

    folder = local_folder(base_path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors*", "*.json", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(str(base_path), allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"{base_path} is no folder and could not be fetched from the hub ({error})") from error


def _open(folder: Path, read: AdapterFolder) -> Any:
    """The base with the adapter on it, in the base's own dtype, on the CPU."""
    from lofi.models.load import load_model

    model = load_model(folder, device="cpu", **_task_options(read))
    load_adapter(model, read.path, _NAME)
    return model


def _task_options(read: AdapterFolder) -> dict[str, Any]:
    task, labels = read.config.task_type, read.record.get("labels")
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return {"task": task}
    if labels:
        return {"task": task, "labels": [str(label) for label in labels]}
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    rows = next((len(t) for key, t in read.tensors.items() if key.endswith(heads)), None)
    return {"task": task, "num_labels": rows}


def _probes(
    model: Any, folder: Path, read: AdapterFolder, data: str | Path | None, columns: Mapping[str, str] | None
) -> Probes:
    if data is None:
        return random_probes(model)
    return data_probes(data, folder, task=read.config.task_type, record=read.record, columns=columns)


def _measure_both(model: Any, probes: Probes) -> tuple[Measured, Measured]:
    from lofi.adapters.switch import adapters_off

    with adapters_off(model):
        alone = measure(model, probes)
    return measure(model, probes), alone


def _measure_merged(folder: Path, read: AdapterFolder, probes: Probes) -> Measured:
    from lofi.models.load import load_model

    task = read.config.task_type
    merged = load_model(folder, device="cpu", task=task)
    if merged.lofi_new_tensors:
        raise ModelError(f"the merged model lacks {', '.join(merged.lofi_new_tensors)}; please report this")
    return measure(merged, probes)


def _write(model: Any, folder: Path, aside: Path) -> tuple[str, int, list[str]]:
    plan = plan_shards(model, _NAME, folder)
    if plan is not None:
        changed = write_shards(plan, folder, aside)
        _copy_rest(folder, aside, keep=())
        return "shard by shard", changed, []
    changed = len(changes(model, _NAME))
    notes = _save_loaded(model, aside)
    _copy_rest(folder, aside, keep=("config.json",))
    return (
        "through the loaded model, whose files hold these tensors in another form",
        changed,
        [
            *notes,
            *_cast_notes(folder, aside),
        ],
    )


def _save_loaded(model: Any, aside: Path) -> list[str]:
    from lofi.adapters.merge import merge_in_memory

    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    merged: Any = merge_in_memory(model, _NAME, inplace=True)
    merged.save_pretrained(aside)
    if tied and not getattr(merged.config, "tie_word_embeddings", False):
        return ["the adapter parted weights that were tied: both are written and tie_word_embeddings is false"]
    return []


def _cast_notes(folder: Path, aside: Path) -> list[str]:
    """Tensors whose dtype transformers changed while loading the base."""
    before = {e.name: e.dtype for file in weight_files(folder) for e in read_header(file).entries}
    after = {e.name: e.dtype for file in weight_files(aside) for e in read_header(file).entries}
    cast = [name for name in before if name in after and before[name] != after[name]]
    if not cast:
        return []
    first = cast[0]
    return [f"{len(cast)} tensors were cast by transformers, first: {first} from {before[first]} to {after[first]}"]


def _copy_rest(folder: Path, aside: Path, *, keep: tuple[str, ...]) -> None:
    """Config, generation config, tokenizer, template: every file of the base that holds no weights."""
    for path in sorted(folder.iterdir()):
        unwanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_COPIED)
        if path.is_file() and not unwanted and path.name not in keep:
            shutil.copyfile(path, aside / path.name)


def _warn_if_lost(verdict: Verdict) -> None:
    if verdict.mean_logit_error >= verdict.adapter_effect:
        warnings.warn(
            f"the merged model is as far from base + adapter (mean logit error {verdict.mean_logit_error:.3g}) as the "
            f"base is ({verdict.adapter_effect:.3g}): the base's dtype rounds this adapter away",
            LofiWarning,
            stacklevel=3,
        )
