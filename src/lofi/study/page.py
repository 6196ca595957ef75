"""report.html and results.csv of a study: the verdict, the table, the pictures, the protocol, on one page.

The page is one file: nothing is loaded from outside, it works from a disk, on a phone, in light and dark, and without
its few lines of script, which only sort the table. Knows a study, its records and what they say. Knows not how they
were made. Rejected: a table library and a plotting library (a page of megabytes that a strict browser refuses).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi.files.atomic import write_text
from lofi.files.provenance import versions
from lofi.study.plots import further_plots, plots
from lofi.study.record import RunRecord
from lofi.study.statistics import RESAMPLES, Statistics, summarise
from lofi.study.tables import as_csv, columns, ordered, tests
from lofi.study.verdict import verdict
from lofi.study.wording import count, listing, metric_label, plural

REPORT, TABLE = "report.html", "results.csv"


def write_outputs(study: Any, records: Sequence[RunRecord], output: str | Path, *, notes: Sequence[str] = ()) -> Path:
    """Write results.csv and report.html of a study's records into its folder, each atomically; the page's path.

    study   a Study: what it asked for stands on the page, with the command that repeats it
    notes   what a reader must know of the study as a whole
    Raises  LofiError when the disk is full
    """
    output = Path(output)
    statistics = summarise(records)
    write_text(output / TABLE, as_csv(statistics))
    write_text(output / REPORT, study_page(study, statistics, records, output=output.name, notes=notes))
    return output / REPORT


def study_page(
    study: Any,
    statistics: Statistics,
    records: Sequence[RunRecord],
    *,
    output: str = "study",
    notes: Sequence[str] = (),
) -> str:
    """The page of a study of kind quality."""
    found = verdict(statistics)
    return render(
        "study.html.j2",
        title=title_of(study, statistics),
        verdict=found,
        columns=columns(statistics),
        names=[arm.name for arm in ordered(statistics)],
        plots=plots(statistics, records),
        further=further_plots(statistics),
        tests=tests(statistics),
        failures=statistics.failures,
        notes=[*_notes(statistics, records), *notes],
        protocol=list(_protocol(study, statistics, records)),
        machine=machine(),
        recipe=as_yaml(study),
        command=f"lofi compare study.yaml --output {output}",
    )


def render(template: str, **values: Any) -> str:
    """A template of this room, everything in it escaped."""
    import jinja2

    folder = Path(__file__).with_name("templates")
    loader = jinja2.FileSystemLoader(folder)
    known = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return known.get_template(template).render(**values)


def title_of(study: Any, statistics: Statistics) -> str:
    """ "7 arms on dialogs.jsonl"."""
    data = study.base.get("data.train")
    on = f" on {Path(str(data)).name}" if data else ""
    return plural(len([arm for arm in statistics.arms if arm.method != "base"]), "arm") + on


def _notes(statistics: Statistics, records: Sequence[RunRecord]) -> Iterator[str]:
    """How to read the table, and what the runs said about themselves."""
    arms = statistics.trained
    if any(arm.n_seeds == 1 for arm in arms):
        yield "An arm with one seed: its interval is over test rows only, not over training runs."
    if any(arm.n_seeds == 2 for arm in arms):
        yield "An arm with two seeds: its interval is wide, for two runs say little about a third."
    if any(arm.n_seeds > 1 for arm in arms):
        yield "Intervals are over test rows (resampled, the same for all) and seeds (Student's t)."
    full = f" ({statistics.full})" if statistics.full not in (None, "full") else ""
    yield (
        f"▲ better, ▼ worse than full fine-tuning{full} or the base: paired tests, p < 0.05 after Holm's correction "
        f"over the arms of a metric. No mark: not told apart. {RESAMPLES:,} resamples."
    )
    yield from run_notes(records)


def run_notes(records: Sequence[RunRecord]) -> Iterator[str]:
    """What runs said about themselves: once where several say it, without names where all that are done do."""
    said: dict[str, list[str]] = {}
    for run in records:
        for note in dict.fromkeys(run.notes):
            said.setdefault(note, []).append(run.name)
    everyone = sum(run.done for run in records)
    for note, names in said.items():
        yield note if len(names) == everyone > 1 else f"{listing(names)}: {note}"


def _protocol(study: Any, statistics: Statistics, records: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """(what, how) of everything that all runs had in common, and what varied."""
    base: Mapping[str, Any] = study.base
    tested = base.get("data.test") or base.get("data.validation")
    rows = next((score.rows for arm in statistics.arms for score in arm.scores.values()), None)
    tokens = [run.figures.get("tokens") for run in records if run.figures.get("tokens")]
    seeds = sorted({run.seed for run in records if run.seed is not None})
    for what, how in (
        ("model", base.get("model")),
        ("trained on", base.get("data.train")),
        ("measured on", f"{tested or 'the rows kept for it'}" + (f", {plural(rows, 'row')}" if rows else "")),
        ("metrics", ", ".join(map(metric_label, statistics.metrics))),
        ("general text", study.general),
        ("budget", _budget(base)),
        ("trained tokens a run", _range(tokens)),
        ("seeds", ", ".join(map(str, seeds))),
        ("varied", "; ".join(f"{key}: {_values(values)}" for key, values in study.grid.items())),
        ("named arms", listing([arm.name for arm in study.arms], 20)),
    ):
        if how:
            yield what, str(how)


def _budget(base: Mapping[str, Any]) -> str:
    """The training keys that the base sets."""
    return ", ".join(f"{key.removeprefix('train.')} {value}" for key, value in base.items() if key.startswith("train."))


def _values(values: Sequence[Any]) -> str:
    return ", ".join("+".join(map(str, one)) if isinstance(one, list) else str(one) for one in values)


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    low, high = (count(min(known)), count(max(known))) if known else ("", "")
    return low if low == high else f"{low} to {high}"


def machine() -> list[tuple[str, str]]:
    """What this was made on: cores, memory, system, versions."""
    import psutil

    memory = psutil.virtual_memory().total / 1e9
    made = {"lofi": _lofi_version(), **versions()}
    return [
        ("machine", f"{plural(os.cpu_count() or 1, 'core')} ({platform.machine()}), {memory:.0f} GB of memory"),
        ("system", f"{platform.system()} {platform.release()}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.items())),
    ]


def _lofi_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lofi")
    except PackageNotFoundError:
        return "(not installed)"


def as_yaml(study: Any) -> str:
    """The study as a file that asks for the same: what differs from the defaults, keys dotted."""
    import yaml

    values = study.model_dump(mode="json", exclude_defaults=True)
    if "arms" in values:
        values["arms"] = [{"name": arm["name"]} | arm.get("overrides", {}) for arm in values["arms"]]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
