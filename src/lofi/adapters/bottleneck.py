"""Adapter layers: a bottleneck after a sublayer (Houlsby) or after a block (Lin), y -> y + U f(D y + d) + u.

Houlsby et al. (arXiv 1902.00751, fig. 2) put one after every attention and after the MLP, each before the residual sum;
a decoder with cross-attention has three. Lin et al. (arXiv 2004.03829, sec. 3) put one on the block's output, with a
LayerNorm of its own in front. Masters are float32, the arithmetic is in the activations' dtype. Where U and u are zero
the sum adds zeros, so the model is its base exactly.
Rejected: a fused autograd function; apart from the input, autograd saves only what is as narrow as the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi.adapters.blocks import linears_offered, sublayer_outputs, width_of
from lofi.adapters.config import Names
from lofi.adapters.methods import BOTTLENECK_UNMERGEABLE, HoulsbyConfig, LinConfig
from lofi.adapters.report import Resolved
from lofi.adapters.surgery import Part, named_base_modules
from lofi.adapters.target import matches
from lofi.errors import TargetError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
STD = 0.01  # Houlsby, sec. 3.1: normal, truncated at two standard deviations


class Bottleneck(Part):
    """U f(D norm(y) + d) + u beside the output y of one module: D (m, D), U (D, m), float32; norm only for Lin."""

    kind = "bottleneck"
    unmergeable = BOTTLENECK_UNMERGEABLE
    order = 2

    def __init__(self, width: int, size: int, *, non_linearity: str, norm: bool, device: torch.device):
        super().__init__()
        empty = {"device": device, "dtype": torch.float32}
        self.non_linearity = non_linearity
        self.norm_weight = nn.Parameter(torch.ones(width, **empty)) if norm else None  # type: ignore[call-overload]
        self.norm_bias = nn.Parameter(torch.zeros(width, **empty)) if norm else None  # type: ignore[call-overload]
        self.down = nn.Parameter(torch.empty(size, width, **empty))  # type: ignore[call-overload]
        self.down_bias = nn.Parameter(torch.zeros(size, **empty))  # type: ignore[call-overload]
        self.up = nn.Parameter(torch.zeros(width, size, **empty))  # type: ignore[call-overload]
        self.up_bias = nn.Parameter(torch.zeros(width, **empty))  # type: ignore[call-overload]

    @torch.no_grad()
    def reset(self, init: str) -> None:
        """Draw D, and U too where `init` is "normal"."""
        for weight in (self.down, self.up) if init == "normal" else (self.down,):
            nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = base(*args, **kwargs)
        if isinstance(output, tuple):  # attention modules and blocks that return more than their hidden states
            return type(output)((_add(output[0], parts), *output[1:]))
        return _add(output, parts)

    def delta(self, y: Tensor) -> Tensor:
        """U f(D norm(y) + d) + u: (..., D) -> (..., D)."""
        dtype = y.dtype
        if self.norm_weight is not None and self.norm_bias is not None:
            y = F.layer_norm(y, y.shape[-1:], self.norm_weight.to(dtype), self.norm_bias.to(dtype))
        z = F.linear(y, self.down.to(dtype), self.down_bias.to(dtype))  # (..., m)
        z = _ACTIVATIONS[self.non_linearity](z)
        return F.linear(z, self.up.to(dtype), self.up_bias.to(dtype))

    def zero_delta(self) -> bool | None:
        return not (self.up.any() or self.up_bias.any())

    def extra_repr(self) -> str:
        return f"size={self.down.shape[0]}, non_linearity={self.non_linearity}"


def _add(y: Tensor, parts: list[Bottleneck]) -> Tensor:
    first, *others = parts
    total = first.delta(y)
    for part in others:
        total = total + part.delta(y)
    # autograd needs no product's output, so the sum may take its place; under autocast the two dtypes may differ
    return total.add_(y) if total.dtype == y.dtype else y + total


def resolve(model: nn.Module, config: HoulsbyConfig | LinConfig, saved: dict[str, nn.Module]) -> Resolved:
    """One bottleneck for every place that the config means, outside the modules that train in full.

    Raises  TargetError where the model's outputs are not known by name, or a given pattern matches nothing
    """
    covered = tuple(f"{path}." for path in saved)
    places, notes = _houlsby(model, config) if isinstance(config, HoulsbyConfig) else _lin(model, config)
    parts: dict[str, Part] = {}
    for path, width in places.items():
        if path in saved or path.startswith(covered):
            continue
        part = _made(model.get_submodule(path), width, config)
        part.reset(config.init)
        parts[path] = part
    return Resolved(parts, [], notes)


def _made(module: nn.Module, width: int, config: HoulsbyConfig | LinConfig) -> Bottleneck:
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return Bottleneck(
        width,
        config.bottleneck_size,
        non_linearity=config.non_linearity,
        norm=isinstance(config, LinConfig),
        device=device,
    )


def _houlsby(model: nn.Module, config: HoulsbyConfig) -> tuple[dict[str, int], list[str]]:
    """Path -> width of every attention's and every MLP's output, and what the report says of them."""
    known = list(sublayer_outputs(model))
    attention = _named(model, config.attention_modules, "attention_modules") or [p for _, ps, _ in known for p in ps]
    mlp = _named(model, config.mlp_modules, "mlp_modules") or [p for _, _, ps in known for p in ps]
    _refuse_unknown(model, attention_modules=attention, mlp_modules=mlp)
    both = sorted(set(attention) & set(mlp))
    if both:
        raise TargetError(f"{both[0]} is in attention_modules and in mlp_modules; name it in one of them")
    return {path: width_of(model, path) for path in (*attention, *mlp)}, list(_cross(known))


def _cross(known: list[tuple[str, list[str], list[str]]]) -> list[str]:
    crossed = sum(len(attention) > 1 for _, attention, _ in known)
    return [f"{crossed} blocks have a cross-attention, which takes a bottleneck too: three a block"] if crossed else []


def _lin(model: nn.Module, config: LinConfig) -> tuple[dict[str, int], list[str]]:
    """Path -> width of every block that has an MLP, or of the modules that the user names instead."""
    given = _named(model, config.mlp_modules, "mlp_modules")
    if given:
        return {path: width_of(model, path) for path in given}, []
    found = {path: mlp for path, _, mlp in sublayer_outputs(model) if mlp}
    _refuse_unknown(model, mlp_modules=list(found))
    return {path: width_of(model, mlp[-1]) for path, mlp in found.items()}, []


def _named(model: nn.Module, names: Names, key: str) -> list[str]:
    """Paths that the user's suffixes or regex mean; [] where none are given.

    Raises  TargetError for a pattern that matches nothing
    """
    if names is None:
        return []
    paths = [path for path, _ in named_base_modules(model) if path]
    for pattern in [names] if isinstance(names, str) else names:
        wanted = pattern if isinstance(names, str) else [pattern]
        if not any(matches(path, wanted) for path in paths):
            raise TargetError(f"{key} {pattern!r} matches no module; linears in the blocks: {linears_offered(model)}")
    return [path for path in paths if matches(path, names)]


def _refuse_unknown(model: nn.Module, **places: list[str]) -> None:
    missing = [key for key, paths in places.items() if not paths]
    if missing:
        raise TargetError(
            f"which modules of this {type(model).__name__} end a sublayer is not known by name; say it with "
            f"{' and '.join(missing)} (linears in the blocks: {linears_offered(model)})"
        )
