"""Resume: a run killed with SIGKILL at random steps, twenty times, ends in the same bits as one never interrupted."""

from __future__ import annotations

import itertools
import shutil
import time

from results.lab import Lab, Section

KILLS, ROWS = 20, 600


def run(lab: Lab) -> Section:
    from bench.kill_resume import kill_and_resume

    import lofi.train.run  # before the forks, so that each attempt starts at once
    from lofi.recipe import load_recipe

    assert lofi.train.run
    folder = lab.work / "kill"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with lab.data("e2e_nlg", "train").open(encoding="utf-8") as lines:
        (folder / "train.jsonl").write_text("".join(itertools.islice(lines, ROWS)), encoding="utf-8")
    changes = [
        f"model={lab.model('stories260k')}", f"data.train={folder / 'train.jsonl'}", "data.validation=null",
        "train.epochs=3", "train.batch_tokens=2048", "train.save_steps=4", "train.logging_steps=1",
        "lora.lora_dropout=0.1",
    ]  # fmt: skip
    started = time.perf_counter()
    found = kill_and_resume(load_recipe("examples/recipes/e2e-lora.yaml", changes), folder, KILLS, seed=0)
    lab.seconds["kill"] = time.perf_counter() - started
    if not (found["same_bits"] and found["same_metrics"] and found["kills"] == KILLS):
        raise RuntimeError(f"the killed run is not the uninterrupted one: {found}")
    return Section(
        "Resume after SIGKILL",
        f"stories260k with LoRA and dropout 0.1 on {ROWS} rows, a checkpoint every 4 steps; killed at a random moment "
        "after random steps and resumed each time.",
        ["kills", "steps of the run", "killed after steps", "final weights", "journal"],
        [
            [
                str(found["kills"]),
                str(found["steps"]),
                ", ".join(map(str, found["killed_after_steps"])),
                "the same bits",
                "the same (times aside)",
            ]
        ],
        commands=["python -m results kill"],
    )
