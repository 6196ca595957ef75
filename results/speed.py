"""What serving costs: a merged model against its base, and an adapter left unmerged."""

from __future__ import annotations

from bench.merged_forward import run as forward

from results.lab import Lab, Section


def run(lab: Lab) -> Section:
    rows = [[r["what"], r["ours"], f"{r['times_ms']['this']:.2f}", f"{r['times_ms']['base']:.2f}"] for r in forward()]
    return Section(
        "Merged and unmerged against the base",
        "Forward time of a Llama shape (dim 512, 6 layers) with r=16 on every linear; paired rounds, median ratio with "
        "its interval. Merged must be 1.00 +- 0.02: it is the same modules with other numbers.",
        ["what", "ratio", "ms", "base ms"],
        rows,
        commands=["python -m bench merged_forward"],
    )
