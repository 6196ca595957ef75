"""On a GPU: 4- and 8-bit linears over the bf16 linear and over bitsandbytes, and QLoRA runs of 7B to 65B shapes.

Linears are 4096 to 11008, eight different ones in turn, which no cache holds. Times are the device's, by events; a few
rows and conversions are replayed as a graph, so that launching does not count; a linear in training is launched as in a
run. bitsandbytes' figures stand beside where it is installed. Memory is what torch's allocator holds at its peak
over three training steps of 1 x 512 tokens, r=16 on every linear, with checkpointing, from a folder with random NF4
weights that both sides load; the base is the bytes of the model's tensors without adapters.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from bench import parts
from bench.checkpoints import SEVEN_B, Shape, checkpoint
from bench.claim import line
from bench.paired import Timing

NO_GPU = "bench gpu needs a CUDA or ROCm GPU and this machine has none: nothing was measured."
IN, OUT, WEIGHTS = 4096, 11008, 8
TRAINING = {"nf4": {256: "<= 1.25", 1024: "<= 1.12"}, "int8": {256: None, 1024: "<= 1.2"}}
FEW = {1: "<= 0.40", 4: None, 16: "<= 1.0"}
TOKENS = (1, 512)
MODELS = {  # shape, largest total and largest base in GB: what QLoRA's authors and PEFT's users report
    "7B": (SEVEN_B, 6.9, 5.05),
    "13B": (Shape(5120, 40, 13824, 40, 40, 32000), 11.3, 8.48),
    "33B": (Shape(6656, 60, 17920, 52, 52, 32000), 24.7, 19.3),
    "65B": (Shape(8192, 80, 22016, 64, 64, 32000), 45.0, 37.1),
}
GIGABYTE = 1e9

Calls = dict[str, Callable[[], object]]


def run(rounds: int = 30) -> list[dict[str, Any]]:
    """Ratios of device times, then memory; no rows, and one sentence, where there is no GPU."""
    if not torch.cuda.is_available():
        print(NO_GPU)
        return []
    rows = [*_conversions(rounds), *_few_rows(rounds)]
    for kind in TRAINING:
        rows += _training(kind, rounds)
    return rows + [row for name in MODELS for row in _model(name, rounds)]


def _conversions(rounds: int) -> list[dict[str, Any]]:
    """Dequantizing and quantizing, over bitsandbytes, and dequantizing over a copy that moves as many bytes."""
    from lofi.quant.kernels.dispatch import kernels_for
    from lofi.quant.linear import quantize_4bit

    weights = [layer.weight for layer in _dense("cuda")]
    out, kernels = torch.empty_like(weights[0]), kernels_for(weights[0].device)
    stored = [quantize_4bit(weight) for weight in weights]
    moved = stored[0].bytes() + out.nbytes
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    from_codes: Calls = {
        "lofi": lambda: [kernels.dequantize_blockwise(each, out) for each in stored],
        "copy": lambda: [target.copy_(source) for _ in stored],
    }
    to_codes: Calls = {"lofi": lambda: [quantize_4bit(weight) for weight in weights]}
    if find_spec("bitsandbytes"):
        from bitsandbytes import functional

        theirs = [functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4") for w in weights]
        from_codes["bitsandbytes"] = lambda: [functional.dequantize_4bit(*each, out=out) for each in theirs]
        to_codes["bitsandbytes"] = lambda: [
            functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4") for weight in weights
        ]
    reading = timed({name: graph(call) for name, call in from_codes.items()}, rounds)
    writing = timed(to_codes, rounds)
    lines = [line("NF4 to bf16 over a copy of as many bytes", reading.ratio("lofi", "copy"), times_ms=_each(reading))]
    for what, timing in [("NF4 to bf16", reading), ("bf16 to NF4", writing)]:
        if "bitsandbytes" in timing.seconds:
            ratio = timing.ratio("bitsandbytes", "lofi")
            lines.append(line(f"{what}, bitsandbytes over lofi", ratio, peer=1.0, times_ms=_each(timing)))
    return lines


def _few_rows(rounds: int) -> list[dict[str, Any]]:
    layers, lines = _sides("nf4", "cuda"), []
    for rows, goal in FEW.items():
        timing = timed({name: graph(_inference(each, rows)) for name, each in layers.items()}, rounds)
        lines.append(_over_bf16(f"NF4 linear, {rows} row{'s' * (rows > 1)}, inference", timing, goal))
    return lines


def _training(kind: str, rounds: int) -> list[dict[str, Any]]:
    layers, lines = _sides(kind, "cuda"), []
    for tokens, goal in TRAINING[kind].items():
        timing = timed({name: _round_trip(each, tokens) for name, each in layers.items()}, rounds)
        lines.append(_over_bf16(f"{kind} linear, forward + backward, {tokens} tokens", timing, goal))
    return lines


def _over_bf16(what: str, timing: Timing, goal: str | None) -> dict[str, Any]:
    peer = timing.ratio("bitsandbytes", "bf16") if "bitsandbytes" in timing.seconds else None
    return line(f"{what}, over bf16", timing.ratio("lofi", "bf16"), goal=goal, peer=peer, times_ms=_each(timing))


def _dense(device: str) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16, device=device) for _ in range(WEIGHTS)]
    return [linear.requires_grad_(False) for linear in made]


def _sides(kind: str, device: str) -> dict[str, list[nn.Module]]:
    """The same weights as torch, lofi and, where it is installed, bitsandbytes hold them."""
    from lofi.quant.config import Int8Options, NF4Options
    from lofi.quant.linear import Int8Linear, NF4Linear

    dense = _dense(device)
    made: dict[str, list[Any]] = {"bf16": dense}
    if kind == "nf4":
        made["lofi"] = [NF4Linear.from_dense(linear, NF4Options()) for linear in dense]
    else:
        made["lofi"] = [Int8Linear.from_dense(linear, Int8Options()) for linear in dense]
    if find_spec("bitsandbytes"):
        made["bitsandbytes"] = [_theirs(linear, kind, device) for linear in dense]
    return made


def _theirs(linear: nn.Linear, kind: str, device: str) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = linear.weight.detach().cpu()  # they quantize on the way to the device
    layer: Any
    if kind == "nf4":
        layer = Linear4bit(IN, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    else:
        layer = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to(device)


def _inference(layers: list[nn.Module], rows: int) -> Callable[[], object]:
    x = torch.randn(rows, IN, dtype=torch.bfloat16, device=next(layers[0].parameters()).device)
    for layer in layers:
        layer.eval()

    @torch.inference_mode()
    def call() -> None:
        for layer in layers:
            layer(x)

    return call


def _round_trip(layers: list[nn.Module], tokens: int) -> Callable[[], object]:
    device = next(layers[0].parameters()).device
    x = torch.randn(tokens, IN, dtype=torch.bfloat16, device=device, requires_grad=True)
    gradient = torch.randn(tokens, OUT, dtype=torch.bfloat16, device=device)

    def call() -> None:
        for layer in layers:
            layer.train()(x).backward(gradient)
        x.grad = None

    return call


def graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a recorded graph: kernels follow each other without the host between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


def timed(calls: Calls, rounds: int) -> Timing:
    """Device seconds of every call, one after another in each round; the order turns from round to round."""
    names = list(calls)
    for name in names * 3:
        calls[name]()
    events = {
        name: [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)] for name in names
    }
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start, end = events[name][turn]
            start.record()
            calls[name]()
            end.record()
            torch.cuda.synchronize()
    return Timing({name: [s.elapsed_time(e) / 1e3 for s, e in pairs] for name, pairs in events.items()})


def _each(timing: Timing) -> dict[str, float]:
    """Milliseconds of one of the eight."""
    return {name: timing.ms(name) / WEIGHTS for name in timing.seconds}


def _model(name: str, rounds: int) -> list[dict[str, Any]]:
    """Memory of a QLoRA run, both sides one after the other, and their steps' times, from the same folder."""
    from bench.steps import ours, theirs

    shape, total, base = MODELS[name]
    free = torch.cuda.mem_get_info()[0] / GIGABYTE
    if free < total:
        print(f"bench gpu: a {name} shape needs {total} GB and {free:.1f} GB are free on this GPU: not measured.")
        return []
    sides = {"lofi": lambda folder: ours(folder, None, TOKENS, checkpointing=True)}
    if find_spec("bitsandbytes") and find_spec("peft"):
        sides["peer"] = lambda folder: theirs(folder, "nf4", TOKENS, checkpointing=True)
    with checkpoint(shape, nf4=True) as folder:
        found = {side: _run_of(make, folder, rounds) for side, make in sides.items()}
    lines = []
    for place, (what, goal) in enumerate({"in all": total, "base": base}.items()):
        peer = found["peer"][place] if "peer" in found else None
        size = found["lofi"][place]
        lines.append(line(f"QLoRA, {name}, 1 x 512: memory {what}", size, goal=f"<= {goal}", peer=peer, unit="GB"))
    if "peer" in found:
        steps = Timing({side: each[2] for side, each in found.items()})
        times = {side: steps.ms(side) for side in found}
        lines.append(
            line(f"QLoRA, {name}, step, peer over lofi", steps.ratio("peer", "lofi"), peer=1.0, times_ms=times)
        )
    return lines


def _run_of(make: Callable[[Any], Any], folder: Any, rounds: int) -> tuple[float, float, list[float]]:
    """(peak of the allocator in GB, the base's tensors in GB, seconds of each step), and everything freed again."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make(folder)
    sizes = parts.component_bytes(step.trainer.model)
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_reserved() / GIGABYTE
    seconds = timed({"step": step}, rounds).seconds["step"]
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return peak, (sum(sizes.values()) - sizes[parts.ADAPTERS]) / GIGABYTE, seconds
