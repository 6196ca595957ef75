"""Opening a 1 GB bf16 checkpoint in NF4: seconds, and the most anonymous memory on the way.

Llama shape, dim 2048, 9 layers, tied embeddings, 528M parameters, random weights; each side in a process of its own, in
turn, after a tiny model has been opened the same way (imports do not count). Seconds are from the folder to the model;
anonymous memory is its growth. Mapped pages of the checkpoint are not anonymous: the kernel may drop them.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.checkpoints import GIGABYTE, TINY, checkpoint
from bench.claim import line
from bench.paired import Ratio, Timing
from bench.parts import component_bytes
from bench.probe_memory import MEGABYTE, Mark, Probe, probe


def run(rounds: int = 3) -> list[dict[str, Any]]:
    """Time and peak of lofi's load_model beside transformers' with bitsandbytes."""
    sides: dict[str, list[Probe]] = {"lofi": [], "bitsandbytes": []}
    with checkpoint(GIGABYTE) as folder, checkpoint(TINY) as tiny:
        for _ in range(rounds):
            for name, probes in sides.items():
                probes.append(probe(f"bench.load:{name}", folder, tiny))
    largest = 2 * GIGABYTE.vocab * GIGABYTE.dim
    timing = Timing({name: [p.seconds("start", "loaded") for p in probes] for name, probes in sides.items()})
    times = {name: timing.ms(name) for name in sides}
    peaks = {name: statistics.median(map(_growth, probes)) / MEGABYTE for name, probes in sides.items()}
    size = sides["lofi"][0].answer["bytes"]
    bound = (size + 3 * largest) / MEGABYTE
    return [
        line("load + quantize, bitsandbytes over lofi", _ratio(timing), goal=">= 4", peer=1.0, times_ms=times),
        line(
            "load + quantize, peak anonymous memory",
            peaks["lofi"],
            goal=f"<= {bound:.0f}",
            peer=peaks["bitsandbytes"],
            unit="MB",
            detail=f"the quantized model: {size / MEGABYTE:,.0f} MB, its largest tensor: {largest / MEGABYTE:,.0f} MB",
        ),
    ]


def _ratio(timing: Timing) -> Ratio:
    return timing.ratio("bitsandbytes", "lofi")


def _growth(found: Probe) -> float:
    return found.peak_anonymous("start", "loaded") - found.anonymous_at("start")


def lofi(mark: Mark, folder: str, tiny: str) -> dict[str, Any]:
    """In the probe: lofi.load_model."""
    import lofi

    return _open(mark, folder, tiny, lambda path: lofi.load_model(path, quantization="nf4"))


def bitsandbytes(mark: Mark, folder: str, tiny: str) -> dict[str, Any]:
    """In the probe: from_pretrained with a BitsAndBytesConfig."""
    import torch
    from transformers import AutoModelForCausalLM

    from bench.steps import quantization

    def opening(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization("nf4"))

    return _open(mark, folder, tiny, opening)


def _open(mark: Mark, folder: str, tiny: str, opening: Any) -> dict[str, Any]:
    opening(tiny)
    _into_cache(Path(folder))
    mark("start")
    model = opening(folder)
    mark("loaded")
    return {"bytes": sum(component_bytes(model).values())}


def _into_cache(folder: Path) -> None:
    """Read the files once, so that neither side waits for the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
