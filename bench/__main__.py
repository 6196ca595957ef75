"""python -m bench [NAME ...]: run the named claims or groups (all by default), print and keep them, write their pages.

A group is `performance` (docs/performance.md) or `serving` (docs/serving.md). A claim that fails is told and does not
keep the others from being measured; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import json
import sys
import time
import traceback
from typing import Any

from results.lab import machine

from bench.groups import GROUPS, NEEDS_A_GPU, PERFORMANCE, chosen, group_of
from bench.page import kept_file, write_page


def main() -> None:
    given = _arguments()
    from bench.peers import silence

    silence()
    wanted = [name for name in chosen(given.names) if name in given.names or _can_run(name)]
    trial = {name: value for name in ("rounds", "requests") if (value := getattr(given, name)) is not None}
    failed = [name for name in wanted if not _measure(name, trial)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _measure(name: str, trial: dict[str, int]) -> bool:
    """Run one claim; keep its figures and write its page unless it was a trial.  False where it failed"""
    try:
        module, started = importlib.import_module(f"bench.{name}"), time.perf_counter()
        known = inspect.signature(module.run).parameters
        rows = module.run(**{key: value for key, value in trial.items() if key in known})
    except Exception:
        traceback.print_exc()
        return False
    _print(name, rows)
    if rows and not trial:
        _keep(name, rows, time.perf_counter() - started)
        _write(name)
    return True


def _write(claim: str) -> None:
    group = group_of(claim)
    if group is PERFORMANCE:
        write_page(group.claims, group.page)
    else:
        from bench.serving_page import write_serving_page

        write_serving_page(group.claims, group.page)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*GROUPS, *chosen([]), []])
    parser.add_argument("--rounds", type=int, help="repetitions, for a quick look: nothing is kept or written")
    parser.add_argument("--requests", type=int, help="requests of serve_equal and serve_load, likewise")
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
