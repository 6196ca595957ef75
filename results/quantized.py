"""LoRA over bf16, NF4 and int8 bases: what quantizing the base costs in quality, on two models and real data.

Rejected  stories260k as a third (a model of that size loses 2.7 % to NF4 and nobody quantizes it): ten minutes of runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results.encoders import minilm
from results.lab import Lab, Section, figure

SEEDS = (0, 1, 2)
STUDENT = 4.303  # 97.5 % quantile of Student's t with len(SEEDS) - 1 = 2 degrees of freedom
METHODS = {"lora": None, "qlora": "nf4", "int8-lora": "int8"}
WITHIN = 0.02


@dataclass(frozen=True)
class Job:
    """One model on one data set: a recipe, some cut short so that 18 runs take minutes, and the figure that counts."""

    name: str
    model: Path
    data: str
    recipe: str
    changes: tuple[str, ...]
    metric: str
    rows: str
    columns: tuple[str, ...] = ()

    def train(self, lab: Lab, method: str, seed: int) -> Path:
        """The run folder of one method and seed, trained if it is not there yet."""
        words = ("--model", self.model, "--data", lab.data(self.data), "--seed", str(seed), "--method", method)
        output = f"quantized-{self.name}-{method}-{seed}"
        return lab.train(self.recipe, *words, *self.changes, output=output)[1]

    def figures(self, lab: Lab, method: str) -> list[float]:
        """The figure of every seed, each over the base that the adapter was trained on."""
        kind = METHODS[method]
        over = ["--quantization", kind] if kind else []
        found = []
        for seed in SEEDS:
            where, who = lab.subject(self.model, self.train(lab, method, seed))
            data = ("--data", lab.data(self.data, self.rows), *self.columns, "--metrics", self.metric)
            found.append(figure(lab.lofi("evaluate", *where, *over, *data), self.metric, who)["value"])
        return found


def jobs(lab: Lab) -> list[Job]:
    return [
        Job(
            "lofi-tiny", lab.model("lofi-tiny"), "english_quotes", "quotes-lora", (), "perplexity", "test",
            ("--columns", "text=quote"),
        ),
        Job(
            "MiniLM", minilm(), "sentence_polarity", "polarity-lora", ("train.epochs=null", "train.max_steps=150"),
            "accuracy", "test",
        ),
    ]  # fmt: skip


def run(lab: Lab) -> Section:
    rows = []
    for job in jobs(lab):
        found = {method: job.figures(lab, method) for method in METHODS}
        rows += [_row(job, method, found) for method in METHODS]
    return Section(
        "LoRA, QLoRA and int8 LoRA",
        "The same recipe over the base in bf16, in NF4 with double quantization and in int8, three seeds each; the "
        "recipe of MiniLM is cut short. Every figure is measured over the base that the adapter was "
        "trained on. Mean over the seeds with its 95 % interval (Student's t, two degrees of freedom), each seed's "
        "value in brackets; the difference from LoRA is taken seed by seed. "
        f"Goal: within {WITHIN:.0%}.",
        ["model, data", "metric", "method", "mean, interval, seeds", "relative to LoRA", "within the goal"],
        rows,
    )


def _row(job: Job, method: str, found: dict[str, list[float]]) -> list[str]:
    values, plain = found[method], found["lora"]
    cells = [f"{job.name}, {job.data}", job.metric, method]
    cells.append(f"{_mean(values)} ({', '.join(f'{v:.4g}' for v in values)})")
    if method == "lora":
        return [*cells, "", ""]
    relative = [value / other - 1 for value, other in zip(values, plain, strict=True)]
    share = f"{100 * statistics.mean(relative):+.2f} % +- {100 * _half(relative):.2f}"
    met = "yes" if abs(statistics.mean(relative)) <= WITHIN else "**no**"
    return [*cells, share, met]


def _mean(values: Sequence[float]) -> str:
    mean, half = statistics.mean(values), _half(values)
    return f"{mean:.4g} [{mean - half:.4g}, {mean + half:.4g}]"


def _half(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval."""
    return STUDENT * statistics.stdev(values) / len(values) ** 0.5
