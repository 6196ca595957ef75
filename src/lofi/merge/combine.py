"""Several LoRA adapters of one base as one: the weighted sum of their updates, exact, or cut to a rank.

    D = sum of w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

The sum is always this one, so no product of one adapter's B with another's A ever appears. Rejected: adding A's and B's
separately, which is what PEFT's combination_type "linear" does: (B_1 + B_2)(A_1 + A_2) has such cross terms, and two
adapters that were trained apart share no basis in which they would mean anything. Ranks, scales, targets and rsLoRA may
differ; what is no sum (heads, biases, token rows) must be the same in all. Nothing given is changed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.adapters.algebra import Pair, concatenated, product_svd, truncated
from lofi.errors import ProofError, RequestError
from lofi.files.adapter_folder import RECORD, AdapterFolder, read_folder
from lofi.files.atomic import atomic_folder, write_json
from lofi.files.updates import LowRank, natural
from lofi.merge.agreement import expert_parameters, same_base, same_experts, same_kind, same_others
from lofi.merge.rebuilt import (
    Cut,
    Rebuilt,
    Total,
    carried,
    filled,
    origin,
    other_tensors,
    refuse_output,
    updates_for,
    write_rebuilt,
)

HOW = ("concat", "linear", "svd")
COMBINED = "combined"


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How adapters are added up.

    Raises  RequestError for values that are impossible or do not go together
    """

    how: str = "concat"
    """"concat": exact, with the sum of the ranks; "linear": cut to the largest rank of its parts; "svd": to `rank`."""
    weights: Sequence[float] | None = None
    """One for each adapter; 1 each where None, which is what activating all of them computes."""
    rank: int | None = None
    """For "svd": the rank of every update."""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            near = difflib.get_close_matches(self.how, HOW, n=1)
            raise RequestError(
                f"how is {self.how!r}, " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(HOW)}")
            )
        if (self.how == "svd") != (self.rank is not None):
            raise RequestError(
                "svd needs a rank to cut the sum to; give --rank"
                if self.rank is None
                else f"rank goes with svd, but how is {self.how}, which chooses its own; leave one of them out"
            )
        if self.rank is not None and self.rank < 1:
            raise RequestError(f"rank is {self.rank}, expected a whole number of at least 1")
        wrong = [weight for weight in self.weights or () if not math.isfinite(weight) or weight == 0]
        if wrong:
            raise RequestError(
                f"weights holds {wrong[0]}, expected finite numbers other than 0; leave an adapter out that is to add "
                "nothing"
            )

    def weights_for(self, count: int) -> list[float]:
        """A weight for each of `count` adapters."""
        if self.weights is None:
            return [1.0] * count
        if len(self.weights) != count:
            raise RequestError(f"{len(self.weights)} weights for {count} adapters; give one for each, in their order")
        return list(self.weights)

    def __str__(self) -> str:
        return {
            "concat": "by concatenation",
            "linear": "linearly (cut to the largest rank of the parts)",
            "svd": f"by SVD to rank {self.rank}",
        }[self.how]


@dataclass(frozen=True)
class CombineReport:
    """What adapters were combined into."""

    output: str
    adapters: Mapping[str, str]
    weights: Sequence[float]
    mix: Mix
    cuts: Sequence[Cut]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def total(self) -> Total:
        """The error against the exact sum, over all updates."""
        return Total.of(self.cuts)

    def lines(self) -> list[str]:
        """The report in words."""
        parts = " + ".join(f"{weight:g} x {name}" for name, weight in zip(self.adapters, self.weights, strict=True))
        ranks = sorted({cut.after for cut in self.cuts})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        head = f"combined {parts} {self.mix}: {len(self.cuts)} updates of rank {span}"
        return [head, f"against the exact sum, {self.total.words()}", *self.notes, f"written to {self.output}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": self.output,
            "adapters": dict(self.adapters),
            "weights": list(self.weights),
            "how": self.mix.how,
            **self.total.to_dict(),
            "updates": [vars(cut) for cut in self.cuts],
            "notes": list(self.notes),
        }


def combine_folders(adapters: Mapping[str, str | Path], output: str | Path, mix: Mix = Mix()) -> CombineReport:
    """Write the weighted sum of LoRA adapters (by name) as one adapter folder.

    Raises  RequestError for fewer than two adapters, other weights than adapters, adapters of different tasks, or with
            heads, biases or token rows that differ; ProofError for different bases, or where the measured error is not
            the predicted one; AdapterFileError
    Exact   "concat" to the float32 rounding of w s B; the others say their distance to the exact sum
    """
    if len(adapters) < 2:
        raise RequestError(f"{len(adapters)} adapter given, but combining takes two or more; give --adapter again")
    weights = mix.weights_for(len(adapters))
    read = {name: read_folder(path) for name, path in adapters.items()}
    parts = {name: updates_for("combine", folder) for name, folder in read.items()}
    refuse_output(output, list(adapters.values()))
    same_base(read)
    same_kind(read)
    others = same_others({name: other_tensors(folder, parts[name]) for name, folder in read.items()})
    same_experts(read, parts)
    rebuilt = [_sum(held, mix) for held in _by_name(parts, dict(zip(read, weights, strict=True)))]
    rebuilt = _level_experts(rebuilt)
    said = " + ".join(f"{weight:g} x {name}" for name, weight in zip(read, weights, strict=True))
    about: dict[str, Any] = {
        "how": mix.how,
        "rank": mix.rank,
        "parts": [origin(folder) | {"weight": w} for folder, w in zip(read.values(), weights, strict=True)],
    }
    with atomic_folder(output) as aside:
        made, cuts = write_rebuilt(
            aside,
            rebuilt,
            peft=_peft(read, rebuilt),
            others=others,
            record=_record(read),
            scale=1.0,
            done=f"The sum {said}, combined {mix}.",
        )
        write_json(aside / RECORD, made.record | {COMBINED: about | Total.of(cuts).to_dict()})
    paths = {name: str(path) for name, path in adapters.items()}
    return CombineReport(str(output), paths, weights, mix, cuts, _notes(read, mix))


@dataclass(frozen=True)
class _Held:
    """The updates of one tensor, from the adapters that have one, with their weights."""

    updates: tuple[LowRank, ...]
    weights: tuple[float, ...]


def _by_name(parts: Mapping[str, Sequence[LowRank]], weights: Mapping[str, float]) -> list[_Held]:
    found: dict[str, list[tuple[LowRank, float]]] = {}
    for name, updates in parts.items():
        for update in updates:
            found.setdefault(update.name, []).append((update, weights[name]))
    for name, held in found.items():
        shapes = {update.shape for update, _ in held}
        if len(shapes) > 1:
            told = " and ".join(f"{o} x {i}" for o, i in sorted(shapes))
            raise ProofError(f"the adapters' updates of {name} are {told}, so they are for different bases")
    ordered = sorted(found, key=natural)
    return [_Held(*map(tuple, zip(*found[name], strict=True))) for name in ordered]  # type: ignore[arg-type]


def _sum(held: _Held, mix: Mix) -> Rebuilt:
    """The exact sum of one tensor's updates, and what of it is kept."""
    scales = [weight * update.scale for update, weight in zip(held.updates, held.weights, strict=True)]
    pairs_of = zip(*(update.pairs for update in held.updates), strict=True)
    exact = [concatenated(pairs, scales) for pairs in pairs_of]
    first = held.updates[0]
    if mix.how == "concat":
        return Rebuilt(first, tuple(exact), tuple(exact), 0.0)
    rank = mix.rank or max(update.rank for update in held.updates)
    rank = min(rank, exact[0][0].shape[0])
    cut: list[tuple[Pair, float]] = [truncated(product_svd(a, b), rank) for a, b in exact]
    error = math.hypot(*(dropped for _, dropped in cut))
    return Rebuilt(first, tuple(exact), tuple(pair for pair, _ in cut), error)


def _level_experts(rebuilt: Sequence[Rebuilt]) -> list[Rebuilt]:
    """The tensors of one module have one rank in the config: the smaller are filled up with zeros."""
    most: dict[str, int] = {}
    for one in rebuilt:
        most[one.update.path] = max(one.rank, most.get(one.update.path, 1))
    return [
        Rebuilt(one.update, one.exact, tuple(filled(p, most[one.update.path]) for p in one.pairs), one.predicted)
        for one in rebuilt
    ]


def _peft(read: Mapping[str, AdapterFolder], rebuilt: Sequence[Rebuilt]) -> dict[str, Any]:
    """adapter_config.json of the sum but for ranks and alphas: the modules by their full paths."""
    folders = list(read.values())
    first = folders[0].peft
    return first | {
        "target_modules": [one.update.path for one in rebuilt if one.update.kind != "experts"],
        "target_parameters": next(
            (list(expert_parameters(folder)) for folder in folders if expert_parameters(folder)), None
        ),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": any(folder.peft.get("fan_in_fan_out") for folder in folders),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _record(read: Mapping[str, AdapterFolder]) -> dict[str, Any]:
    """What all records say alike; the base from the first that knows it."""
    records = [carried(folder.record) for folder in read.values()]
    same = {key: value for key, value in records[0].items() if all(one.get(key) == value for one in records)}
    base = next((one["base"] for one in records if one.get("base")), None)
    return same | ({"base": base} if base else {})


def _notes(read: Mapping[str, AdapterFolder], mix: Mix) -> list[str]:
    notes = ['no cross terms: the sum is of B A, never of B and A apart (PEFT\'s "linear" has them)']
    records = [folder.record for folder in read.values()]
    if any(record.get("golden") for record in records):
        notes.append("golden prompts were left out: nothing has been asked of the combined adapter yet")
    differing = [
        key for key in ("text_format", "tokenizer") if any(record.get(key) != records[0].get(key) for record in records)
    ]
    if differing:
        notes.append(f"{' and '.join(differing)} differ between the adapters and were left out of {RECORD}")
    trained_on = {(record.get("base") or {}).get("quantization") for record in records if record.get("base")}
    if len(trained_on) > 1:
        notes.append("the adapters were trained on different quantizations of the base; the first one's is on record")
    return notes
