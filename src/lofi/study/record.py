"""What one run of a study leaves: its figures, its counts per example, its loss curves, on disk and in memory.

    runs/NAME/record.json           everything but the counts; written last, so a run with it is a finished one
    runs/NAME/measures.safetensors  metric -> additive counts per example, float64 (N, K)

Knows the form of a record and the statistics by name. Knows not how a run is made (`worker`) nor what the records say
together (`statistics`). Rejected: only the values of the metrics (no interval over examples, no paired test), and
pickled functions in place of their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lofi.errors import AdapterFileError, LofiError
from lofi.evaluate import labels, text
from lofi.evaluate.intervals import Array, Statistic, exp_ratio, mean, ratio
from lofi.files.atomic import disk_errors, write_json

FORMAT = 1
RUNS = "runs"
RECORD, MEASURES = "record.json", "measures.safetensors"
BASE = "base"
"""The name, arm and method of the untouched model's record."""

STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "ratio": ratio,
    "exp_ratio": exp_ratio,
    "bleu": text.bleu_of_sums,
    "chrf": text.chrf_of_sums,
    "f1": labels.f1_of_sums,
    "macro_f1": labels.macro_f1_of_sums,
    "micro_f1": labels.micro_f1_of_sums,
}
"""The functions of summed counts (..., K) -> (...) by the name that records give them."""

FIGURES = (
    *("trainable", "total", "adapter_mb", "peak_mb", "tokens_per_second", "train_seconds", "tokens"),
    *("latency_ms", "latency_merged_ms", "latency_base_ms"),
    *("general_ppl", "general_ppl_base", "train_loss", "eval_loss"),
)
"""The figures of every record; None where a run has none (merged latency of a method that cannot merge)."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric before it is a figure: counts per example (N, K), float64, and the name of the function of their sum."""

    rows: Array
    statistic: str

    @property
    def value(self) -> float:
        """The figure over all examples."""
        return float(STATISTICS[self.statistic](self.rows.sum(0)))

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """One run of a study; `arm` is the run without its seed, and the base's record has arm and method "base"."""

    name: str
    arm: str
    method: str
    seed: int | None
    overrides: dict[str, Any] = field(default_factory=dict)
    """The dotted recipe keys that make this run, `train.seed` included."""
    status: str = "done"
    """done or failed"""
    error: str | None = None
    """Why it failed, one sentence."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """One value for each of FIGURES: counts, megabytes (10^6 bytes), tokens a second, seconds, milliseconds,
    perplexities, losses in nats a token."""
    measures: dict[str, Measured] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, training loss)"""
    eval_curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss)"""
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know, such as a run that was stopped and went on."""

    @property
    def done(self) -> bool:
        return self.status == "done"

    def value(self, metric: str) -> float:
        """One metric over all examples; KeyError where the run has none."""
        return self.measures[metric].value

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the counts per example: a line of results.jsonl."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "measures"}
        found["figures"] = {key: _finite(self.figures.get(key)) for key in FIGURES}
        metrics = {name: {"value": _finite(one.value), "n": one.n} for name, one in self.measures.items()}
        return found | {"curve": _pairs(self.curve), "eval_curve": _pairs(self.eval_curve), "metrics": metrics}


def statistic_name(statistic: Statistic) -> str:
    """The name under which a function of sums is stored.

    Raises  LofiError for a function that STATISTICS does not have
    """
    for name, known in STATISTICS.items():
        if known is statistic:
            return name
    raise LofiError(f"{getattr(statistic, '__name__', statistic)} is no statistic with a name; add it to STATISTICS")


def measured(measures: Mapping[str, Any]) -> dict[str, Measured]:
    """The measures of an evaluation (lofi.evaluate's `Measure`s) in the form that records hold."""
    return {name: Measured(one.rows, statistic_name(one.statistic)) for name, one in measures.items()}


def write_record(record: RunRecord, folder: str | Path) -> Path:
    """Write a record into its run's folder (`runs/NAME` of the study's), the counts first; the path of record.json.

    Raises  LofiError when the disk is full
    Exact   the counts bit for bit; a figure that is not finite becomes null, for JSON has none
    """
    import torch

    from lofi.files.tensors import save_safetensors

    folder = Path(folder)
    path = folder / RECORD
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an old record must not stand beside new counts
    save_safetensors(folder / MEASURES, {name: torch.as_tensor(one.rows) for name, one in record.measures.items()})
    kinds = {name: {"statistic": one.statistic, "shape": list(one.rows.shape)} for name, one in record.measures.items()}
    write_json(path, {"format": FORMAT} | record.to_dict() | {"measures": kinds})
    return path


def read_record(folder: str | Path) -> RunRecord:
    """Read a run's record back.

    Raises  AdapterFileError naming the folder where the record or the counts are missing, torn, or do not agree
    """
    folder = Path(folder)
    try:
        stored = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        known = {f.name for f in fields(RunRecord)}
        given = {key: value for key, value in stored.items() if key in known}
        kinds = given.pop("measures")
        given |= {key: [(int(step), float(loss)) for step, loss in given[key]] for key in ("curve", "eval_curve")}
        return RunRecord(**given, measures=_counts(folder, kinds))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AdapterFileError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterFileError(
            f"{folder} holds an unreadable run ({told.rstrip('.')}); remove that folder and run the study again"
        ) from None


def load_records(output: str | Path) -> list[RunRecord]:
    """The records of a study's output folder, in the study's order, the base first; runs without a record are left out.

    Raises  AdapterFileError for a record that cannot be read
    """
    return [read_record(folder) for folder in _ordered(Path(output)) if (folder / RECORD).is_file()]


def _ordered(output: Path) -> list[Path]:
    """The run folders, as study.json orders them, others behind by name."""
    order: list[str] = []
    if (output / "study.json").is_file():
        order = [BASE, *json.loads((output / "study.json").read_text(encoding="utf-8"))["runs"]]
    places = {name: place for place, name in enumerate(order or [BASE])}
    found = [p for p in (output / RUNS).iterdir() if p.is_dir()] if (output / RUNS).is_dir() else []
    return sorted(found, key=lambda p: (places.get(p.name, len(places)), p.name))


def _counts(folder: Path, kinds: Mapping[str, Any]) -> dict[str, Measured]:
    from lofi.files.tensors import read_safetensors

    tables = {name: tensor.numpy() for name, tensor in read_safetensors(folder / MEASURES).items()}
    wanted = {name: tuple(kind["shape"]) for name, kind in kinds.items()}
    if {name: table.shape for name, table in tables.items()} != wanted:
        raise AdapterFileError(f"{MEASURES} does not belong to {RECORD}")
    unknown = sorted({kind["statistic"] for kind in kinds.values()} - set(STATISTICS))
    if unknown:
        raise AdapterFileError(f"statistic {unknown[0]} is not known to this version")
    return {name: Measured(tables[name], kind["statistic"]) for name, kind in kinds.items()}


def _pairs(curve: Iterable[tuple[int, float]]) -> list[list[float]]:
    return [[step, loss] for step, loss in curve]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
