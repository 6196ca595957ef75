"""The proof of a GGUF file: everything in it is read back and compared with where it came from.

Undoes every turn by an index formula of its own, written from llama.cpp's side, so that a turn left out or made twice
is noticed; judges the rounding of Q8_0 against its bound; and lets the model speak with the file's weights in place of
its own. Does not write files. What llama.cpp itself says to such files is compared in the tests, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofi.errors import ProofError
from lofi.export.gguf_file import BLOCK, Planned, Read
from lofi.export.gguf_names import Family, Heads, place_of


@dataclass(frozen=True)
class Rounding:
    """How far the file's weights are from the model's: the root of sum (x - y)^2 / sum x^2 of each rounded tensor."""

    worst: float = 0.0
    worst_name: str = ""
    mean: float = 0.0
    rounded: int = 0
    """Tensors that are not bit for bit the model's."""


@dataclass(frozen=True)
class Agreement:
    """How near the file's weights speak to the model's, in float32 on seeded random ids."""

    max_logit_error: float
    mean_logit_error: float
    spread: float
    """Standard deviation of the logits: the measure of the errors above."""
    top1: float
    positions: int


def restored(tensor: Tensor, turn: str, heads: Heads) -> Tensor:
    """A tensor as llama.cpp keeps it, in transformers' order (one_more is left in: a sum cannot be undone exactly)."""
    if turn == "transpose":
        return tensor.transpose(0, 1)
    if not turn.startswith("interleave"):
        return tensor
    rows = tensor.shape[0]
    size = rows // (heads.q if turn.endswith("q") else heads.k)
    row = torch.arange(rows)
    within = row % size
    source = row - within + (within % 2) * (size // 2) + within // 2  # neighbours 2i, 2i+1 are elements i, i + K/2
    out = torch.empty_like(tensor)
    out[source] = tensor
    return out


def prove_values(read: Read, values: Mapping[str, Any], where: str) -> None:
    """Raise ProofError unless the metadata reads back as it was meant (float32 rounds floats)."""
    for key, meant in values.items():
        if not _same(read.values.get(key), meant):
            raise ProofError(f"{where}: {key} does not read back as it was written; please report this")


def _same(got: Any, meant: Any) -> bool:
    if isinstance(meant, list):
        return isinstance(got, list) and len(got) == len(meant) and all(map(_same, got, meant))
    if isinstance(meant, float):
        return got is not None and float(torch.tensor(meant, dtype=torch.float32)) == float(got)
    return type(meant)(got) == meant if got is not None else False


def prove_tensors(
    read: Read, plan: Sequence[Planned], source: Callable[[str], tuple[Tensor, str]], heads: Heads, where: str
) -> Rounding:
    """Compare every tensor of a file with what `source(name)` gives: the model's own tensor, and its turn.

    Raises  ProofError naming the tensor that is missing, too many, mis-shaped, or not the model's
    Exact   f32, f16 and bf16 must be the model's values rounded once; q8_0 within half a step of its block
    """
    names = {one.name for one in plan}
    if read.tensors.keys() != names:
        odd = sorted(read.tensors.keys() ^ names)[0]
        raise ProofError(f"{where}: tensor {odd} is not what was planned; please report this")
    errors: dict[str, float] = {}
    for one in plan:
        given, turn = source(one.name)
        meant = given.to(torch.float32)
        meant = meant + 1 if turn == "one_more" else meant
        got = restored(read.tensor(one.name), turn, heads)
        if got.shape != meant.shape or not _as_meant(got, meant, one.dtype, turn):
            raise ProofError(
                f"{where}: {one.name} does not read back as the model's tensor ({one.dtype}, {turn or 'as it is'}); "
                "nothing was put into place, please report this"
            )
        errors[one.name] = _distance(got, meant)
    return rounding(errors)


def _as_meant(got: Tensor, meant: Tensor, dtype: str, turn: str) -> bool:
    if dtype != "q8_0":
        cast = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        return torch.equal(got, meant.to(cast).to(torch.float32))
    if turn == "transpose":  # blocks lie along the file's rows
        got, meant = got.t(), meant.t()
    blocks = meant.reshape(*meant.shape[:-1], -1, BLOCK)
    error = (got.reshape(blocks.shape) - blocks).abs().amax(-1)
    # half a step, and what rounding the scale to float16 moves the largest of 127 steps by (subnormal below 2^-14)
    bound = blocks.abs().amax(-1) * (0.5 / 127 + 2**-11) * 1.001 + 127 * 2**-25
    return bool((error <= bound).all())


def _distance(got: Tensor, meant: Tensor) -> float:
    if torch.equal(got, meant):
        return 0.0
    return float((got - meant).double().norm() / meant.double().norm().clamp_min(1e-300))


def rounding(errors: Mapping[str, float]) -> Rounding:
    """The errors of each tensor, summed up; 0 means bit for bit."""
    rounded = {name: error for name, error in errors.items() if error > 0}
    if not rounded:
        return Rounding()
    worst = max(rounded, key=lambda name: rounded[name])
    return Rounding(rounded[worst], worst, sum(rounded.values()) / len(rounded), len(rounded))


def fits(parameters: int) -> bool:
    """Whether a model of so many parameters can be opened in float32 with room to work."""
    import psutil

    return psutil.virtual_memory().available > 1.5 * 4 * parameters


@torch.no_grad()
def agreement(folder: Path, read: Read, family: Family, heads: Heads) -> Agreement:
    """Ask the model in `folder`, and the same model with the file's weights in it, seeded random prompts.

    Raises  ProofError where the file's weights say NaN or infinity
    """
    from lofi.merge.probes import random_probes
    from lofi.merge.verdict import measure
    from lofi.models.load import load_model

    model: Any = load_model(folder, dtype="float32", device="cpu")
    probes = random_probes(model)
    before = measure(model, probes).logits  # (P, V)
    for name, parameter in model.named_parameters():
        place = place_of(family, name)
        assert place is not None, name
        parameter.copy_(restored(read.tensor(place.name), place.turn, heads) - float(place.turn == "one_more"))
    after = measure(model, probes).logits
    if not bool(torch.isfinite(after).all()):
        raise ProofError(f"the weights of the GGUF file of {folder} do not give finite logits; choose a wider dtype")
    error = (after - before).abs()
    same = (after.argmax(-1) == before.argmax(-1)).float().mean()
    return Agreement(float(error.max()), float(error.mean()), float(before.std()), float(same), len(before))
