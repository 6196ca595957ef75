"""An adapter as a bank takes it: tensors on the host, the scale folded in, in the dtype that the base computes in.

Knows the parts of an adapter and how each becomes an addition to a module's output that depends on nothing but the
module's input and the adapter, which is what many adapters in one batch ask for. What depends on more (which tokens an
expert got, a whole module run in another's place, virtual tokens) is refused by name. Does not know slots or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lofi.adapters.embedding import EmbeddingFactors
from lofi.adapters.linear import LinearFactors
from lofi.adapters.registry import adapter_of
from lofi.adapters.rows import HeadRows, TokenRows
from lofi.adapters.surgery import Part, own_tensors
from lofi.errors import TargetError

EXPERTS = "experts"
"""The name under which mixtures keep their experts, whose inputs are some of the batch's tokens in another order."""


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """y + (x A^T) B, and where there is any: DoRA's stretch of it without its bias, and what the bias moved by."""

    a: Tensor
    """(R, I)"""
    b: Tensor
    """(R, O), the scale folded in"""
    stretch: Tensor | None = None
    """DoRA's m / n - 1 (O,)"""
    shift: Tensor | None = None
    """trained bias - frozen bias (O,)"""


@dataclass(frozen=True, kw_only=True)
class PackedEmbedding:
    """y + A[ids] B."""

    a: Tensor
    """(V, R)"""
    b: Tensor
    """(R, D), the scale folded in"""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Trained rows in place of the embedding's, or, in the head that shares its weight, of what they say there."""

    ids: Tensor
    """(n,) token ids, ascending"""
    rows: Tensor
    """(n, D)"""
    head: bool


PackedPart = PackedLinear | PackedEmbedding | PackedRows


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One adapter on the host, ready to be placed in a bank's slot; nothing of it may be written to."""

    parts: Mapping[str, PackedPart]
    """By module path."""
    rank: int
    """The largest rank R, 0 for an adapter without low-rank parts."""

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return sum(t.numel() * t.element_size() for part in self.parts.values() for t in tensors_of(part).values())

    def pinned(self) -> Packed:
        """A copy in page-locked memory, from which a GPU is filled without stopping the host."""
        pinned = {
            path: replace(cast("Any", part), **{name: t.pin_memory() for name, t in tensors_of(part).items()})
            for path, part in self.parts.items()
        }
        return Packed(parts=pinned, rank=self.rank)


def tensors_of(part: PackedPart) -> dict[str, Tensor]:
    """The tensors of one packed part by name."""
    return {f.name: value for f in fields(part) if isinstance(value := getattr(part, f.name), Tensor)}


@torch.no_grad()
def pack(model: nn.Module, name: str = "default", *, called: str | None = None) -> Packed:
    """One of a model's adapters as a bank takes it; the model and the adapter stay as they are.

    `called` is what errors call it, by default its name.

    Dtypes  that of the base's first floating weight; what is folded or subtracted is so in float32 and rounded once
    Raises  TargetError naming every part that cannot share a batch with other adapters, and what to do instead
    """
    parts, dtype = adapter_of(model, name).parts, base_dtype(model)
    refusals = list(_refusals(parts))
    if refusals:
        more = f" and {len(refusals) - 3} more" if len(refusals) > 3 else ""
        fixed = any(part.unmergeable for part in parts.values())
        remedy = "ask it with lofi generate" if fixed else "merge it into the base and serve that (lofi merge)"
        raise TargetError(
            f"{called or f'adapter {name!r}'} cannot share a batch with others: {'; '.join(refusals[:3])}{more}; "
            f"{remedy}"
        )
    packed = {path: _PACKERS[type(part)](part, model.get_submodule(path), dtype) for path, part in parts.items()}
    ranks = [part.b.shape[0] for part in packed.values() if not isinstance(part, PackedRows)]
    return Packed(parts=packed, rank=max(ranks, default=0))


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the base's first floating tensor, which is what its activations are in."""
    return next(tensor.dtype for _, tensor in own_tensors(model) if tensor.is_floating_point())


def _refusals(parts: Mapping[str, Part]) -> Iterator[str]:
    for path, part in parts.items():
        if type(part) not in _PACKERS:
            yield f"its part at {path or 'the model'} is {part.kind}, which is computed for a whole batch at once"
        elif EXPERTS in path.split("."):
            yield f"{path} is one expert of a mixture, which sees the tokens in an order of its own"


def _host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous().clone()


def _linear(part: LinearFactors, module: Any, dtype: torch.dtype) -> PackedLinear:
    a, b = part.factors()
    shift = None if part.bias is None else part.bias - module.bias.to(part.bias.dtype)
    stretch = part.stretch(module) if part.rescales else None
    return PackedLinear(
        a=_host(a, dtype),
        b=_host((b * part.scale).t(), dtype),
        stretch=None if stretch is None else _host(stretch, dtype),
        shift=None if shift is None else _host(shift, dtype),
    )


def _embedding(part: EmbeddingFactors, module: Any, dtype: torch.dtype) -> PackedEmbedding:
    a, b = part.factors()
    return PackedEmbedding(a=_host(a.t(), dtype), b=_host((b * part.scale).t(), dtype))


def _rows(part: TokenRows, module: Any, dtype: torch.dtype) -> PackedRows:
    return PackedRows(ids=_host(part.index, torch.long), rows=_host(part.rows, dtype), head=False)


def _head_rows(part: HeadRows, module: Any, dtype: torch.dtype) -> PackedRows:
    owner: Any = part.owner
    return PackedRows(ids=_host(owner.index, torch.long), rows=_host(owner.rows, dtype), head=True)


_PACKERS = cast(
    "dict[type[Part], Callable[[Any, Any, torch.dtype], PackedPart]]",
    {LinearFactors: _linear, EmbeddingFactors: _embedding, TokenRows: _rows, HeadRows: _head_rows},
)
