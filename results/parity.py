"""lofi and PEFT on one adapter: tensors bit for bit, logits, with and without a merge, over fifteen families."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch

import lofi
from results.lab import Lab, Section

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def run(lab: Lab) -> Section:
    from files.families import FAMILIES

    rows = [_row(family) for family in FAMILIES]
    bad = [row[0] for row in rows if "FAIL" in row]
    if bad:
        raise RuntimeError(f"parity fails for {bad}")
    return Section(
        "PEFT parity",
        "The same r=4 adapter (alpha 7, every linear) written by lofi and loaded by PEFT 0.21: tensors compared bit by "
        "bit, warnings counted, largest difference of logits in float32 (must be below 1e-5), unmerged and merged by "
        "each side. Tiny random models of each family.",
        ["family", "tensors", "bit-equal", "warnings", "logits", "logits, merged"],
        rows,
        commands=["python -m results parity"],
    )


def _row(family: str) -> list[str]:
    from peft import PeftModel
    from safetensors.torch import load_file

    from files.families import family_model, logits, stir

    ours = family_model(family)
    lofi.add_adapter(ours, lofi.LoraConfig(r=4, lora_alpha=7))
    stir(ours)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names that PEFT still calls
        lofi.save_adapter(ours, folder)
        theirs = PeftModel.from_pretrained(family_model(family), folder).eval()
        again = Path(folder) / "again"
        theirs.save_pretrained(again)
        one, other = (load_file(f / "adapter_model.safetensors") for f in (Path(folder), again))
    equal = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    gap = (logits(ours) - logits(theirs)).abs().max().item()
    merged = (logits(lofi.merge_and_unload(ours)) - logits(theirs.merge_and_unload())).abs().max().item()
    verdict = "yes" if equal and gap < 1e-5 and merged < 1e-5 and not seen else "FAIL"
    return [family, str(len(one)), verdict, str(len(seen)), f"{gap:.1e}", f"{merged:.1e}"]
