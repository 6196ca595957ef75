"""Merging an adapter into quantized weights: what share of its gain each form keeps."""

from __future__ import annotations

from typing import Any

from results.lab import Lab, Section
from results.quantized import jobs

ADAPTERS = ("lora", "qlora")


def run(lab: Lab) -> Section:
    job, rows = jobs(lab)[0], []
    for method in ADAPTERS:
        adapter = job.train(lab, method, 0) / "adapter"
        answer = lab.lofi(
            "merge", "--model", job.model, "--adapter", adapter, "--output", lab.work / f"requantized-{method}",
            "--into", "nf4", "--compare", "--data", lab.data(job.data, "test"), *job.columns,
        )  # fmt: skip
        rows += [_row(method, form, figures) for form, figures in _forms(answer).items()]
    return Section(
        "Merging into quantized weights",
        "lofi-tiny with the adapters of seed 0 above, merged into every form that lofi knows. The gain is what the "
        "adapter takes off the loss of english_quotes' test rows; share kept with its 95 % bootstrap interval over "
        "rows, KL divergence from base + adapter, how often the likeliest next token is the same. Compensated "
        "rounding sees the layers' inputs on rows that are set apart and not measured on.",
        ["adapter", "merged into", "share of gain kept", "KL", "same next token", "weights, MB"],
        rows,
    )


def _forms(answer: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of the forms that were measured in memory: form -> metric -> row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in answer["results"]:
        found.setdefault(row["who"], {})[row["metric"]] = row
    return {form: figures for form, figures in found.items() if "weight_bytes" in figures}


def _row(method: str, form: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    share = figures["share_kept"]
    kept = (
        "no gain to keep"
        if share["value"] is None
        else f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
    )
    return [
        method,
        form,
        kept,
        f"{figures['kl']['value']:.3g}",
        f"{figures['top1_agreement']['value']:.3f}",
        f"{figures['weight_bytes']['value'] / 1e6:.1f}",
    ]
