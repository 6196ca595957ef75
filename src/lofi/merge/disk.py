"""Merging on disk: a base folder and an adapter folder become a new model folder, proved before it takes its place.

The base is opened (its files mapped, not copied), asked the probes with and without the adapter, and closed; the merged
model is then opened from the files just written and asked the same. Nothing given is ever changed. A dense base's files
are rewritten key by key where they can be; where they cannot (fused experts, a new head, an adapted tied weight), and
for every quantized form, the open model is merged and saved by transformers.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lofi.adapters.merge import unmergeable
from lofi.errors import LofiWarning, RequestError
from lofi.files.adapter_folder import read_folder
from lofi.files.atomic import atomic_folder, refuse_foreign, write_json
from lofi.files.quantized import in_words
from lofi.merge.alternatives import Alternative, Trials, better, forms_to_compare, keeps_more, recommend
from lofi.merge.calibration import Calibration, from_examples, written
from lofi.merge.form import Form
from lofi.merge.packed import Packed
from lofi.merge.probes import Probes, data_probes, random_probes
from lofi.merge.report import FILE, MergeReport
from lofi.merge.source import Source, base_folder
from lofi.merge.verdict import Verdict, refuse_below
from lofi.merge.writing import save_model, write_dense


def merge_folder(
    base_path: str | Path,
    adapter_path: str | Path,
    output: str | Path,
    *,
    form: Form = Form(),  # noqa: B008  (frozen)
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    min_kept: float | None = None,
    compare: bool = False,
) -> MergeReport:
    """Write base + adapter as one model folder, then open it and compare it with what it came from.

    W = W0 + (alpha / r) B A   LoRA (arXiv 2106.09685), sec. 4.1; summed in float32, rounded once: to W0's own dtype, or
    to nf4 or int8 as `form` says (quant/requantize.py)
    Tokenizer, chat template and generation config are the base's. `data` (its `columns` mapped as load_records does)
    gives held-out examples for the share of the adapter's gain kept; some are set apart to calibrate on where `form`
    needs that. `min_kept` refuses below that share, and nothing is then written. `compare` measures every other form in
    memory as well. Figures compare with the base as the adapter was trained on it, where that can be had.
    Memory  while a dense base is rewritten, one tensor and its update (the files are mapped); else the merged model
    Raises  RequestError (also for a method that no weight can hold), ModelError, AdapterFileError; ProofError for
            another base, a lossy merge or NaN; LofiError when the disk refuses. What was at `output` is then unchanged
    """
    _check(base_path, adapter_path, output, data, min_kept)
    source = _source(base_path, adapter_path, form)
    if FILE not in (p.name for p in Path(output).glob("*")):
        refuse_foreign(output, (), "a merged model (it has no " + FILE + ")")
    trials = _trials(source, form, data, columns, compare)
    chosen, made, tried = _choose(trials, form, compare)
    with atomic_folder(output) as aside:
        if made is None:
            road, changed, notes = write_dense(source.open(chosen.onto), source.folder, aside)
        else:
            road, changed, notes = _road(chosen, trials), made.changed, made.notes
            save_model(made.model, source.folder, aside)
            made = None
        gc.collect()  # modules are cycles: these pages go before the merged model's come
        verdict = trials.judged(source.measure_merged(aside, trials.probes))
        refuse_below(verdict, min_kept)
        _warn_if_lost(verdict)
        told = [*_onto_notes(source, chosen), *notes, *filter(None, [keeps_more(tried)])]
        what = str(output), str(base_path), str(adapter_path)
        report = MergeReport(*what, chosen, road, changed, verdict, told, tried, recommend(tried, min_kept))
        write_json(aside / FILE, report.to_dict())
    return report


def _source(base_path: str | Path, adapter_path: str | Path, form: Form) -> Source:
    from lofi.models.folder import read_config
    from lofi.models.quantization import held_kind

    read = read_folder(adapter_path)
    reason = read.config.why_unmergeable()
    if reason is not None:
        raise RequestError(unmergeable(f"the {read.config.method} adapter in {adapter_path}", reason))
    folder = base_folder(base_path)
    source = Source(folder, read, held_kind(read_config(folder).get("quantization_config"), str(folder)))
    source.quantization(form.onto)  # refused before anything is opened
    return source


def _trials(
    source: Source, form: Form, data: str | Path | None, columns: Mapping[str, str] | None, compare: bool
) -> Trials:
    calibrate = form.calibrates or compare
    model = source.open(form.onto)
    probes = _probes(model, source, data, columns, calibrate)
    calibration = _calibration(model, source, probes) if calibrate else None
    del model
    gc.collect()
    return Trials(source, probes, calibration, *source.measure(probes))


def _probes(
    model: Any, source: Source, data: str | Path | None, columns: Mapping[str, str] | None, calibrate: bool
) -> Probes:
    if data is None:
        return random_probes(model)
    read = source.read
    return data_probes(
        data, source.folder, task=read.config.task_type, record=read.record, columns=columns, calibrate=calibrate
    )


def _calibration(model: Any, source: Source, probes: Probes) -> Calibration:
    if probes.calibration:
        return from_examples(model, probes.calibration, f"{probes.source}, set apart")
    golden = (source.read.record.get("golden") or {}).get("prompts", ())
    return written(model, [prompt["ids"] for prompt in golden])


def _choose(trials: Trials, form: Form, compare: bool) -> tuple[Form, Packed | None, list[Alternative]]:
    """The form to write, its model where it is in memory already, and what was measured on the way."""
    both = trials.source.has_both and form.onto == "auto"
    others = forms_to_compare(form, trials.source) if compare else []
    if form.into == "dense":
        if both and not compare:
            others = [Form(onto=onto) for onto in ("original", "dequantized")]
        chosen = replace(form, onto="original") if both else form
        return chosen, None, [trials.measured(other) for other in others]
    wanted = [replace(form, rounding=rounding) for rounding in form.roundings]
    tried = [trials.measured(other) for other in others if other not in wanted]
    best, made = trials.tried(wanted[0])
    tried.append(best)
    for other in wanted[1:]:
        rival, theirs = trials.tried(other)
        tried.append(rival)
        if better(rival, best) is rival:
            best, made = rival, theirs
    return best.form, made, tried if len(tried) > 1 else []


def _road(form: Form, trials: Trials) -> str:
    seen = f", calibrated on {trials.calibration}" if form.calibrates else ""
    return f"rounded {form.rounding} to {form.into}{seen}"


def _onto_notes(source: Source, form: Form) -> list[str]:
    """Which weights the update went onto, where there is a choice, and what the figures compare with."""
    if not source.has_both:
        return []
    onto = "dequantized" if form.onto == "dequantized" else "original"
    return [
        f"merged onto the {onto} weights; the adapter was trained on {in_words(source.trained_on)}, and figures "
        "compare with base and adapter as trained"
    ]


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


def _warn_if_lost(verdict: Verdict) -> None:
    if verdict.mean_logit_error >= verdict.adapter_effect:
        warnings.warn(
            f"the merged model is as far from base + adapter (mean logit error {verdict.mean_logit_error:.3g}) as the "
            f"base is ({verdict.adapter_effect:.3g}): the base's dtype rounds this adapter away",
            LofiWarning,
            stacklevel=3,
        )
