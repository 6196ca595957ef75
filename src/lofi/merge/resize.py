"""An adapter with fewer ranks: each update cut to its strongest directions, and the cut's error predicted and measured.

The rank is given, or the share of the squared norm to keep, or the share of the adapter's gain on given data. With a
base at hand the smaller adapter is put on it and asked the same as the larger one. What was given is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.adapters.algebra import Svd, product_svd, rank_for_energy, truncated
from lofi.errors import ProofError, RequestError
from lofi.evaluate.intervals import Interval
from lofi.files.adapter_folder import RECORD, AdapterFolder, read_folder
from lofi.files.atomic import atomic_folder, write_json
from lofi.files.updates import LowRank
from lofi.merge.live import Live
from lofi.merge.rebuilt import (
    Cut,
    Rebuilt,
    Total,
    carried,
    common_scale,
    filled,
    one_rank,
    origin,
    other_tensors,
    refuse_output,
    updates_for,
    write_rebuilt,
)
from lofi.merge.verdict import Verdict, refuse_below

RESIZED = "resized"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How small an adapter is to be: one of the first three.

    Raises  RequestError where none or several are given, or a value is impossible
    """

    rank: int | None = None
    """Every update has at most this rank."""
    energy: float | None = None
    """Each update keeps the smallest rank that holds this share of its squared norm."""
    min_kept: float | None = None
    """All are cut to the smallest one rank that keeps this share of the drop in loss from base to base + adapter on
    given data; found by bisection, which takes the share to grow with the rank."""
    same_rank: bool = False
    """Smaller updates are filled up with zeros to the largest rank, for servers that know one rank a folder."""

    def __post_init__(self) -> None:
        given = {"rank": self.rank, "energy": self.energy, "min-kept": self.min_kept}
        chosen = [f"--{key}" for key, value in given.items() if value is not None]
        if len(chosen) != 1:
            what = " and ".join(chosen) or "none"
            raise RequestError(f"{what} of --rank, --energy and --min-kept given, expected exactly one of them")
        if self.rank is not None and self.rank < 1:
            raise RequestError(f"rank is {self.rank}, expected a whole number of at least 1")
        for key in ("energy", "min-kept"):
            share: Any = given[key]
            if share is not None and not 0 < share <= 1:
                raise RequestError(f"{key} is {share}, expected a share above 0 and at most 1, such as 0.99")

    def __str__(self) -> str:
        if self.rank is not None:
            return f"to rank {self.rank}"
        return f"to {self.energy:.4g} of the squared norm" if self.energy else f"to keep {self.min_kept} of the gain"


@dataclass(frozen=True)
class Tried:
    """A rank that was tried, and the share of the adapter's gain that it keeps."""

    rank: int
    kept: Interval


@dataclass(frozen=True)
class ResizeReport:
    """What became of an adapter that was resized."""

    output: str
    adapter: str
    asked: str
    cuts: Sequence[Cut]
    tried: Sequence[Tried] = ()
    verdict: Verdict | None = None
    notes: Sequence[str] = field(default_factory=list)

    @property
    def total(self) -> Total:
        """The error over all updates."""
        return Total.of(self.cuts)

    def lines(self) -> list[str]:
        """The report in words."""
        before, after = (sorted({getattr(cut, key) for cut in self.cuts}) for key in ("before", "after"))
        searched = [
            f"rank {one.rank} keeps {one.kept.value:.1%} of the gain{_interval(one.kept)}" for one in self.tried
        ]
        judged = [] if self.verdict is None else [line.replace("merged ", "resized ") for line in self.verdict.lines()]
        head = f"resized {self.adapter} {self.asked}: rank {_span(before)} -> {_span(after)}, {len(self.cuts)} updates"
        return [head, *searched, self.total.words(), *judged, *self.notes, f"written to {self.output}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; figures of the model are under "results", as rows."""
        rows = [] if self.verdict is None else self.verdict.rows()
        return {
            "output": self.output,
            "adapter": self.adapter,
            "asked": self.asked,
            **self.total.to_dict(),
            "updates": [vars(cut) for cut in self.cuts],
            "tried": [
                {"rank": one.rank, "value": one.kept.value, "low": one.kept.low, "high": one.kept.high}
                for one in self.tried
            ],
            "notes": list(self.notes),
            "results": [{**row, "who": RESIZED if row["who"] == "merged" else row["who"]} for row in rows],
        }


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _interval(kept: Interval) -> str:
    return "" if kept.low is None or kept.high is None else f" ({kept.low:.1%} to {kept.high:.1%})"


def resize_folder(
    adapter_path: str | Path,
    output: str | Path,
    goal: Goal,
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> ResizeReport:
    """Write an adapter folder with smaller ranks than the given one's: see `Goal`.

    s B A ~ U_k S_k V_k^T, the best approximation of rank k; its error is sqrt(sum of the dropped S^2)
    Heads, biases and token rows are carried over. With `model` the result is loaded onto it and compared (on `data`,
    where given, for the share of the gain kept), and the golden prompts are asked again.
    Raises  RequestError for what cannot be asked; AdapterFileError; ProofError where the measured error is not the
            predicted one, or no smaller rank keeps enough
    """
    _check(goal, model, data)
    read = read_folder(adapter_path)
    updates = updates_for("resize", read)
    refuse_output(output, [adapter_path])
    svds = [[product_svd(a, b, update.scale) for a, b in update.pairs] for update in updates]
    live = None if model is None else Live.open(model, read, data, columns)
    most = max(update.rank for update in updates)
    rank, tried = goal.rank, list[Tried]()
    if goal.min_kept is not None:
        assert live is not None
        rank, tried = _smallest(live, updates, svds, goal.min_kept)
    if rank is not None and rank >= most:
        raise RequestError(
            f"{read.path} has ranks up to {most}, so rank {rank} would change nothing; give a smaller one"
        )
    ranks = _ranks(updates, svds, rank, goal.energy)
    rebuilt = [_cut(update, each, to) for update, each, to in zip(updates, svds, ranks, strict=True)]
    rebuilt = one_rank(rebuilt) if goal.same_rank else rebuilt
    about: dict[str, Any] = {RESIZED: origin(read) | {"asked": str(goal)}}
    with atomic_folder(output) as aside:
        small, cuts = write_rebuilt(
            aside,
            rebuilt,
            peft=read.peft | {"init_lora_weights": True},
            others=other_tensors(read, updates),
            record=carried(read.record) | about,
            scale=common_scale(rebuilt),
            done=f"Resized {goal} from an adapter of rank {most}.",
        )
        verdict, golden = (None, None) if live is None else live.judged(small.path, RESIZED)
        about[RESIZED] |= Total.of(cuts).to_dict()
        write_json(aside / RECORD, small.record | about | ({"golden": golden} if golden else {}))
    notes = _notes(read, golden, goal)
    return ResizeReport(str(output), str(adapter_path), str(goal), cuts, tried, verdict, notes)


def _check(goal: Goal, model: Any, data: Any) -> None:
    if goal.min_kept is not None and (model is None or data is None):
        raise RequestError("min-kept needs --model and --data: the share of the gain kept is measured on held-out rows")
    if data is not None and model is None:
        raise RequestError("--data needs --model: the rows are asked of base and adapters; give the base")


def _ranks(
    updates: Sequence[LowRank], svds: Sequence[Sequence[Svd]], rank: int | None, energy: float | None
) -> list[int]:
    """The rank of each update; the tensors of one experts module share theirs."""
    if rank is not None:
        return [min(rank, update.rank) for update in updates]
    assert energy is not None
    wanted: dict[str, int] = {}
    for update, each in zip(updates, svds, strict=True):
        most = max(rank_for_energy(svd.s, energy) for svd in each)
        wanted[update.path] = max(most, wanted.get(update.path, 1))
    return [wanted[update.path] for update in updates]


def _cut(update: LowRank, svds: Sequence[Svd], rank: int) -> Rebuilt:
    parts = [truncated(svd, rank) for svd in svds]
    exact = tuple((a.double(), b.double() * update.scale) for a, b in update.pairs)
    error = sum(dropped**2 for _, dropped in parts) ** 0.5
    return Rebuilt(update, exact, tuple(pair for pair, _ in parts), error)


def _smallest(
    live: Live, updates: Sequence[LowRank], svds: Sequence[Sequence[Svd]], min_kept: float
) -> tuple[int, list[Tried]]:
    """The smallest rank that keeps enough, by bisection, and every rank tried, in order."""
    most = max(update.rank for update in updates)
    tried: dict[int, Tried] = {}

    def enough(rank: int) -> bool:
        verdict = live.with_tensors(_cut_tensors(live.read, updates, svds, rank))
        if verdict.share_kept is None:
            refuse_below(verdict, min_kept)
        assert verdict.share_kept is not None
        tried[rank] = Tried(rank, verdict.share_kept)
        return verdict.share_kept.value >= min_kept

    low, high = 1, most  # the answer lies in [low, high]; the whole adapter keeps its gain by definition
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    if low == most:
        said = ", ".join(
            f"rank {one.rank} {one.kept.value:.1%}" for one in sorted(tried.values(), key=lambda t: t.rank)
        )
        raise ProofError(
            f"no rank below {most} keeps {min_kept:.1%} of the gain ({said or 'there is none'}); ask for less, or keep "
            "the adapter as it is"
        )
    return low, [tried[rank] for rank in sorted(tried)]


def _cut_tensors(
    read: AdapterFolder, updates: Sequence[LowRank], svds: Sequence[Sequence[Svd]], rank: int
) -> dict[str, Any]:
    """The file's tensors with every update cut to one rank; the smaller factors are filled up with zeros."""
    stored = dict(read.tensors)
    for update, each in zip(updates, svds, strict=True):
        root = update.scale**0.5
        pairs = [filled(truncated(svd, min(rank, update.rank))[0], update.rank) for svd in each]
        stored |= update.stored([(a / root, b / root) for a, b in pairs])
    return stored


def _notes(read: AdapterFolder, golden: Any, goal: Goal) -> list[str]:
    notes = []
    if read.record.get("golden") and not golden:
        notes.append("golden prompts were left out: give --model to have them asked again")
    if not read.record:
        notes.append(f"{read.path} has no {RECORD}, so which base the adapter belongs to is not on record")
    if goal.same_rank:
        notes.append("every update has one rank, the smaller ones filled up with zeros")
    return notes
