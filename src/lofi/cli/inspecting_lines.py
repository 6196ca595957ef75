"""The lines of an inspected adapter's tables: its updates, and what it trains besides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TENSOR_HEADS = ("tensor", "shape", "parameters", "norm", "moved")


def tensors_of(folder: Any, base: Any) -> list[dict[str, Any]]:
    """What is no factor: shape, size, norm, and how far it is from the base's tensor of that name, relative to it."""
    from lofi.files.peft_format import PREFIX

    own = {} if base is None else dict(base.named_parameters(remove_duplicate=False))
    rows = []
    for key, tensor in sorted(folder.tensors.items()):
        if ".lora_" in key and "magnitude" not in key:
            continue
        name = key.removeprefix(PREFIX)
        held = own.get(name.replace(".base_layer", ""))
        moved = None
        if held is not None and held.shape == tensor.shape and held.any():
            frozen = held.detach().double()
            moved = float((tensor.double() - frozen).norm() / frozen.norm())
        size = {"shape": list(tensor.shape), "parameters": tensor.numel(), "norm": float(tensor.double().norm())}
        rows.append({"tensor": name, **size, "moved": moved})
    return rows


def cells_of(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row a tensor, as a page shows it."""
    lines = tensor_lines(tensors, whole=True)
    return [dict(zip(TENSOR_HEADS, line, strict=True)) for line in lines]


def tensor_lines(tensors: Sequence[Mapping[str, Any]], *, whole: bool) -> list[tuple[str, ...]]:
    """A line a tensor, or one for all of a last name and shape with the range of their figures."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in tensors:
        name = row["tensor"] if whole else ".".join(row["tensor"].split(".")[-2:])
        groups.setdefault((name, tuple(row["shape"])), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (name, shape), rows in groups.items():
        moved = [row["moved"] for row in rows if row["moved"] is not None]
        head = f"{len(rows)} x {name}" if len(rows) > 1 else name
        size = f"{sum(row['parameters'] for row in rows):,}"
        norms = span([row["norm"] for row in rows])
        lines.append((head, " x ".join(map(str, shape)), size, norms, span(moved, ".2%") if moved else ""))
    return lines


HEADS = (
    *("module", "shape", "rank", "multiplier", "norm", "largest value", "directions for 90 %", "effective rank"),
    "dead",
)
BASE_HEADS = ("module", "weight", "of its norm", "amplification", "in its directions", "in random ones")


def update_lines(updates: Sequence[Any], *, whole: bool) -> list[tuple[str, ...]]:
    """A line a module, or one for all of a last name, shape, rank and multiplier, with the range of their figures."""
    return [_line(name, group) for name, group in _groups(updates, whole)]


def base_lines(updates: Sequence[Any], *, whole: bool) -> list[tuple[str, ...]]:
    """The same beside the base's weights, as table 7 of the LoRA paper has it; [] without a base."""
    if any(update.beside is None for update in updates):
        return []
    lines = []
    for name, group in _groups(updates, whole):
        beside = [update.beside for update in group]
        share = span([update.relative or 0.0 for update in group], ".2%")
        figures = [span([getattr(one, key) for one in beside], ".3g") for key in ("factor", "weight", "random")]
        lines.append((name, span([one.whole for one in beside]), share, *figures))
    return lines


def _groups(updates: Sequence[Any], whole: bool) -> list[tuple[str, list[Any]]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for update in updates:
        key = (update.path,) if whole else (update.path.rpartition(".")[2], update.shape, update.rank, update.scale)
        groups.setdefault(key, []).append(update)
    return [(f"{len(group)} x {key[0]}" if len(group) > 1 else key[0], group) for key, group in groups.items()]


def _line(name: str, group: Sequence[Any]) -> tuple[str, ...]:
    first = group[0]
    experts = f"{first.experts} x " if first.experts > 1 else ""
    return (
        name,
        f"{experts}{first.shape[0]} x {first.shape[1]}",
        str(first.rank),
        f"{first.scale:g}",
        span([update.norm for update in group]),
        span([max(update.values, default=0.0) for update in group]),
        f"{span([update.directions for update in group])} of {first.rank}",
        span([update.effective_rank for update in group], ".1f"),
        span([update.dead for update in group]),
    )


def span(values: Sequence[float], form: str = ".3g") -> str:
    """The smallest and the largest, or the one that all are."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
