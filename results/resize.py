"""lofi resize and lofi combine: is the error that they predict the error that they make, and what does PEFT say?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from results.lab import Lab, Section, figure
from results.quantized import jobs


def run(lab: Lab) -> Section:
    tiny = next(job for job in jobs(lab) if job.name == "lofi-tiny")
    one, two = (tiny.train(lab, "lora", seed) for seed in (0, 1))
    asked = ("--model", tiny.model, "--data", lab.data(tiny.data, "validation"), *tiny.columns)
    rows = [
        _resized(lab, one, ("--rank", "8", *asked), "resize-8"),
        _resized(lab, one, ("--rank", "4", *asked), "resize-4"),
        _resized(lab, one, ("--energy", "0.9", *asked), "resize-energy"),
        _resized(lab, one, ("--min-kept", "0.95", *asked), "resize-kept"),
        [
            "r=16 -> 8 in PEFT",
            f"largest difference of a logit from lofi's: {_peft(tiny.model, lab.work / 'resize-8'):.2g}",
        ],
    ]
    base = (
        "--model",
        tiny.model,
        "--data",
        lab.data(tiny.data, "validation"),
        *tiny.columns,
        "--metrics",
        "perplexity",
    )
    for how in (("concat",), ("linear",), ("svd", "--rank", "8")):
        rows.append(_combined(lab, (one, two), how, base))
    rows.append(
        [
            "combined by concatenation, against both active",
            f"largest difference: {_both(tiny.model, one, two, lab):.2g}",
        ]
    )
    return Section(
        "Resizing and combining adapters",
        "An adapter of rank 16 (lofi-tiny on english_quotes) cut to fewer ranks, and two of them added up: the error "
        "predicted from the singular values that are dropped must be the one measured on the file.",
        ["what", "found"],
        rows,
        notes=[
            "Errors are Frobenius norms over all updates against the exact update. Shares of the gain: of the drop in "
            "validation loss from base to base + adapter, with 95 % intervals.",
        ],
    )


def _resized(lab: Lab, run: Path, words: tuple[Any, ...], output: str) -> list[str]:
    shutil.rmtree(lab.work / output, ignore_errors=True)
    said = lab.lofi("resize", "--adapter", run, *words, "--output", lab.work / output, label=output)
    ranks = sorted({update["after"] for update in said["updates"]})
    kept = figure(said, "share_kept")
    tried = "; ".join(f"rank {each['rank']}: {each['value']:.1%}" for each in said["tried"])
    return [
        f"r=16 {said['asked']}" + (f" (tried {tried})" if tried else ""),
        f"rank {ranks[0]}"
        + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        + f": predicted {said['predicted_error']:.7g}, "
        f"measured {said['measured_error']:.7g} of {said['norm']:.4g}; keeps {kept['value']:.1%} "
        f"[{kept['low']:.1%}, {kept['high']:.1%}] of the gain",
    ]


def _combined(lab: Lab, runs: tuple[Path, Path], how: tuple[str, ...], base: tuple[Any, ...]) -> list[str]:
    output = lab.work / f"combine-{how[0]}"
    shutil.rmtree(output, ignore_errors=True)
    parts = [word for name, run in zip("ab", runs, strict=True) for word in ("--adapter", f"{name}={run}")]
    said = lab.lofi("combine", *parts, "--weights", "0.5,0.5", "--how", *how, "--output", output, label=output.name)
    value = figure(
        lab.lofi("evaluate", *base, "--adapter", f"both={output}", label=f"{output.name} judged"), "perplexity", "both"
    )
    ranks = sorted({update["after"] for update in said["updates"]})
    return [
        f"0.5 x seed 0 + 0.5 x seed 1, {' '.join(how)}",
        f"rank {ranks[-1]}: predicted {said['predicted_error']:.7g}, measured {said['measured_error']:.7g} of "
        f"{said['norm']:.4g}; perplexity {value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]",
    ]


def _logits(model: Any) -> Any:
    import torch

    ids = torch.randint(3, 8000, (4, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


def _peft(base: Path, folder: Path) -> float:
    """The largest difference between PEFT's and lofi's logits with the same adapter folder, in float32."""
    import peft

    import lofi
    from lofi.models.load import load_model

    model = load_model(base, dtype="fp32", device="cpu")
    lofi.load_adapter(model, folder)
    theirs = peft.PeftModel.from_pretrained(load_model(base, dtype="fp32", device="cpu"), str(folder)).eval()
    return float((_logits(model) - _logits(theirs)).abs().max())


def _both(base: Path, one: Path, two: Path, lab: Lab) -> float:
    """The concatenation 1 x a + 1 x b beside both adapters active at once."""
    import lofi
    from lofi.models.load import load_model

    output = lab.work / "combine-both"
    shutil.rmtree(output, ignore_errors=True)
    lab.lofi("combine", "--adapter", f"a={one}", "--adapter", f"b={two}", "--output", output, label=output.name)
    model = load_model(base, dtype="fp32", device="cpu")
    for name, folder in (("a", one / "adapter"), ("b", two / "adapter"), ("both", output)):
        lofi.load_adapter(model, folder, name)
    lofi.set_adapter(model, ["a", "b"])
    active = _logits(model)
    lofi.set_adapter(model, "both")
    return float((_logits(model) - active).abs().max())
