"""Kill a training run with SIGKILL at random steps, resume it each time, and compare it with one that never stopped.

    python bench/kill_resume.py RECIPE.yaml --folder OUT --kills 20 --seed 0

Prints one JSON object: how often and after which steps it was killed, whether the final adapter (or model)
is the same to the last bit, and whether `metrics.jsonl` says the same (times aside). Exit code 1 if anything differs.
Each attempt is a fork of this process, which has imported everything and computed nothing: only the run itself is
timed by chance, not Python's start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

MOST_SECONDS = 3600  # of one attempt; a run that hangs is not a run that was killed


def attempt(recipe: Any, kill_after: int | None, chance: random.Random) -> bool:
    """Train (resuming what is there) in a child; SIGKILL it after `kill_after` steps. True: it ended itself."""
    child = os.fork()
    if child == 0:
        _train_and_leave(recipe)
    journal = Path(recipe.output) / "metrics.jsonl"
    limit = time.monotonic() + MOST_SECONDS
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"a run ended by itself with status {os.waitstatus_to_exitcode(status)}")
            return True
        if kill_after is not None and last_step(journal) >= kill_after:
            time.sleep(
                chance.random() * 0.2
            )  # somewhere within the step, the evaluation or the writing of a checkpoint
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    raise SystemExit(f"a run did not end in {MOST_SECONDS} seconds")


def _train_and_leave(recipe: Any) -> None:
    from lofi.train.run import train

    try:
        train(recipe, resume=True, progress=False)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def last_step(journal: Path) -> int:
    """The step of the last whole line of a journal that may be being written; 0 where there is none."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


def kill_and_resume(recipe: Any, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run once in one go and once with `kills` kills; say where, and whether the two are the same."""
    chance = random.Random(seed)
    whole = recipe.model_copy(update={"output": str(folder / "whole")})
    broken = recipe.model_copy(update={"output": str(folder / "killed")})
    attempt(whole, None, chance)
    steps = last_step(folder / "whole" / "metrics.jsonl")
    killed: list[int] = []
    for number in range(kills):
        low = last_step(folder / "killed" / "metrics.jsonl")
        share = max(1, round((steps - 1 - low) / (kills - number)))
        if attempt(broken, min(steps - 1, max(1, low + chance.randint(0, 2 * share - 1))), chance):
            break
        killed.append(last_step(folder / "killed" / "metrics.jsonl"))
    attempt(broken, None, chance)
    return {
        "kills": len(killed),
        "killed_after_steps": killed,
        "steps": steps,
        "same_bits": weights(folder / "whole") == weights(folder / "killed"),
        "same_metrics": figures(folder / "whole") == figures(folder / "killed"),
    }


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of every weight file that a run made."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    if not files:
        raise SystemExit(f"{run} made no weights")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def figures(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's journal without the one figure that depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    import lofi.train.run  # imported once, before the forks
    from lofi.recipe import load_recipe

    assert lofi.train.run
    result = kill_and_resume(load_recipe(given.recipe), given.folder, given.kills, given.seed)
    print(json.dumps(result))
    sys.exit(0 if result["same_bits"] and result["same_metrics"] and result["kills"] == given.kills else 1)


if __name__ == "__main__":
    main()
