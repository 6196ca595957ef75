"""Memory of a QLoRA run of a 1.1B model, by component, beside PEFT + bitsandbytes.

TinyLlama-1.1B's shape, random bf16 weights quantized on loading, r=16 on every linear, 1 x 512 tokens, gradient
checkpointing (not reentrant) on both sides, the steps of `bench/steps.py`, each side in a process of its own.
Components are the bytes of tensors; the peak of activations is what a step adds to them; "process" is everything,
Python and libraries included. Mapped pages of the checkpoint count as resident, not as anonymous.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import parts
from bench.checkpoints import ONE_B, checkpoint
from bench.claim import line
from bench.probe_memory import MEGABYTE, Mark, Probe, probe

SHAPE = (1, 512)
TOTALS = ("process, peak of a training step, anonymous", "process, peak of the whole run, anonymous")


def run(rounds: int = 3) -> list[dict[str, Any]]:
    """Megabytes by component after `rounds` steps; the smaller total is the claim."""
    with checkpoint(ONE_B) as folder:
        mine, peer = (_components(probe(f"bench.memory:{side}", folder, str(rounds))) for side in ("lofi", "peer"))
    rows = []
    for name, size in mine.items():
        goal = f"<= {peer[name]:.0f}" if name in TOTALS else None
        rows.append(line(f"QLoRA, 1.1B, 1 x 512: {name}", size, goal=goal, peer=peer[name], unit="MB"))
    return rows


def _components(found: Probe) -> dict[str, float]:
    gradients, optimizer = found.answer["gradients"], found.answer["optimizer"]
    before, peak = found.anonymous_at("last step"), found.peak_anonymous("last step", "end")
    sizes = found.answer["model"] | {
        "gradients": gradients,
        "optimizer": optimizer,
        "activations at their peak": max(0, peak - before - gradients),
        TOTALS[0]: peak,
        TOTALS[1]: found.peak_anonymous("start", "end"),
        "process, peak of the whole run, resident with mapped files": found.peak_resident,
    }
    return {name: size / MEGABYTE for name, size in sizes.items()}


def lofi(mark: Mark, folder: str, rounds: str) -> dict[str, Any]:
    """In the probe: lofi's side."""
    from bench.steps import ours

    return _train(mark, ours, folder, int(rounds))


def peer(mark: Mark, folder: str, rounds: str) -> dict[str, Any]:
    """In the probe: PEFT + bitsandbytes + Trainer."""
    from bench.steps import theirs

    return _train(mark, theirs, folder, int(rounds))


def _train(mark: Mark, side: Any, folder: str, rounds: int) -> dict[str, Any]:
    mark("start")
    step = side(Path(folder), "nf4", SHAPE, checkpointing=True)
    model = step.trainer.model
    sizes = parts.component_bytes(model)
    for _ in range(rounds):
        step()
    mark("last step")
    step.backward()
    gradients = parts.gradient_bytes(model)
    step.update()
    mark("end")
    return {"model": sizes, "gradients": gradients, "optimizer": parts.optimizer_bytes(step.optimizer)}
