"""What an adapter costs when the model answers: examples/studies/latency-small.yaml on this machine's CPU.

Budget  8 minutes with every thread, alone.
"""

from __future__ import annotations

from typing import Any

from results.lab import Lab, Section

STUDY = "examples/studies/latency-small.yaml"
MERGED, WITHIN = "lora-merged", 0.02
ORDER = ("base", "adapter-lin", "houlsby")
"""Table 1 of LoRA (arXiv 2106.09685): Adapter-L is slower than the base, Adapter-H slower still."""


def run(lab: Lab) -> Section:
    answer, _ = lab.compare(STUDY, output="latency")
    rows = answer["results"]
    settings = list(dict.fromkeys((row["batch"], row["sequence"]) for row in rows))
    notes = [note for setting in settings for note in _judged([r for r in rows if _setting(r) == setting])]
    return Section(
        "Latency of a forward pass, GPT-2 medium",
        "Random weights of that shape, bf16; adapters of about 11M parameters (prefix: 20 virtual tokens), float32. "
        "Every side once a round, the order turning; medians with 95 % bootstrap intervals over the rounds, ratios "
        "round by round.",
        ["batch x sequence", "who", "size", "parameters", "ms", "times the base"],
        [_row(row) for row in rows],
        notes=notes,
    )


def _setting(row: dict[str, Any]) -> tuple[int, int]:
    return row["batch"], row["sequence"]


def _row(row: dict[str, Any]) -> list[str]:
    ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    ms = f"{row['ms']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
    size = "" if row["size"] is None else str(row["size"])
    return [f"{row['batch']} x {row['sequence']}", row["who"], size, f"{row['parameters']:,}", ms, ratio]


def _judged(rows: list[dict[str, Any]]) -> list[str]:
    """One setting against the goals."""
    ratio = {row["who"]: row["ratio"] for row in rows}
    where = f"batch {rows[0]['batch']}, sequence {rows[0]['sequence']}"
    merged = "reached" if abs(ratio[MERGED] - 1) <= WITHIN else "**not reached**"
    values = [ratio[who] for who in ORDER]
    ordered = "reached" if values == sorted(values) and len(set(values)) == len(values) else "**not reached**"
    return [
        f"{where}: merged LoRA takes {ratio[MERGED]:.3f} of the base's time; 1.00 +- {WITHIN}: {merged}",
        f"{where}: {' < '.join(ORDER)} ({', '.join(f'{value:.3f}' for value in values)}): {ordered}",
    ]
