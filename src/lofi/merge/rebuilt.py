"""A LoRA folder made from updates: its ranks and scales put into words, written, read again and measured.

Used by resize and combine, which say what the new factors are. No model is needed: the error of the new folder is the
distance of its factors, as read back from the file, to the exact update. Rejected: writing through a model and
save_adapter, which would need the base for what is arithmetic on small matrices.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from lofi.adapters.algebra import Pair, distance, norm
from lofi.adapters.config import LoraConfig
from lofi.errors import ProofError, RequestError
from lofi.files.adapter_folder import CONFIG, FORMAT, RECORD, TENSORS, AdapterFolder, read_folder
from lofi.files.atomic import write_json, write_text
from lofi.files.layout import save_safetensors
from lofi.files.provenance import hash_code, hash_file, versions
from lofi.files.updates import MAGNITUDE, LowRank, low_rank_updates

_CARD = """---
library_name: peft
tags:
- lora
- lofi
---

# A LoRA adapter

{done}

| modules | count | rank |
|---|---|---|
{rows}

lofi and PEFT load this folder like any other LoRA adapter. `lofi.json` says which base it belongs to, what it was made
from, and how far it is from the exact result.
"""
_OUTDATED = ("golden", "figures", "resized", "combined")
"""What lofi.json says of an adapter that is not true of one made from it."""


@dataclass(frozen=True)
class Rebuilt:
    """One update as it is to be stored, beside the exact one."""

    update: LowRank
    """Its place in the file; the scale and the factors are the old ones."""
    exact: tuple[Pair, ...]
    """What it should be: pairs whose product is the update, nothing to multiply by."""
    pairs: tuple[Pair, ...]
    """What it will be, likewise."""
    predicted: float
    """||exact - what it will be||_F, by the singular values that were dropped."""

    @property
    def rank(self) -> int:
        """R of the new factors."""
        return int(self.pairs[0][0].shape[0])

    @property
    def norm(self) -> float:
        """||exact||_F over all pairs."""
        return math.hypot(*(norm(a, b) for a, b in self.exact))

    @property
    def rounding(self) -> float:
        """A bound on what rounding the new factors to float32 adds: 2 u ||B||_F ||A||_F with u = 2^-24, per pair.

        And what float64 itself can tell of a difference of two products this large.
        """
        sizes = math.hypot(*(float(a.norm()) * float(b.norm()) for a, b in (*self.pairs, *self.exact)))
        return 2.02 * 2.0**-24 * math.hypot(*(float(a.norm()) * float(b.norm()) for a, b in self.pairs)) + 1e-14 * sizes


@dataclass(frozen=True)
class Cut:
    """What became of one update: its ranks, its norm, and the error predicted and measured, all Frobenius norms."""

    name: str
    before: int
    after: int
    norm: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Total:
    """The same over all updates."""

    norm: float
    predicted: float
    measured: float

    @classmethod
    def of(cls, cuts: Sequence[Cut]) -> Total:
        """Roots of the sums of squares."""
        return cls(*(math.hypot(*(getattr(cut, key) for cut in cuts)) for key in ("norm", "predicted", "measured")))

    def words(self) -> str:
        """The error in one sentence."""
        share = self.measured / self.norm if self.norm else 0.0
        return (
            f"error: measured {self.measured:.6g}, predicted {self.predicted:.6g} (Frobenius norm over all updates, "
            f"whose own is {self.norm:.6g}: {share:.3%})"
        )

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {"norm": self.norm, "predicted_error": self.predicted, "measured_error": self.measured}


def updates_for(verb: str, read: AdapterFolder) -> list[LowRank]:
    """The updates of a folder that is LoRA and nothing else.

    Raises  RequestError for another method, for DoRA, whose update is no product of two factors, or where there is none
    """
    config = read.config
    if not isinstance(config, LoraConfig):
        raise RequestError(
            f"{read.path} is a {config.method} adapter ({config.peft_type}), which has no ranks to {verb}; "
            "give a LoRA adapter"
        )
    if any(MAGNITUDE in key for key in read.tensors):
        raise RequestError(
            f"{read.path} is a DoRA adapter, whose columns are rescaled by the base, so its factors alone do not say "
            f"what it adds; {verb} a LoRA adapter without DoRA"
        )
    updates = low_rank_updates(read)
    if not updates:
        raise RequestError(f"{read.path} holds no low-rank update, so there is nothing to {verb}; give a LoRA adapter")
    return updates


def other_tensors(read: AdapterFolder, updates: Sequence[LowRank]) -> dict[str, Tensor]:
    """What a folder holds beside its factors: heads, biases, token rows, and what of the base PEFT repeats."""
    factors = {key for update in updates for key in (update.key_a, update.key_b)}
    return {key: tensor for key, tensor in read.tensors.items() if key not in factors}


def one_rank(rebuilt: Sequence[Rebuilt]) -> list[Rebuilt]:
    """Every update with the largest rank of all, its factors filled up with zeros."""
    most = max(one.rank for one in rebuilt)
    return [replace(one, pairs=tuple(filled(pair, most) for pair in one.pairs)) for one in rebuilt]


def filled(pair: Pair, rank: int) -> Pair:
    """A pair of a higher rank with the same product: zeros below A and beside B."""
    a, b = pair
    more = rank - a.shape[0]
    return pad(a, (0, 0, 0, more)), pad(b, (0, more))


def common_scale(rebuilt: Sequence[Rebuilt]) -> float:
    """The multiplier of the new factors: the old one where all have one and alpha stays whole, else 1."""
    scales = {one.update.scale for one in rebuilt}
    scale = scales.pop()
    whole = all(float(scale * one.rank).is_integer() for one in rebuilt)
    return scale if not scales and whole else 1.0


def patterns(rebuilt: Sequence[Rebuilt], scale: float) -> dict[str, Any]:
    """r, lora_alpha and their patterns of adapter_config.json: the commonest rank, and by full path what differs."""
    ranks = {one.update.path: (one.rank, one.update.kind) for one in rebuilt}
    usual = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    # the first key that matches wins, after any prefix: a longer path goes before one that ends it
    others = sorted((path for path, (rank, _) in ranks.items() if rank != usual), key=lambda path: (-len(path), path))
    # a bare dot, as PEFT writes paths: no module's name differs from another's in a dot alone
    plain = {path: re.escape(path).replace(r"\.", ".") for path in others}
    keys = {path: plain[path] + (r"(\.\w+)?" if ranks[path][1] == "experts" else "") for path in others}
    return {
        "r": usual,
        "lora_alpha": _whole(scale * usual),
        "use_rslora": False,
        "rank_pattern": {keys[path]: ranks[path][0] for path in others},
        "alpha_pattern": {keys[path]: _whole(scale * ranks[path][0]) for path in others},
    }


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def write_rebuilt(
    aside: Path,
    rebuilt: Sequence[Rebuilt],
    *,
    peft: Mapping[str, Any],
    others: Mapping[str, Tensor],
    record: Mapping[str, Any],
    scale: float,
    done: str,
) -> tuple[AdapterFolder, list[Cut]]:
    """Write an adapter folder into `aside`, read it again, and measure every update against the exact one.

    `peft` is adapter_config.json but for ranks and alphas; `done` one sentence for the model card.
    Raises  ProofError where the error of the file is not the predicted one within float32's rounding
    """
    root = math.sqrt(scale)
    stored = dict(others)
    for one in rebuilt:
        stored |= one.update.stored([(a / root, b / root) for a, b in one.pairs])
    save_safetensors(aside / TENSORS, stored)
    config = dict(sorted({**peft, **patterns(rebuilt, scale)}.items()))
    write_text(aside / CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    scales = {one.update.path: scale for one in rebuilt}
    write_json(aside / RECORD, {**_about(), **record, "scale": dict(sorted(scales.items()))})
    write_text(aside / "README.md", _card(rebuilt, done))
    read = read_folder(aside)
    return read, _measured(read, rebuilt)


def _card(rebuilt: Sequence[Rebuilt], done: str) -> str:
    """README.md: what was done, and the ranks by kind of module."""
    kinds = Counter((one.update.path.rpartition(".")[2], one.rank) for one in rebuilt)
    rows = [f"| {leaf} | {count} | {rank} |" for (leaf, rank), count in sorted(kinds.items())]
    return _CARD.format(done=done, rows="\n".join(rows))


def _about() -> dict[str, Any]:
    from lofi import __version__

    return {"format": FORMAT, "lofi": __version__, "versions": versions(), "code": hash_code()}


def _measured(read: AdapterFolder, rebuilt: Sequence[Rebuilt]) -> list[Cut]:
    held = {update.name: update for update in low_rank_updates(read)}
    cuts = []
    for one in rebuilt:
        update = held[one.update.name]
        error, off = (
            math.hypot(*(distance(x, y, 1.0, update.scale) for x, y in zip(pairs, update.pairs, strict=True)))
            for pairs in (one.exact, one.pairs)
        )
        # both: what is wrong at a right angle to the error hardly changes its length
        if not (abs(error - one.predicted) <= one.rounding and off <= one.rounding):
            raise ProofError(
                f"the file's update of {one.update.name} is {error:.6g} away from the exact one, predicted was "
                f"{one.predicted:.6g}; check the disk and run it again (nothing was written)"
            )
        cuts.append(Cut(one.update.name, one.update.rank, one.rank, one.norm, one.predicted, error))
    return cuts


def carried(record: Mapping[str, Any]) -> dict[str, Any]:
    """What lofi.json says that is true of the new adapter as well: base, data, tokenizer, text format, labels."""
    return {key: value for key, value in record.items() if key not in (*_OUTDATED, *_about())}


def origin(read: AdapterFolder) -> dict[str, Any]:
    """Which adapter something was made from: where it lay, and its tensors' hash."""
    return {"adapter": str(read.path), "sha256": hash_file(read.path / TENSORS)}


def refuse_output(output: str | Path, adapters: Sequence[str | Path]) -> None:
    """Raise RequestError for an output that exists, or that lies in an adapter's folder."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"output {output} exists; choose a new folder, for an adapter is never written over")
    for adapter in adapters:
        source = Path(adapter).resolve()
        if source == target.resolve() or source in target.resolve().parents:
            raise RequestError(f"output {output} lies in the adapter {adapter}; choose a folder outside it")
