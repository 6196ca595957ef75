"""python -m bench [NAME ...]: run the named claims (all by default), print and keep their rows as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from results.lab import machine

CLAIMS = ("merged_forward", "lora_step", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CLAIMS, []])
    kept = Path(__file__).parent / "results"
    kept.mkdir(exist_ok=True)
    for name in parser.parse_args().names or CLAIMS:
        rows = importlib.import_module(f"bench.{name}").run()
        for row in rows:
            print(f"{name}: {row['what']}: {row['ratio']}  ({row['a_ms']:.1f} / {row['b_ms']:.1f} ms)", flush=True)
        (kept / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
