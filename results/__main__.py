"""python -m results [NAME ...]: run the named experiments (all by default), then write docs/results.md."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import time
from pathlib import Path

from results.lab import Lab, machine
from results.page import write_page

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "results" / "figures"
EXPERIMENTS = (
    "e2e", "diacritics", "encoders", "dialogues", "quotes", "arithmetic", "parity", "speed", "kill", "quantized",
    "requantized",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m results", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], help="experiments to run; all by default")
    parser.add_argument("--work", type=Path, default=ROOT / "results-run", help="folder for the runs")
    names = parser.parse_args().names or EXPERIMENTS
    work = parser.parse_args().work.resolve()
    shared = Path(os.environ.get("LOFI_SHARED", ROOT.parent / "shared")).resolve()
    os.chdir(ROOT)
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        lab, started = Lab(shared, work), time.perf_counter()
        section = importlib.import_module(f"results.{name}").run(lab)
        section.minutes = sum(lab.seconds.values()) / 60 or (time.perf_counter() - started) / 60
        section.commands = section.commands or lab.commands
        section.machine, section.date = machine(), datetime.date.today().isoformat()
        (FIGURES / f"{name}.json").write_text(json.dumps(section.to_dict(), indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {section.minutes:.1f} minutes", flush=True)
        write_page(FIGURES, EXPERIMENTS, ROOT / "docs" / "results.md")


if __name__ == "__main__":
    main()
