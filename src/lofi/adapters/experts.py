"""LoRA on the fused 3-D weights of mixture-of-experts models, one pair of factors an expert.

Follows the convention of transformers' experts interface: a module that owns `down_proj` and `gate_up_proj` (or
`up_proj`) of shape (E, O, I), or (E, I, O) where `is_transposed`, says so in `has_gate`, `has_bias`, `is_transposed`,
and is called with (hidden (S, D), top_k_index (S, K), top_k_weights (S, K)). With no adapter active the module's own
implementation runs; with one, each expert's tokens go through `low_rank_product`, so W + delta is never formed. A
module that holds codes instead (quant/experts.py) is asked for each expert's product: `expert_product(name, expert)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.fused import CONV1D, LINEAR, Product, low_rank_product
from lofi.adapters.init import draw_factors, from_start, is_zero, start_from
from lofi.adapters.surgery import Part, float_sum
from lofi.errors import TargetError

_CONVENTION = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")


def is_experts(module: Any) -> bool:
    """Whether the module follows the experts convention described above, with nothing after the down projection."""
    if not all(hasattr(module, name) for name in _CONVENTION) or module.down_proj.ndim != 3:
        return False
    return not getattr(module, "has_post_expert_norm", False)


class ExpertPair(nn.Module):
    """A (E, R, I) and B (E, O, R) of one 3-D parameter, float32 masters; A0 and B0 after a shifted start."""

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, shape: Sequence[int], rank: int, *, transposed: bool, device: torch.device):
        super().__init__()
        experts, rows, columns = shape
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        self.lora_A = nn.Parameter(torch.empty(experts, rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(experts, out_features, rank, device=device, dtype=torch.float32))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def reset_from(self, weights: Tensor, init: str, scale: float) -> None:
        """Take each expert's A and B from its frozen weight, of (E, O, I): see `init.py`."""
        for a, b, weight in zip(self.lora_A, self.lora_B, weights, strict=True):
            start_from(a, b, init, weight, scale)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (E, R', I) and B (E, O, R') of the updates; R' = 2R after a shifted start."""
        return from_start(self.lora_A, self.lora_B, self.start_A, self.start_B)


class ExpertFactors(Part):
    """The pairs that one adapter holds for one experts module, by parameter name, all of one rank and scale."""

    kind = "experts"
    rank: int
    scale: float

    def __init__(self, module: Any, names: Sequence[str], rank: int, scale: float):
        super().__init__()
        if not is_experts(module):
            raise TargetError(
                f"{type(module).__name__} does not follow transformers' experts interface, so its 3-D parameters "
                "cannot be adapted; leave them out of target_parameters"
            )
        self.rank, self.scale, self.exported_scale = rank, scale, scale
        self.transposed = bool(module.is_transposed)
        device = module.down_proj.device
        shapes = {name: getattr(module, name).shape for name in sorted(names)} | _packed_shapes(module, names)
        self.pairs = nn.ModuleDict(
            {name: ExpertPair(s, rank, transposed=self.transposed, device=device) for name, s in shapes.items()}
        )

    def reset(self, init: bool | str) -> None:
        """Draw every expert's A and B: see `LoraConfig.init_lora_weights`."""
        for pair in self.pairs.values():
            for a, b in zip(pair.lora_A, pair.lora_B, strict=True):  # type: ignore[arg-type]
                draw_factors(a, b, init)

    def reset_from(self, module: Any, init: str, exported_scale: float) -> None:
        """Take every expert's A and B from its frozen weight, as what the updates are counted from."""
        self.exported_scale = exported_scale
        for name, pair in self.pairs.items():
            weights = _dense_experts(module, name)
            pair.reset_from(weights.transpose(1, 2) if self.transposed else weights, init, self.scale)  # type: ignore

    def experts(self, tensor_name: str) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each expert's update of one parameter, as `ExpertPair.factors` has them."""
        pair: Any = self.pairs[tensor_name]
        return list(zip(*pair.factors(), strict=True))

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return experts_forward(module, parts, *args, *kwargs.values())

    def changes(self) -> list[str]:
        return list(self.pairs)

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        merged = torch.empty_like(base)
        for expert, delta in enumerate(self.delta_weights(tensor_name)):
            merged[expert] = float_sum(base[expert], delta.t() if self.transposed else delta)
        return merged

    def delta_weights(self, tensor_name: str) -> list[Tensor]:
        """s B A (O, I) of each expert, in float32."""
        experts = self.experts(tensor_name)
        return [(b.detach().float() @ a.detach().float()) * self.scale for a, b in experts]

    def zero_delta(self) -> bool | None:
        pairs: Any = self.pairs.values()
        return all(is_zero(p.lora_A, p.lora_B, p.start_A, p.start_B) for p in pairs)

    def exported(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        fold = self.scale / self.exported_scale  # rsLoRA, folded
        for name, pair in self.pairs.items():
            a, b = pair.factors()  # type: ignore[operator]
            held |= {f"pairs.{name}.lora_A": a, f"pairs.{name}.lora_B": b if fold == 1 else b * fold}
        return held


def _dense_experts(module: Any, name: str) -> Tensor:
    """(E, ...) as the base has it, dequantized in float32 where it holds codes."""
    if name not in getattr(module, "packed_shapes", {}):
        return getattr(module, name).detach()
    if getattr(module, name).is_meta:
        return torch.empty(module.packed_shapes[name], device="meta")
    return module.dense_parameter(name, torch.float32)


def _packed_shapes(module: Any, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in getattr(module, "packed_shapes", {}).items() if name in names}


def experts_forward(
    module: Any, parts: list[ExpertFactors], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' output (S, D) under `parts` (none: the base's), one expert that tokens were routed to at a time."""
    entry = "gate_up_proj" if module.has_gate else "up_proj"
    enter, leave = _Projection(module, parts, entry), _Projection(module, parts, "down_proj")
    output = torch.zeros_like(hidden_states)  # (S, D)
    for expert in top_k_index.unique().tolist():
        if expert >= module.num_experts:  # transformers marks dropped tokens so
            continue
        token, choice = torch.where(top_k_index == expert)
        h = enter(hidden_states[token], expert)  # (s, O)
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = leave(h, expert) * top_k_weights[token, choice, None]  # (s, D)
        output.index_add_(0, token, y.to(output.dtype))
    return output


class _Projection:
    """x W_e^T + b_e + sum of s B_e A_e x, for the experts of one parameter."""

    def __init__(self, module: Any, parts: list[ExpertFactors], name: str):
        self.module, self.name = module, name
        self.bias = getattr(module, f"{name}_bias") if module.has_bias else None
        pairs: list[Any] = [(part.scale, part.pairs[name]) for part in parts if name in part.pairs]
        # unbound once: selecting expert by expert would make a gradient of the whole stack for each
        self.factors = [(scale, *(factor.unbind(0) for factor in pair.factors())) for scale, pair in pairs]

    def _product(self, expert: int) -> tuple[Product, tuple[Tensor, ...]]:
        """How the expert's weight multiplies, and the tensors that hold it."""
        if self.name in getattr(self.module, "packed_shapes", {}):
            return self.module.expert_product(self.name, expert), ()
        return CONV1D if self.module.is_transposed else LINEAR, (getattr(self.module, self.name)[expert],)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        (product, stored), bias = self._product(expert), None if self.bias is None else self.bias[expert]
        if not self.factors:
            return product.forward(x, bias, *stored)
        (scale, a, b), *others = self.factors
        y = low_rank_product(x, a[expert], b[expert], bias, *stored, product=product, scale=scale)
        for scale, a, b in others:
            y = y + scale * ((x @ a[expert].to(x.dtype).t()) @ b[expert].to(x.dtype).t())
        return y
