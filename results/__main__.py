"""python -m results [NAME ...]: run the named experiments (all by default), then write docs/results.md.

Runs that are finished stay in the work folder: what was stopped goes on, row by row. Remove the folder to begin anew.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from results.lab import Lab, machine
from results.lanes import Experiment, run_in_lanes
from results.page import write_page

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "results" / "figures"
EXPERIMENTS = (  # in the order of the page
    Experiment("e2e", 16),
    Experiment("diacritics", 22),
    Experiment("encoders", 18),
    Experiment("dialogues", 11),
    Experiment("quotes", 3),
    Experiment("arithmetic", 0.2),
    Experiment("parity", 0.2),
    Experiment("inits", 0.5),
    Experiment("speed", 2, alone=True),
    Experiment("kill", 2.4),
    Experiment("quantized", 18),
    Experiment("requantized", 3, after="quantized"),
    Experiment("seq2seq", 10),
    Experiment("resize", 2, after="quantized"),
    Experiment("subspaces", 3, after="quantized"),
    Experiment("methods", 23),
    Experiment("methods_minilm", 9),
    Experiment("matrices", 6),
    Experiment("latency", 6, alone=True),
)
NAMES = tuple(experiment.name for experiment in EXPERIMENTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m results", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="experiments to run; all by default")
    parser.add_argument("--work", type=Path, default=ROOT / "results-run", help="folder for the runs")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="experiments at once; one a core")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.chdir(ROOT)
    work = asked.work.resolve()
    if asked.one:
        run_one(asked.one, work)
    elif failed := run_all(asked.names or NAMES, work, lanes=max(1, asked.lanes)):
        raise SystemExit(f"failed: {', '.join(failed)}; their logs are in {work / 'logs'}")


def run_all(names: Sequence[str], work: Path, *, lanes: int) -> list[str]:
    """Every named experiment in a process of its own, several at once; returns those that failed."""
    chosen = [experiment for experiment in EXPERIMENTS if experiment.name in names]
    command = [sys.executable, "-m", "results", "--work", str(work), "--one"]
    return run_in_lanes(chosen, lanes, work / "logs", command, page)


def run_one(name: str, work: Path) -> None:
    """One experiment in this process: its figures go to results/figures."""
    shared = Path(os.environ.get("LOFI_SHARED", ROOT.parent / "shared")).resolve()
    lab, started = Lab(shared, work, name), time.perf_counter()
    section = importlib.import_module(f"results.{name}").run(lab)
    section.minutes = sum(lab.seconds.values()) / 60 or (time.perf_counter() - started) / 60
    section.commands = section.commands or lab.commands
    section.machine, section.date = machine(), datetime.date.today().isoformat()
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(section.to_dict(), indent=1, ensure_ascii=False) + "\n")
    print(f"{name}: {section.minutes:.1f} minutes", flush=True)


def page() -> None:
    """docs/results.md from the figures that there are."""
    write_page(FIGURES, NAMES, ROOT / "docs" / "results.md")


if __name__ == "__main__":
    main()
