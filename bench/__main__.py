"""python -m bench [NAME ...]: run the named claims (all by default), print and keep them, write docs/performance.md."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import time
from pathlib import Path
from typing import Any

from results.lab import machine

from bench.page import kept_file, write_page

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = (
    "nf4_error", "outliers", "nf4_convert", "nf4_rows", "nf4_linear", "int8_linear", "quantized_step", "decode", "load",
    "memory", "headline", "gpu", "lora_step", "merged_forward", "attention",
)  # fmt: skip
NEEDS_A_GPU = ("gpu",)  # asked for by name where there is none, it says so and returns nothing


def main() -> None:
    given = _arguments()
    from bench.peers import silence

    silence()
    for name in given.names or [claim for claim in CLAIMS if _can_run(claim)]:
        module, started = importlib.import_module(f"bench.{name}"), time.perf_counter()
        rows = module.run() if given.rounds is None else module.run(rounds=given.rounds)
        _print(name, rows)
        if rows and given.rounds is None:
            _keep(name, rows, time.perf_counter() - started)
            write_page(CLAIMS, ROOT / "docs" / "performance.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CLAIMS, []])
    parser.add_argument("--rounds", type=int, help="repetitions, for a quick look: nothing is kept or written")
    return parser.parse_args()


def _can_run(claim: str) -> bool:
    import torch

    return claim not in NEEDS_A_GPU or torch.cuda.is_available()


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        peer = f" (peer {row['peer']})" if row["peer"] else ""
        goal = f", goal {row['goal']}: {'reached' if row['reached'] else 'NOT reached'}" if row["goal"] else ""
        told = f"  [{row['detail']}]" if row["detail"] else ""
        print(f"{name}: {row['what']}: {row['ours']}{peer}{goal}{told}", flush=True)


def _keep(name: str, rows: list[dict[str, Any]], seconds: float) -> None:
    file = kept_file(name)
    file.parent.mkdir(exist_ok=True)
    entry = {"machine": _surroundings(), "date": datetime.date.today().isoformat(), "seconds": round(seconds, 1)}
    file.write_text(json.dumps(entry | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")


def _surroundings() -> str:
    """Hardware, versions and the kernels that lofi runs, in one line."""
    import torch

    from bench.peers import versions
    from lofi.quant.kernels.dispatch import kernels_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{machine()}, {versions()}, lofi's kernels: {kernels_for(device).name}"


if __name__ == "__main__":
    main()
