"""An adapter folder as a GGUF file that llama.cpp puts onto its base at run time (`--lora`), proved before it is there.

Knows llama.cpp's rules for adapters: a pair of tensors a weight, named after the base's; the multiplier is
adapter.lora.alpha over the rank of the pair, whatever the adapter's config says of rsLoRA or patterns. So what differs
is folded into B. Only products B A can be told; whatever else an adapter trains is refused with the remedy, never left
out. Does not know how the base's own file is written, only its names and turns (gguf_names.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.config import LoraConfig
from lofi.errors import AdapterFileError, ProofError, RequestError
from lofi.export import gguf_file, gguf_proof
from lofi.export.gguf_file import FILE_TYPES, Planned
from lofi.export.gguf_model import Opened, Reader, open_folder
from lofi.export.gguf_names import Heads, Place, place_of, turned
from lofi.export.gguf_report import GgufReport
from lofi.files.adapter_folder import AdapterFolder, read_folder
from lofi.files.peft_format import PREFIX
from lofi.files.updates import MAGNITUDE, LowRank, low_rank_updates

DTYPES = ("f32", "f16", "bf16")
_INSTEAD = "merge it into its base and export the merged model instead"
_TOLERANCE = {"f32": 2e-6, "f16": 2e-3, "bf16": 1.6e-2}  # of the norm of B A x: a few roundings of the dtype
_PROBES = 16
_SUMS = 1e-12  # what float64's own sums differ by


@dataclass(frozen=True)
class Pair:
    """One update, and the two tensors of the file that say it."""

    update: LowRank
    place: Place
    fold: float
    """What B is multiplied by, so that alpha / rank gives the adapter's own multiplier."""

    @property
    def names(self) -> tuple[str, str]:
        """GGUF's names of A and of B."""
        return f"{self.place.name}.lora_a", f"{self.place.name}.lora_b"

    def tensors(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) as llama.cpp keeps them; of an embedding A is (V, R), one row a token."""
        ((a, b),) = self.update.pairs
        b = (b.double() * self.fold).float()
        if self.update.kind == "embedding":
            return a.float().t(), b
        turn = self.place.turn if self.place.turn.startswith("interleave") else ""
        return a.float(), turned(b, turn, heads)


def write_adapter_gguf(
    adapter_folder: str | Path, base_folder: str | Path, output: str | Path, *, dtype: str = "f32"
) -> GgufReport:
    """Write a LoRA folder as one GGUF file for the GGUF of its base.

    W x + (alpha / R) B' A x   as llama.cpp computes it, B' = B scale R / alpha: the adapter's own multiplier, of rsLoRA
    and of patterns too
    Dtypes  both factors in `dtype` (f32, f16 or bf16), rounded once; in f32 bit for bit where nothing is folded
    Raises  RequestError for what no such file can hold (DoRA, trained biases, token rows, heads, other methods), naming
            it; ModelError for the base's family; ProofError for another base or a file that says another update;
            AdapterFileError for a broken folder. What was at `output` is then unchanged
    """
    gguf_file.package()
    gguf_file.check_dtype(dtype, DTYPES)
    read = read_folder(adapter_folder)
    config = _lora(read)
    base = open_folder(base_folder)
    pairs = _pairs(read, config, base)
    _refuse_others(read, base, pairs)
    notes = _same_base(read, base)
    tensors = {n: t for pair in pairs for n, t in zip(pair.names, pair.tensors(base.numbers.heads), strict=True)}
    plan = [Planned(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()]
    values = _values(base, read, config, dtype)
    with gguf_file.into_place(output) as aside:
        gguf_file.write(aside, base.family.architecture, values, plan, tensors.__getitem__)
        written = gguf_file.read(aside)
        gguf_proof.prove_values(written, values, str(output))
        rounding = prove_pairs(written, pairs, base.numbers.heads, dtype, str(output))
        size = aside.stat().st_size
    what = str(output), str(adapter_folder), "adapter", base.family.architecture, dtype, len(plan), size
    return GgufReport(*what, rounding, notes=notes)


def _lora(read: AdapterFolder) -> LoraConfig:
    if not isinstance(read.config, LoraConfig):
        remedy = "serve it with lofi instead" if read.config.why_unmergeable() else _INSTEAD
        raise RequestError(
            f"{read.path} is a {read.config.method} adapter, and llama.cpp's adapters are LoRA alone; {remedy}"
        )
    return read.config


def _pairs(read: AdapterFolder, config: LoraConfig, base: Opened) -> list[Pair]:
    alpha = float(config.lora_alpha)
    return [
        Pair(update, _place(update, base, read.path), update.scale * update.rank / alpha)
        for update in low_rank_updates(read)
    ]


def _place(update: LowRank, base: Opened, where: Path) -> Place:
    tied = bool(base.config.tie_word_embeddings)
    if update.kind == "experts":
        raise _refused(where, f"{update.name}: an update of fused experts")
    place = place_of(base.family, f"{update.path}.weight")
    if place is not None and tied and place.name in ("token_embd.weight", "output.weight"):
        raise _refused(where, f"{update.path}: its weight is both embedding and head, and the update is of one of them")
    if update.kind == "embedding" and base.family.model_type.startswith("gemma"):
        raise _refused(where, f"{update.path}: an update of Gemma's scaled embedding")
    if place is None or place.name not in base.stored:
        raise AdapterFileError(
            f"{where} updates {update.path}, which {base.folder} does not have; give the base it was trained on"
        )
    held = base.stored[place.name].shape
    wanted = update.shape[::-1] if update.kind == "embedding" else update.shape
    if held != wanted:
        raise AdapterFileError(
            f"{where}: the update of {update.path} is {list(wanted)}, in {base.folder} it is {list(held)}; give the "
            "base it was trained on"
        )
    return place


def _refused(where: Path, what: str) -> RequestError:
    return RequestError(f"{where} holds what an adapter's GGUF cannot say ({what}); {_INSTEAD}")


def _refuse_others(read: AdapterFolder, base: Opened, pairs: list[Pair]) -> None:
    """Raise for every tensor that is no factor, unless it repeats the base's; and for an adapter of zeros."""
    factors = {key for pair in pairs for key in (pair.update.key_a, pair.update.key_b)}
    faults = [
        f"{key.removeprefix(PREFIX)}: {_reason(key)}"
        for key, tensor in sorted(read.tensors.items())
        if key not in factors and not _repeats(key, tensor, base)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise _refused(read.path, "; ".join(faults[:3]) + more)
    if not any(bool(b.any()) and bool(a.any()) for pair in pairs for a, b in pair.update.pairs):
        raise ProofError(f"the adapter in {read.path} changes nothing, all its products are zero; train it first")


def _reason(key: str) -> str:
    if MAGNITUDE in key:
        return "DoRA rescales the rows of the sum"
    if key.endswith("trainable_tokens_delta"):
        return "token rows, trained in full"
    if key.endswith(".bias"):
        return "a trained bias"
    return "a module that is trained in full"


def _repeats(key: str, tensor: Tensor, base: Opened) -> bool:
    """Whether the tensor is the base's own, which PEFT writes beside adapted embeddings."""
    place = place_of(base.family, key.removeprefix(PREFIX).replace(".base_layer", ""))
    if place is None or ".base_layer" not in key or place.name not in base.stored:
        return False
    with Reader(base) as reader:
        own, _ = reader.source(place.name)
    return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))


def _same_base(read: AdapterFolder, base: Opened) -> tuple[str, ...]:
    """Raise ProofError for another base; notes where that cannot be told."""
    from lofi.files.fingerprint import base_fingerprint, compare
    from lofi.models.load import load_model

    known: Mapping[str, Any] | None = read.record.get("base")
    if known is None:
        return (f"{read.path} has no lofi.json, so whether {base.folder} is its base cannot be proved",)
    reasons = compare(known, base_fingerprint(load_model(base.folder, device="cpu")))
    if reasons:
        raise ProofError(f"{read.path} was trained on another base ({'; '.join(reasons[:3])}); give that base")
    if known.get("quantization"):
        return (
            f"the adapter was trained on {known['quantization']} weights: llama.cpp adds it to what its file holds",
        )
    return ()


def _values(base: Opened, read: AdapterFolder, config: LoraConfig, dtype: str) -> dict[str, Any]:
    return {
        "general.architecture": base.family.architecture,
        "general.type": "adapter",
        "general.name": read.path.resolve().name,
        "general.file_type": FILE_TYPES[dtype],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.lora_alpha),
    }


@torch.no_grad()
def prove_pairs(read: gguf_file.Read, pairs: list[Pair], heads: Heads, dtype: str, where: str) -> gguf_proof.Rounding:
    """Compute what llama.cpp adds, from the file alone, and compare with scale B A x, in float64 on seeded random x.

    Raises  ProofError naming the update that is not the adapter's
    """
    names = {name for pair in pairs for name in pair.names}
    if read.tensors.keys() != names:
        raise ProofError(f"{where}: tensor {sorted(read.tensors.keys() ^ names)[0]} is not what was planned")
    alpha = float(read.values["adapter.lora.alpha"])
    draw = torch.Generator().manual_seed(0)
    errors = {}
    for pair in pairs:
        ((a, b),) = pair.update.pairs
        x = torch.randn(a.shape[1], _PROBES, generator=draw, dtype=torch.float64)  # (I, N)
        meant = pair.update.scale * (b.double() @ (a.double() @ x))  # (O, N)
        file_a, file_b = (read.tensor(name).double() for name in pair.names)
        if pair.update.kind == "embedding":
            file_a = file_a.t()
        turn = pair.place.turn if pair.place.turn.startswith("interleave") else ""
        got = gguf_proof.restored(alpha / file_b.shape[1] * (file_b @ (file_a @ x)), turn, heads)
        error = float((got - meant).norm() / meant.norm().clamp_min(1e-300))
        if error > _TOLERANCE[dtype]:
            raise ProofError(
                f"{where}: the update of {pair.update.path} reads back {error:.2g} of its norm away from the "
                "adapter's; nothing was put into place, please report this"
            )
        errors[pair.place.name] = error
    return gguf_proof.rounding({name: error for name, error in errors.items() if error > _SUMS})
