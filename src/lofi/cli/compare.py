"""`lofi compare`: a study's runs under one protocol, and which of them to take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError


def compare(
    words: Annotated[
        list[str],
        typer.Argument(metavar="STUDY.yaml [key=value ...]", help="A study, and values that replace its own."),
    ],
    output: Annotated[
        str, typer.Option("--output", help="Folder to write into; the same one goes on.", metavar="FOLDER")
    ],
    jobs: Annotated[int, typer.Option("--jobs", help="Runs at once, with the threads divided.", min=1)] = 1,
    as_json: flags.Json = False,
) -> None:
    """Train and judge every run of a study alike, and say which method to take: methods, ranks, targets, seeds.

    A study holds base (a recipe without output), grid (recipe keys with lists of values; seed is train.seed), metrics,
    and if wanted arms, evaluate, general (held-out text: forgetting) and keep. The folder receives results.csv,
    results.jsonl, report.html and a folder a run. A study that was stopped goes on where it was; a failed run leaves
    the others alone and makes the exit code 1.

    \b
    Examples:
      lofi compare study.yaml --output studies/first
      lofi compare study.yaml grid.lora.r=[4,16] train.epochs=1 --output studies/short --json
    """
    study = _study(words)
    with speaking(as_json) as out:
        from lofi.study.run import compare as run_study

        result = run_study(study, output, jobs=jobs, on_event=out.note)
        said = Said.of(result)
        out.answer(said.answer())
        out.show(*said.shown())
    if result.failed:
        raise typer.Exit(1)


def _study(words: list[str]) -> Any:
    from pathlib import Path

    from lofi.demo.shipped import with_shipped
    from lofi.study.spec import Study, load_study

    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) != 1:
        told = f"{files[1]!r} is a second study or no key=value" if files else "there is no study among the words"
        raise RecipeError(f"{told}; give one study.yaml, then key=value")
    study = load_study(files[0], [word for word in words if word not in files])
    return Study.model_validate(with_shipped(study.model_dump()))


class Said:
    """A finished study in words: as the object of --json, and for people."""

    def __init__(self, result: Any, statistics: Any, verdict: str | None) -> None:
        self.result, self.statistics, self.verdict = result, statistics, verdict

    @classmethod
    def of(cls, result: Any) -> Said:
        from lofi.study.statistics import summarise
        from lofi.study.verdict import verdict

        if not result.records:
            return cls(result, None, None)
        statistics = summarise(result.records)
        return cls(result, statistics, verdict(statistics).words)

    def answer(self) -> dict[str, Any]:
        """The object: figures as rows, the runs, the verdict, and where the page is."""
        from lofi.study.tables import result_rows

        rows = result_rows(self.statistics) if self.statistics is not None else self.result.latency
        runs = [record.to_dict() for record in self.result.records]
        for run in runs:
            del run["curve"], run["eval_curve"]  # they are in results.jsonl
        return {
            "results": rows,
            "runs": runs,
            "verdict": self.verdict,
            "notes": self.result.notes,
            "report": str(self.result.report),
        }

    def shown(self) -> list[Any]:
        """The table, the verdict, what failed, and where the page is."""
        lines = [] if self.statistics is not None else [_latency_table(self.result.latency)]
        if self.statistics is not None:
            lines += [_table(self.statistics), self.verdict]
        lines += [f"{record.name} failed: {record.error}" for record in self.result.failed]
        return [*lines, *self.result.notes, f"report: {self.result.report}"]


def _table(statistics: Any) -> Any:
    """Arms with their figures; intervals over seeds and examples in brackets; a figure that nobody has is left out."""
    from rich.table import Table

    figures = [(key, name) for key, name in FIGURES if any(arm.figure(key) is not None for arm in statistics.arms)]
    shown = Table(title="figures, with 95 % intervals over seeds and examples", title_justify="left")
    for place, head in enumerate(("arm", "seeds", *statistics.metrics, *(name for _, name in figures))):
        shown.add_column(head, justify="right" if place else "left")
    for arm in statistics.arms:
        scores = [_score(arm.scores.get(metric)) for metric in statistics.metrics]
        shown.add_row(arm.name, str(arm.n_seeds), *scores, *(_figure(arm.figure(key)) for key, _ in figures))
    return shown


FIGURES = (
    ("trainable", "trainable"),
    ("adapter_mb", "MB"),
    ("peak_mb", "peak MB"),
    ("tokens_per_second", "tokens/s"),
    ("forgetting", "forgetting"),
)


def _score(score: Any) -> str:
    if score is None:
        return ""
    interval = "" if score.low is None else f" [{_figure(score.low)}, {_figure(score.high)}]"
    return _figure(score.value) + interval


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def _latency_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table("batch", "sequence", "who", "ms", "times the base", title="latency, medians", title_justify="left")
    for row in rows:
        ms = f"{row['ms']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        shown.add_row(str(row["batch"]), str(row["sequence"]), row["who"], ms, ratio)
    return shown
